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
from propmeta_edit.options import Names, WholeNumbers, require_among
from propmeta_edit.recipes.splits import hold_out, load_splits
from propmeta_edit.studies.choice import choose
from propmeta_edit.studies.engine import Results, Study, StudyOptions, run_study
from propmeta_edit.studies.pictures import require_styles, write_figure
from propmeta_edit.studies.runs import read_tasks
from propmeta_edit.studies.variants import Bench, Variant

BOTH = Names(("attention+mlp",))
DATASETS = Names(("valid-id", "valid-ood"))


def choose_layer(
    config: MetaTrainConfig,
    candidates: WholeNumbers,
    output: str,
    module_choices: Names = BOTH,
    first_tasks: int = 80,
    datasets: Names = DATASETS,
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
    num_rounds = len(pairs).bit_length()
    last_tasks, there = first_tasks * 2 ** (num_rounds - 1), read_tasks(config)[0]
    if there < last_tasks:  # now rather than rounds later
        raise ConfigError(f"{len(pairs)} candidates need {last_tasks} tasks in the end, but the data has {there}; begin with fewer")
    splits = load_splits(datasets, {config.model: config}, config.seed)
    options = StudyOptions(output=output, limit=config.validation_cases, device=config.device, seed=config.seed)
    folder = Path(output)
    bench = Bench("", "", options.resolved_device, config.dtype, config.seed, folder=folder)
    require_styles([f"{modules}, round {number}" for number in range(num_rounds) for modules in module_choices])
    variants: list[Variant] = []
    names = [split.data.name for split in splits]
    for number in range(num_rounds):
        this_round = [_make_variant(config, layer, modules, first_tasks * 2**number) for layer, modules in pairs]
        variants += this_round
        failures = run_study(Study("layers", variants, splits, bench, _write), options)
        choice = choose([variant.name for variant in this_round], names, read_rows(folder / "rows.jsonl"))
        if choice.best is None:
            raise ConfigError(f"nothing can be chosen: {choice.note or 'no case was asked'} ({failures} cases failed)")
        by_name = {variant.name: variant for variant in this_round}
        ranked = [by_name[name] for name in choice.ranking]
        pairs = [(v.coordinates["layer"], v.coordinates["modules"]) for v in ranked[: max(1, len(ranked) // 2)]]
        if len(this_round) == 1:
            break
    best = ranked[0]
    print(
        f"chosen: layers: [{best.coordinates['layer']}], modules: {best.coordinates['modules']}; picture: {folder / 'layers.png'}"
    )
    return 0


def _make_variant(config: MetaTrainConfig, layer: int, modules: str, num_tasks: int) -> Variant:
    where = {"layer": layer, "modules": modules, "tasks": num_tasks, "line": f"{modules}, {num_tasks} tasks"}
    training = replace(config, layers=[layer], modules=modules)
    name = f"layer {layer} {modules} after {num_tasks}"
    return Variant(name, training=training, num_tasks=num_tasks, stops_there=True, coordinates=where)


def _write(results: Results) -> str:
    columns: Sequence[str] = ["tasks", "layer", "modules"]
    return write_figure(results, "layer", "line", "layers by successive halving", "layer", columns)
