"""Which layer to meta-train, chosen on validation by successive halving: the test splits are never read.

Every candidate is meta-trained on a few tasks; the better half goes on to twice as many, from where it stopped, until one is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from propmeta_edit.errors import ConfigError
from propmeta_edit.evaluation.rows import read_rows
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.models.layers import MODULE_CHOICES
from propmeta_edit.options import Files, Names, WholeNumbers, require_among
from propmeta_edit.recipes.splits import hold_out, load_splits
from propmeta_edit.studies.choice import Choice, choose
from propmeta_edit.studies.engine import Results, Study, StudyOptions, run_study
from propmeta_edit.studies.pictures import require_styles, write_figure
from propmeta_edit.studies.runs import read_tasks
from propmeta_edit.studies.variants import Variant

BOTH = Names(("attention+mlp",))
DATASETS = Files(("valid-id", "valid-ood"))


def choose_layer(
    config: MetaTrainConfig,
    candidates: WholeNumbers,
    output: str,
    module_choices: Names = BOTH,
    first_tasks: int = 80,
    datasets: Files = DATASETS,
) -> int:
    """Choose the layer (and modules) to meta-train, by successive halving on validation.

    Each candidate gets a few tasks, the better half twice as many, until one is left. Settings as for meta-train; the outer rate is
    held constant, since a schedule that ends with the run would favour short ones. A stopped search continues.

    Args:
        candidates: 0-based layers, e.g. 2,5,8,11.
        output: folder of the search.
        module_choices: of attention, mlp, attention+mlp; every combination with a layer is a candidate.
        first_tasks: tasks of each candidate in the first round.
        datasets: the validation splits that decide, with --validation-cases of each.
    """
    require_among("module-choices", module_choices, MODULE_CHOICES)
    pairs = [(layer, modules) for layer in candidates for modules in module_choices]
    if not pairs or first_tasks < config.tasks_per_step or first_tasks % config.tasks_per_step:
        raise ConfigError(
            f"choosing needs candidates, and first_tasks in whole outer steps ({config.tasks_per_step} tasks each), got layers "
            f"{list(candidates)}, modules {list(module_choices)} and {first_tasks} tasks"
        )
    config = replace(hold_out(config, datasets), outer_schedule="constant", num_tasks=None, checkpoint_every=first_tasks)
    rounds = [first_tasks * 2**number for number in range(len(pairs).bit_length())]
    there = read_tasks(config)[0]
    if there < rounds[-1]:  # now rather than rounds later
        raise ConfigError(f"{len(pairs)} candidates need {rounds[-1]} tasks in the end, but the data has {there}; begin with fewer")
    require_styles([f"{modules}, {num_tasks} tasks" for num_tasks in rounds for modules in module_choices])
    splits = load_splits(datasets, {config.model: config}, config.seed)
    options = StudyOptions(output=output, limit=config.validation_cases, device=config.device, seed=config.seed)
    bench = options.make_bench("layers")
    asked: list[Variant] = []
    left = [_make_variant(config, layer, modules, first_tasks) for layer, modules in pairs]
    for num_tasks in rounds:
        left = [_after(variant, num_tasks) for variant in left]
        asked += left
        run_study(Study("layers", asked, splits, bench, _write), options)
        choice = _choose(left, [split.data.name for split in splits], bench.folder)
        if not any(choice.scores.values()):
            print(
                f"undecided: every candidate answers none of its n = {choice.num_cases} validation cases after {num_tasks} tasks. "
                "Give them more tasks (--first-tasks), and see whether the inner rate writes facts (propmeta-edit choose-rate)"
            )
            return 1
        left = sorted(left, key=lambda variant: choice.ranking.index(variant.name))[: max(1, len(left) // 2)]
    where = left[0].coordinates
    print(f"chosen: layers: [{where['layer']}], modules: {where['modules']}; picture: {bench.folder / 'layers.png'}")
    return 0


def _choose(variants: Sequence[Variant], datasets: Sequence[str], folder: Path) -> Choice:
    """What validation says of the candidates of a round.

    Raises:
        ConfigError: nothing can be said of them.
    """
    choice = choose([variant.name for variant in variants], datasets, read_rows(folder / "rows.jsonl"))
    if choice.best is None:
        raise ConfigError(f"nothing can be chosen: {choice.note or 'no case was asked of all of them'}")
    return choice


def _make_variant(config: MetaTrainConfig, layer: int, modules: str, num_tasks: int) -> Variant:
    where, training = {"layer": layer, "modules": modules}, replace(config, layers=[layer], modules=modules)
    return _after(Variant("", training=training, stops_there=True, coordinates=where), num_tasks)


def _after(variant: Variant, num_tasks: int) -> Variant:
    """A candidate once more, meta-trained on so many tasks."""
    where = variant.coordinates
    name = f"layer {where['layer']} {where['modules']} after {num_tasks}"
    line = f"{where['modules']}, {num_tasks} tasks"
    return replace(variant, name=name, num_tasks=num_tasks, coordinates={**where, "tasks": num_tasks, "line": line})


def _write(results: Results) -> str:
    columns: Sequence[str] = ["tasks", "layer", "modules"]
    return write_figure(results, "layer", "line", "layers by successive halving", "layer", columns)
