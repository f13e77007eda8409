"""What the studies of meta-trained variants share: models, their training data, and the splits that go with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from propmeta_edit.config import build_config, read_yaml
from propmeta_edit.errors import ConfigError
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.options import Files, require_at_least
from propmeta_edit.recipes.splits import TEST_OF, VALIDATION, Split, hold_out, is_test_of, load_splits, to_test
from propmeta_edit.recipes.worlds import WORLD
from propmeta_edit.settings import has_hparams, hparams_file
from propmeta_edit.studies.engine import Results, Study, StudyOptions, run_study
from propmeta_edit.studies.variants import Variant

LIMIT = 100  # cases of each data set, unless told otherwise


@dataclass(frozen=True)
class SweepOptions:
    """What the studies of meta-trained variants can be told.

    Args:
        models: names of YAMLs in hparams/MetaTrain.
        data: CRE's training file for all models, or world (default: what each YAML says).
        datasets: as for table2 (default: the study's own); valid-id and valid-ood by name alone are held out of a training file.
        test: the paper's way, which the result then says: choices too are made on the test splits.
        test_datasets: on what the variants that were best on validation are asked as well, e.g. cre-ood=test_data_ood.jsonl, where
            anything is chosen (default: the offline world's test splits for models that are trained on it).
        num_tasks: of each meta-training (default: the YAML's).
    """

    models: Files = field(default_factory=lambda: Files(["smollm2-135m"]))
    data: str | None = None
    datasets: Files | None = None
    test: bool = False
    test_datasets: Files | None = None
    num_tasks: int | None = None

    def __post_init__(self) -> None:
        require_at_least(1, num_tasks=self.num_tasks)


def items_of(sweep: SweepOptions, default: Sequence[str]) -> list[str]:
    """The data sets to ask, as they are written on the command line."""
    items = sweep.datasets or default
    return list(dict.fromkeys(map(to_test, items) if sweep.test else items))


def read_configs(
    options: StudyOptions, sweep: SweepOptions, datasets: Sequence[str], suffix: str = ""
) -> dict[str, MetaTrainConfig]:
    """The runs' settings by model, without validation on the way; those of ``<model><suffix>`` where there is such a YAML.

    Args:
        datasets: what is asked if ``sweep`` does not say.
    """
    configs = {}
    asked = {"data": sweep.data, "seed": options.seed, "num_tasks": sweep.num_tasks}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    for name in sweep.models:
        path = hparams_file("MetaTrain", name + suffix if has_hparams("MetaTrain", name + suffix) else name)
        config = build_config(MetaTrainConfig, read_yaml(path), str(path))
        configs[name] = hold_out(replace(config, device=options.resolved_device, **given), items_of(sweep, datasets))
    return configs


def run_sweep(
    name: str,
    configs: Mapping[str, MetaTrainConfig],
    variants: Sequence[Variant],
    write: Callable[[Results], str],
    options: StudyOptions,
    sweep: SweepOptions,
    datasets: Sequence[str],
    series: str | None = None,
) -> int:
    """Meta-train and ask the variants; returns how many cases failed.

    Args:
        name: of the study and its files.
        configs: by model, as ``read_configs`` gives them.
        datasets: what is asked if ``sweep`` does not say.
        series: as ``Study`` has it.
    """
    splits, reported = _load_asked(configs, options, sweep, datasets, is_chosen=series is not None)
    study = Study(name, variants, splits, options.make_bench(name), write, series=series, reported=reported)
    return run_study(study, options if options.limit is not None else replace(options, limit=LIMIT))


def _load_asked(
    configs: Mapping[str, MetaTrainConfig], options: StudyOptions, sweep: SweepOptions, datasets: Sequence[str], is_chosen: bool
) -> tuple[list[Split], dict[str, Split]]:
    """What every variant is asked, and the test splits for what is chosen on validation.

    Raises:
        ConfigError, DataError: as ``load_splits``; --test-datasets where nothing is chosen on validation, or of another kind.
    """
    items = items_of(sweep, datasets)
    splits = load_splits(items, configs, options.case_seed)
    chosen_on = [split.data.name for split in splits if split.kind == VALIDATION and split.data.name in TEST_OF]
    wanted = list(sweep.test_datasets or ())
    if wanted and not (is_chosen and chosen_on):
        raise ConfigError("--test-datasets is for what is chosen on valid-id or valid-ood; name other data sets in --datasets")
    if sweep.test_datasets is None and is_chosen and all(config.data == WORLD for config in configs.values()):
        wanted = [TEST_OF[item] for item in items if item in TEST_OF]
    tests = load_splits(wanted, configs, options.case_seed) if wanted else []
    return splits, _pair(chosen_on, tests)


def _pair(chosen_on: Sequence[str], tests: Sequence[Split]) -> dict[str, Split]:
    """By the name of a validation split the test split of the same kind.

    Raises:
        ConfigError: a test split that is of the kind of none.
    """
    reported = {name: test for name in chosen_on for test in tests if is_test_of(test.data.name, name)}
    others = [test.data.name for test in tests if test not in reported.values()]
    if others:
        raise ConfigError(f"--test-datasets must be those of --datasets ({', '.join(chosen_on)}), got {', '.join(others)}")
    return reported
