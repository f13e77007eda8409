"""The data sets of the benchmarks, by the names and files that a command line gives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from propmeta_edit.data.counterfact import load_counterfact
from propmeta_edit.data.cre import load_cre
from propmeta_edit.data.mquake import load_mquake, load_mquake_subset
from propmeta_edit.errors import DataError
from propmeta_edit.evaluation.companions import with_neighbours, with_probes
from propmeta_edit.evaluation.runner import DataSet
from propmeta_edit.evaluation.weighing import weighed_probes
from propmeta_edit.files import sha256_of_file
from propmeta_edit.recipes.data_check import FORMATS, find_format
from propmeta_edit.recipes.released import find_released
from propmeta_edit.recipes.sources import TEST_FILES, find_file, find_files, is_source
from propmeta_edit.recipes.worlds import ensure_world

WORLD_TESTS = {name.replace("cre-", "world-"): file for name, file in TEST_FILES.items()}  # the offline world's own
VALIDATION_FILES = {"valid-id": "valid_data_id.jsonl", "valid-ood": "valid_data_ood.jsonl"}
CRE_SETS = {**TEST_FILES, **VALIDATION_FILES}  # those whose FILE may be the folder that has them
WORLD_MQUAKE = {"world-mquake": "mquake-standin-2hop.json", "world-mquake-3hop": "mquake-standin-3hop.json"}
WORLD_FILES = {**WORLD_TESTS, **VALIDATION_FILES, **WORLD_MQUAKE}
LOADERS: dict[str, Callable[..., list[Any]]] = {
    **dict.fromkeys((*WORLD_TESTS, *CRE_SETS), load_cre),
    "world-mquake": load_mquake_subset,
    "world-mquake-3hop": load_mquake,
    "cre-train": load_cre,
    "mquake-subset": load_mquake_subset,
    "mquake-3k": load_mquake,
    "mquake-4hop": load_mquake,
    "counterfact": load_counterfact,
}


def load_datasets(item: str, seed: int, probed: bool = False) -> list[DataSet]:
    """``NAME``, ``NAME=FILE``, ``FILE``, or all test files of CRE in a ``FOLDER`` or in ``hub:owner/name``.

    Args:
        probed: with the further questions of ``evaluation.counts``, which take as long again.

    Raises:
        DataError: nothing of the kind, or a file that cannot be read.
    """
    if not is_source(item):
        return [load_dataset(item, seed, probed)]
    found = find_files(item)
    files = [found[file] for file in TEST_FILES.values() if file in found]
    if not files:
        raise DataError(f"none of CRE's test files is in it, only {', '.join(found)}", item)
    return [load_dataset(str(path), seed, probed) for path in files]


def load_dataset(item: str, seed: int, probed: bool = False) -> DataSet:
    """``NAME``, ``NAME=FILE`` or ``FILE`` as cases; what a bare file is is read from it.

    Of a set of CRE's, ``FILE`` may be the folder or ``hub:owner/name`` that has it. A released set by its ``NAME`` alone is looked
    for in the folder that ``PROPMETA_DATA`` names.
    """
    name, _, file = item.partition("=")
    load = LOADERS.get(name)
    if Path(item).is_file():
        path = Path(item)
        name = {file: name for name, file in TEST_FILES.items()}.get(path.name, path.stem)
        load = FORMATS[find_format(path)].load
    elif load is None:
        raise DataError(
            f"unknown data set {name!r}; write an existing FILE or FOLDER, hub:owner/name, or NAME or NAME=FILE with one of "
            f"{', '.join(LOADERS)}"
        )
    elif file and name in (*WORLD_TESTS, *WORLD_MQUAKE):
        raise DataError(f"{name} is the offline world's own; give {file} another name, such as {name.replace('world-', 'cre-')}")
    elif file:
        path = find_file(file, CRE_SETS[name]) if name in CRE_SETS and is_source(file) else Path(file)
    elif name in WORLD_FILES:
        path = ensure_world() / WORLD_FILES[name]
    else:
        path = find_released(name)
    cases = load(path, seed=seed) if load is load_cre else load(path)
    if not cases:
        raise DataError(f"no case of {name} in it", path)
    cases = with_probes(cases, seed) if probed else [replace(case, probes=tuple(weighed_probes(case))) for case in cases]
    return DataSet(name, sha256_of_file(path), with_neighbours(cases))
