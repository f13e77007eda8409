"""The data sets that variants are asked, each with the split it is of: choices are made on validation, numbers reported on test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from propmeta_edit.errors import ConfigError
from propmeta_edit.evaluation.companions import with_neighbours
from propmeta_edit.evaluation.runner import DataSet
from propmeta_edit.files import sha256_of_json
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.recipes.data_sets import VALIDATION_FILES, WORLD_FILES, WORLD_TESTS, load_all
from propmeta_edit.recipes.meta_training import load_tasks
from propmeta_edit.recipes.sources import is_source
from propmeta_edit.recipes.worlds import WORLD
from propmeta_edit.records import Case

VALIDATION, TEST, TRAINING = "validation", "test", "training"
TEST_OF = {"valid-id": "world-id", "valid-ood": "world-ood"}  # the offline world's test split of the same kind
_PREFIXES = {"valid": VALIDATION, "dev": VALIDATION, "test": TEST, "train": TRAINING}
_RARELY = 10**9  # tasks between validations: at the start and the end of a run alone


@dataclass(frozen=True)
class Split:
    """A data set to ask.

    Args:
        kind: ``validation``, ``test`` or ``training``.
        is_released: from a file that the user named, not of the facts that come with the package.
    """

    data: DataSet
    kind: str
    is_released: bool


def kind_of(item: str) -> str:
    """The split of a data set as written on the command line: its file's name tells it, else its own, else it is the test split."""
    if is_source(item):
        return TEST  # of which only CRE's test files are read
    name, _, file = (item, "", "") if Path(item).is_file() else item.partition("=")
    for text in (Path(file or name).name, name):
        for prefix, kind in _PREFIXES.items():
            if text.startswith(prefix):
                return kind
    return TEST


def is_released(item: str) -> bool:
    """Whether a data set as written on the command line is a file of the user's."""
    return item not in WORLD_FILES or Path(item).is_file()


def to_test(item: str) -> str:
    """The test split in place of a validation split that is given by its name alone; anything else stays."""
    return TEST_OF.get(item, item)


def is_test_of(name: str, validation: str) -> bool:
    """Whether a test split, of the offline world's or of CRE's files, is of the same kind as a validation split."""
    own = TEST_OF.get(validation, "")
    return bool(own) and name in (own, own.replace("world-", "cre-"))


def hold_out(config: MetaTrainConfig, items: Sequence[str]) -> MetaTrainConfig:
    """The settings with which validation splits that are asked for by name alone are no part of the training.

    The offline world has files for them. From a training file they are held out, which a run does only if it validates; without
    them among ``items`` it trains on the whole file, as the paper does.
    """
    is_needed = config.data != WORLD and set(items) & set(VALIDATION_FILES)
    return replace(config, validate_every=_RARELY if is_needed else None)


def load_splits(items: Sequence[str], configs: Mapping[str, MetaTrainConfig], seed: int) -> list[Split]:
    """The data sets of a sweep over models that are trained as ``configs`` say (after ``hold_out``).

    Raises:
        ConfigError: no data set, two of one name, a split of the offline world for a model that is trained on other facts, or
            validation splits that the models do not share.
        DataError: no such data set, or a file that cannot be read.
    """
    _refuse_offline_tests(items, configs)
    held = _load_held_out(configs) if set(items) & set(VALIDATION_FILES) else {}
    _refuse_offline_validation([item for item in items if item in VALIDATION_FILES and item not in held], configs, held)
    loaded = {name: [data] for name, data in held.items()} | load_all([item for item in items if item not in held], seed)
    splits = [Split(data, kind_of(item), is_released(item)) for item in items for data in loaded[item]]
    names = [split.data.name for split in splits]
    if not splits or len(set(names)) < len(names):
        raise ConfigError(
            f"data sets must be named, each once, got {', '.join(names) or 'none'}; NAME=FILE gives a file another name"
        )
    return splits


def _refuse_offline_tests(items: Sequence[str], configs: Mapping[str, MetaTrainConfig]) -> None:
    on_files = {name: config.data for name, config in configs.items() if config.data != WORLD}
    offline = [item for item in items if item in WORLD_TESTS]
    if on_files and offline:
        name, data = next(iter(on_files.items()))
        raise ConfigError(
            f"{offline[0]} is a test split of the offline world, but {name} is meta-trained on {data}; name the file: "
            f"{offline[0].replace('world-', 'cre-')}={WORLD_TESTS[offline[0]]}"
        )


def _refuse_offline_validation(items: Sequence[str], configs: Mapping[str, MetaTrainConfig], held: Mapping[str, DataSet]) -> None:
    on_files = [config.data for config in configs.values() if config.data != WORLD]
    if on_files and items:
        raise ConfigError(
            f"{on_files[0]} has no {items[0]} (it has {', '.join(held) or 'no validation cases'}), and the facts of the offline "
            f"world's are not what the model is trained on; name a file, {items[0]}=FILE, or give --data the training file alone, "
            "from which both validation splits are held out"
        )


def _load_held_out(configs: Mapping[str, MetaTrainConfig]) -> dict[str, DataSet]:
    """The validation splits that were held out of the training file; none for the offline world, which has files of its own.

    Raises:
        ConfigError: the models do not share them.
    """
    found = {name: _held_out_of(config) for name, config in configs.items()}
    hashes = {name: sorted(data.sha256 for data in splits.values()) for name, splits in found.items()}
    first = next(iter(found), "")
    other = next((name for name in found if hashes[name] != hashes[first]), None)
    if other is not None:
        raise ConfigError(
            f"{first} and {other} have other validation cases (data, seed and validation_cases of their YAMLs decide them: "
            f"{configs[first].data} and {configs[other].data}); sweep them apart, or name files: valid-ood=FILE"
        )
    return found.get(first, {})


def _held_out_of(config: MetaTrainConfig) -> dict[str, DataSet]:
    if config.data == WORLD:
        return {}
    _, validation = load_tasks(replace(config, num_tasks=None))
    return {name: DataSet(name, _hash_of_cases(cases), with_neighbours(cases)) for name, cases in validation.items()}


def _hash_of_cases(cases: Sequence[Case]) -> str:
    return sha256_of_json([asdict(case) for case in cases])
