"""CRE's six files from a folder or the hub, as JSON Lines there or as the splits of a data set that ``datasets`` reads."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from propmeta_edit.data.cre import save_cre
from propmeta_edit.errors import DataError
from propmeta_edit.files import sha256_of_json
from propmeta_edit.models.artefacts import cache_home

LOG = logging.getLogger(__name__)
HUB = "hub:"  # before the owner/name of a data set of the hub
TRAIN_FILE, VALID_FILE = "train_data_id.jsonl", "valid_data_id.jsonl"
TEST_FILES = {
    "cre-id": "test_data_id.jsonl",
    "cre-ood": "test_data_ood.jsonl",
    "cre-ood-entity": "test_data_ood-entity.jsonl",
    "cre-ood-relation": "test_data_ood-relation.jsonl",
}
CRE_FILES = (TRAIN_FILE, VALID_FILE, *TEST_FILES.values())
# Names of splits for the same, as far as one may call them so; "-" is "_" and "data_" is left out before they are compared.
_SPLITS = {
    "train": TRAIN_FILE,
    "train_id": TRAIN_FILE,
    "valid": VALID_FILE,
    "valid_id": VALID_FILE,
    "validation": VALID_FILE,
    "validation_id": VALID_FILE,
    "test": TEST_FILES["cre-id"],
    "test_id": TEST_FILES["cre-id"],
    "test_ood": TEST_FILES["cre-ood"],
    "test_ood_entity": TEST_FILES["cre-ood-entity"],
    "test_ood_relation": TEST_FILES["cre-ood-relation"],
}
_COLUMNS = ("entity_type", "subject", "questions")
_FACT_COLUMNS = ("facts", "text")  # one of them, as facts are made from text


def is_source(text: str) -> bool:
    """Whether a data set is named by a folder or by ``hub:owner/name``, not by a file."""
    return text.startswith(HUB) or Path(text).is_dir()


def find_files(source: str) -> dict[str, Path]:
    """Those of CRE's files that a folder or ``hub:owner/name`` has, by their name in ``CRE_FILES``.

    Where none is there as JSON Lines, the splits that ``datasets`` reads from it are written as such into the cache folder.

    Raises:
        DataError: it cannot be fetched or read, has none of the files and no such split, or one of them several times.
    """
    folder = _download(source) if source.startswith(HUB) else Path(source)
    found = _find_in(folder)
    return found or _find_in(_write_splits(source))


def find_file(source: str, name: str) -> Path:
    """One of CRE's files in a folder or in ``hub:owner/name``.

    Raises:
        DataError: as ``find_files``, or it has not this one.
    """
    found = find_files(source)
    if name not in found:
        raise DataError(f"{name} is not in it; of CRE's files it has {', '.join(found)}", source)
    return found[name]


def find_training_files(source: str) -> tuple[Path, Path | None]:
    """(file to meta-train on, file to validate on if there is one) of a file, a folder, or ``hub:owner/name``.

    Raises:
        DataError: as ``find_file``.
    """
    if not is_source(source):
        return Path(source), None
    return find_file(source, TRAIN_FILE), find_files(source).get(VALID_FILE)


def _find_in(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for name in CRE_FILES:
        paths = sorted(path for pattern in (name, f"{name}.gz") for path in folder.rglob(pattern))
        if len(paths) > 1:
            raise DataError(f"{name} is in it several times ({', '.join(map(str, paths))}); name the folder of one", folder)
        if paths:
            found[name] = paths[0]
    return found


def _download(source: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source.removeprefix(HUB), repo_type="dataset", allow_patterns="*.jsonl"))
    except Exception as error:  # whatever the hub's library raises: offline, no such data set, no access
        raise DataError(f"{source} cannot be fetched: {error}") from error


def _write_splits(source: str) -> Path:
    """The folder of CRE's files made from a data set's splits, each written whole; it has no others."""
    splits = _read_splits(source)
    named = {name: _SPLITS.get(name.lower().replace("-", "_").replace("data_", "")) for name in splits}
    if not any(named.values()):
        raise DataError(
            f"none of CRE's files ({', '.join(CRE_FILES)}) is in it, and none of its splits ({', '.join(splits)}) is called like "
            f"one; expected {', '.join(_SPLITS)}",
            source,
        )
    where = source if source.startswith(HUB) else str(Path(source).resolve())
    folder = cache_home() / "datasets" / sha256_of_json(where)[:12]
    for gone in set(CRE_FILES) - set(named.values()):  # of splits that it had once
        (folder / gone).unlink(missing_ok=True)
    for name, file in named.items():
        if file is not None:
            save_cre(_take_records(splits[name], name, source), folder / file)
            LOG.info("%s: split %s as %s", source, name, folder / file)
    return folder


def _read_splits(source: str) -> Mapping[str, Any]:
    """A data set's splits by name, as ``datasets`` reads them; what ``save_to_disk`` wrote has a reader of its own."""
    import datasets

    try:
        if (Path(source) / "dataset_dict.json").is_file():
            splits: Mapping[str, Any] = datasets.load_from_disk(source)
        else:
            splits = datasets.load_dataset(source.removeprefix(HUB))
    except Exception as error:  # whatever the library raises: no data, offline, a configuration is needed
        raise DataError(
            f"none of CRE's files ({', '.join(CRE_FILES)}) is in it, and it cannot be read as a data set: {error}", source
        ) from error
    return splits


def _take_records(split: Any, name: str, source: str) -> list[Mapping[str, Any]]:
    missing = [column for column in _COLUMNS if column not in split.column_names]
    if not set(_FACT_COLUMNS) & set(split.column_names):
        missing.append(" or ".join(_FACT_COLUMNS))
    if missing:
        raise DataError(
            f"split {name} has no column {', '.join(missing)}, which CRE's records need; it has {', '.join(split.column_names)}",
            source,
        )
    return list(split)
