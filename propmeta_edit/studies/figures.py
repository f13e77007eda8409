"""Figures 2, 3 and 4: accuracy against the layer, the number of meta-training tasks, and the depth of the layer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from propmeta_edit.errors import ConfigError
from propmeta_edit.models.layers import MODULE_CHOICES
from propmeta_edit.models.loading import read_model_config
from propmeta_edit.options import Names, Numbers, WholeNumbers, require_among
from propmeta_edit.studies.engine import StudyOptions
from propmeta_edit.studies.pictures import require_styles, write_figure
from propmeta_edit.studies.sweeps import SweepOptions, read_configs, run_sweep
from propmeta_edit.studies.variants import Variant

OOD, BOTH = ("valid-ood",), ("valid-id", "valid-ood")
ALL_MODULES, DEPTHS = Names(MODULE_CHOICES), Numbers((0.1, 0.2, 0.3, 0.5))


def figure2(options: StudyOptions, sweep: SweepOptions, layers: WholeNumbers, module_choices: Names = ALL_MODULES) -> int:
    """Figure 2: one layer at a time, attention, MLP or both; accuracy against the layer.

    Args:
        layers: 0-based, e.g. 2,5,8,11,14.
        module_choices: of attention, mlp, attention+mlp.
    """
    require_among("module-choices", module_choices, MODULE_CHOICES)
    configs = read_configs(options, sweep, OOD)
    variants = [
        Variant(
            f"{model} layer {layer} {modules}",
            training=replace(config, layers=[layer], modules=modules),
            coordinates={"series": f"{model} {modules}", "layer": layer},
        )
        for model, config in configs.items()
        for modules in module_choices
        for layer in layers
    ]
    require_styles([f"{model} {modules}" for model in configs for modules in module_choices])
    write = partial(
        write_figure, x="layer", line="series", title="one layer at a time", xlabel="layer", columns=["series", "layer"]
    )
    return run_sweep("figure2", configs, variants, write, options, sweep, OOD, series="series")


def figure3(options: StudyOptions, sweep: SweepOptions, every: int) -> int:
    """Figure 3: accuracy against meta-training tasks, from the checkpoints of one run a model.

    Args:
        every: tasks between two points; must divide the number of tasks.
    """
    configs, variants = read_configs(options, sweep, BOTH), []
    for model, config in configs.items():
        if every < 1 or config.num_tasks is None or config.num_tasks % every:
            raise ConfigError(f"--every must divide --num-tasks, got {every} and {config.num_tasks}")
        if every % config.tasks_per_step:
            raise ConfigError(f"--every must be a multiple of the {config.tasks_per_step} tasks of a step, got {every}")
        training = replace(config, checkpoint_every=every)
        variants += [
            Variant(f"{model} after {n}", training=training, num_tasks=n, coordinates={"model": model, "tasks": n})
            for n in range(0, config.num_tasks + 1, every)
        ]
    require_styles(list(configs))
    write = partial(write_figure, x="tasks", line="model", title="meta-training", xlabel="tasks", columns=["model", "tasks"])
    return run_sweep("figure3", configs, variants, write, options, sweep, BOTH)


def figure4(options: StudyOptions, sweep: SweepOptions, depths: Numbers = DEPTHS) -> int:
    """Figure 4: accuracy against the trained layer as a share of the depth, for several models.

    Args:
        depths: of the layers, as shares of the depth.
    """
    wrong = [depth for depth in depths if not 0 <= depth <= 1]
    if wrong or not depths:
        raise ConfigError(f"--depths must be shares from 0 to 1, got {wrong[0] if wrong else 'none'}")
    configs, variants = read_configs(options, sweep, OOD), []
    for model, config in configs.items():
        number = read_model_config(config.model).num_hidden_layers
        for layer in sorted({min(number - 1, round(depth * number)) for depth in depths}):
            where = {"model": model, "layer": layer, "depth": layer / number}
            variants.append(
                Variant(f"{model} layer {layer} of {number}", training=replace(config, layers=[layer]), coordinates=where)
            )
    require_styles(list(configs))
    label = "layer, as a share of the depth"
    write = partial(write_figure, x="depth", line="model", title="one layer", xlabel=label, columns=["model", "layer"])
    return run_sweep("figure4", configs, variants, write, options, sweep, OOD, series="model")
