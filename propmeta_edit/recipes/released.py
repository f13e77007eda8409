"""The released data sets that users download, found by their published file names in a folder of the user's."""

from __future__ import annotations

import os
from pathlib import Path

from propmeta_edit.errors import DataError
from propmeta_edit.recipes.sources import TEST_FILES

DATA_VARIABLE = "PROPMETA_DATA"  # the environment variable that names the folder
_MQUAKE_3K = ("MQuAKE-CF-3k.json", "MQuAKE-CF-3k-v2.json")
RELEASED_FILES: dict[str, tuple[str, ...]] = {  # the names under which each was published; any of them is taken
    **{name: (file,) for name, file in TEST_FILES.items()},
    "cre-train": ("train_data_id.jsonl", "train_data_id_rebuilt.jsonl"),
    "mquake-subset": _MQUAKE_3K,
    "mquake-3k": _MQUAKE_3K,
    "mquake-4hop": ("mquake_cf_4hop.json",),
    "counterfact": ("multi_counterfact.json", "counterfact.json"),
}


def find_released(name: str, folder: str | Path | None = None) -> Path:
    """The file of a released data set, gzipped or not, at the top of a folder or one level down.

    Args:
        name: one of ``RELEASED_FILES``.
        folder: where to look (default: the folder that ``PROPMETA_DATA`` names).

    Raises:
        DataError: no such data set, no folder is named, or it has none or several of the files; it says what was looked for.
    """
    if name not in RELEASED_FILES:
        raise DataError(f"{name!r} is no released data set; those are {', '.join(RELEASED_FILES)}")
    files = RELEASED_FILES[name]
    wanted = " or ".join(files)
    place = folder or os.environ.get(DATA_VARIABLE)
    if not place:
        raise DataError(
            f"{name} does not come with the package: write {name}={files[0]} with the file you downloaded, "
            f"or set {DATA_VARIABLE} to a folder that has {wanted}"
        )
    found = _find_one_level_down(Path(place), files)
    if not found:
        raise DataError(f"{wanted} is looked for here and one level down, and is not there; {name}=FILE names it", place)
    if len(found) > 1:
        raise DataError(f"it has several files for {name} ({', '.join(map(str, found))}); {name}=FILE names one", place)
    return found[0]


def _find_one_level_down(folder: Path, files: tuple[str, ...]) -> list[Path]:
    return [
        path
        for file in files
        for name in (file, f"{file}.gz")
        for pattern in (name, f"*/{name}")
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    ]
