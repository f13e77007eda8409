"""The data sets of the benchmarks, by the names and files that a command line gives them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from propmeta_edit.data.counterfact import load_counterfact
from propmeta_edit.data.cre import load_cre
from propmeta_edit.data.mquake import load_mquake, load_mquake_subset
from propmeta_edit.errors import DataError, did_you_mean
from propmeta_edit.evaluation.companions import with_neighbours, with_probes
from propmeta_edit.evaluation.runner import DataSet
from propmeta_edit.evaluation.weighing import weighed_probes
from propmeta_edit.files import sha256_of_file, shortest_names
from propmeta_edit.recipes.data_check import FORMATS, find_format
from propmeta_edit.recipes.released import find_released
from propmeta_edit.recipes.sources import TEST_FILES, find_file, find_files, is_source
from propmeta_edit.recipes.worlds import ensure_world

LOG = logging.getLogger(__name__)
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


@dataclass(frozen=True)
class Source:
    """A file of cases.

    Args:
        name: what its results go by.
        load: how it is read.
        is_named: whether the user gave the name.
    """

    name: str
    path: Path
    load: Callable[..., list[Any]]
    is_named: bool = False


def load_all(items: Sequence[str], seed: int, probed: bool = False) -> dict[str, list[DataSet]]:
    """Several data sets, each ``NAME``, ``NAME=FILE``, ``FILE``, or all test files of CRE in a ``FOLDER`` or in ``hub:owner/name``.

    Files of one name that the user did not give have as many of their folders before it as tell them apart.

    Args:
        probed: with the further questions of ``evaluation.counts``, which take as long again.

    Returns:
        By item, in their order.

    Raises:
        DataError: nothing of the kind, or a file that cannot be read.
    """
    found = {item: find_sources(item) for item in items}
    names = _tell_apart([source for sources in found.values() for source in sources])
    return {
        item: [_load(replace(source, name=names.get(source, source.name)), seed, probed) for source in sources]
        for item, sources in found.items()
    }


def load_datasets(item: str, seed: int, probed: bool = False) -> list[DataSet]:
    """What one item stands for."""
    return load_all([item], seed, probed)[item]


def load_dataset(item: str, seed: int, probed: bool = False) -> DataSet:
    """The same of an item that is one file.

    Raises:
        DataError: as ``load_all``, or it stands for several.
    """
    [data, *more] = load_datasets(item, seed, probed)
    if more:
        raise DataError(f"it has several data sets ({', '.join(one.name for one in (data, *more))}), and one is wanted", item)
    return data


def find_sources(item: str) -> list[Source]:
    """The files that an item as written on the command line stands for; what a bare file is is read from it.

    Of a set of CRE's, ``FILE`` may be the folder or ``hub:owner/name`` that has it. A released set by its ``NAME`` alone is looked
    for in the folder that ``PROPMETA_DATA`` names.

    Raises:
        DataError: as ``load_all``.
    """
    if is_source(item):
        found = find_files(item)
        sources = [_find_bare(found[file]) for file in TEST_FILES.values() if file in found]
        if not sources:
            raise DataError(f"none of CRE's test files is in it, only {', '.join(found)}", item)
        return sources
    return [_find_bare(Path(item)) if Path(item).is_file() else _find_named(item)]


def _find_bare(path: Path) -> Source:
    file = path.name.removesuffix(".gz")
    name = {file: name for name, file in TEST_FILES.items()}.get(file, Path(file).stem)
    return Source(name, path, FORMATS[find_format(path)].load)


def _find_named(item: str) -> Source:
    name, _, file = item.partition("=")
    load = LOADERS.get(name)
    if load is None and name and Path(file).is_file():
        kind = find_format(Path(file))
        LOG.info("%s is none of the known data sets; all of %s is read, as %s", name, file, kind)
        return Source(name, Path(file), FORMATS[kind].load, is_named=True)
    if load is None:
        raise DataError(
            f"unknown data set {name!r}; write an existing FILE or FOLDER, hub:owner/name, NAME=FILE, or a NAME, one of "
            f"{', '.join(LOADERS)}{did_you_mean(name, [*LOADERS, *os.listdir()])}"
        )
    if file and name in (*WORLD_TESTS, *WORLD_MQUAKE):
        raise DataError(f"{name} is the offline world's own; give {file} another name, such as {name.replace('world-', 'cre-')}")
    if file:
        path = find_file(file, CRE_SETS[name]) if name in CRE_SETS and is_source(file) else Path(file)
    elif name in WORLD_FILES:
        path = ensure_world() / WORLD_FILES[name]
    else:
        path = find_released(name)
    return Source(name, path, load, is_named=True)


def _tell_apart(sources: Sequence[Source]) -> dict[Source, str]:
    """Names for those whose own is that of another file too."""
    names: dict[Source, str] = {}
    for name in {source.name for source in sources}:
        alike = {source.path.resolve(): source for source in sources if source.name == name}
        if len(alike) > 1:
            short = zip(alike.values(), shortest_names(list(alike)), strict=True)
            names |= {source: "-".join(Path(own).parts) for source, own in short if not source.is_named}
    return names


def _load(source: Source, seed: int, probed: bool) -> DataSet:
    load, path = source.load, source.path
    cases = load(path, seed=seed) if load is load_cre else load(path)
    if not cases:
        raise DataError(f"no case of {source.name} in it", path)
    cases = with_probes(cases, seed) if probed else [replace(case, probes=tuple(weighed_probes(case))) for case in cases]
    return DataSet(source.name, sha256_of_file(path), with_neighbours(cases))
