"""Which layer to meta-train, chosen on validation by successive halving: the test splits are never read.

Every candidate is meta-trained on a few tasks; the better half goes on to twice as many, from where it stopped, until one is left.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from propmeta_edit.errors import ConfigError
from propmeta_edit.files import save_figure, sha256_of_json, write_text_atomically
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.run import TrainingRun
from propmeta_edit.metatrain.trainer import meta_train
from propmeta_edit.models.artefacts import resolve_model_folder
from propmeta_edit.models.loading import load_model, model_sha256
from propmeta_edit.recipes.meta_training import (
    compute_edited_accuracy,
    hash_of_tasks,
    load_tasks,
    logged_to,
    resolve,
    stopped_by_sigterm,
)

RESULTS, PICTURE = "results.json", "layers.png"


@dataclass(frozen=True)
class Score:
    """A candidate after ``num_tasks`` tasks: ``accuracy`` is the mean over the validation splits, ``splits`` each of them."""

    layer: int
    modules: str
    num_tasks: int
    accuracy: float
    splits: dict[str, float]

    @property
    def candidate(self) -> tuple[int, str]:
        return self.layer, self.modules


def choose_layer(
    config: MetaTrainConfig, layers: Sequence[int], modules: Sequence[str], first_tasks: int, folder: Path
) -> list[Score]:
    """Run the halving in ``folder`` and draw it; a stopped one continues there.

    Args:
        config: of the meta-training; its ``layers``, ``modules`` and ``num_tasks`` are set here. The outer rate is held constant,
            since a schedule that ends with the run would favour short ones.
        layers, modules: every combination is a candidate.
        first_tasks: of each candidate in the first round, at least one outer step.

    Returns:
        All scores, round by round; the last one is the choice.

    Raises:
        ConfigError: no candidates, settings with which nothing can be told apart, or a folder that holds a search with others.
    """
    candidates = [(layer, choice) for layer in layers for choice in modules]
    if not candidates or first_tasks < config.tasks_per_step:
        raise ConfigError(
            f"choosing needs candidates and at least one outer step ({config.tasks_per_step} tasks) of each, got layers "
            f"{list(layers)}, modules {list(modules)} and {first_tasks} tasks"
        )
    config = resolve(replace(config, outer_schedule="constant", validate_every=config.validate_every or first_tasks))
    last_tasks = first_tasks * 2 ** (len(candidates).bit_length() - 1)
    load_tasks(replace(config, num_tasks=last_tasks))  # raises now rather than rounds later if they are too few
    identity = {**_identify(config), "first_tasks": first_tasks}
    scores: list[Score] = []
    num_tasks = first_tasks
    while candidates:
        this_round = [_score(config, identity, candidate, num_tasks, folder) for candidate in candidates]
        scores += this_round
        _write(scores, folder)
        ranked = sorted(this_round, key=lambda score: score.accuracy, reverse=True)
        candidates = [score.candidate for score in ranked[: len(ranked) // 2]] if len(ranked) > 1 else []
        num_tasks *= 2
    return scores


def _identify(config: MetaTrainConfig) -> dict[str, Any]:
    """What a search is about, but for the candidate: its settings, its model, and all tasks and validation cases of its data."""
    tasks, validation = load_tasks(replace(config, num_tasks=None))
    # How far a candidate has got, when it is saved and where it is computed do not decide its results up to there.
    left_out = ("layers", "modules", "num_tasks", "save_every", "validate_every")
    return {
        **{key: value for key, value in config.decisive.items() if key not in left_out},
        "base_sha256": model_sha256(resolve_model_folder(config.model)),
        "tasks_sha256": hash_of_tasks(tasks),
        "validation_sha256": sha256_of_json({name: [asdict(case) for case in cases] for name, cases in validation.items()}),
    }


def _score(config: MetaTrainConfig, identity: Mapping[str, Any], candidate: tuple[int, str], num_tasks: int, folder: Path) -> Score:
    """Meta-train a candidate up to ``num_tasks``, going on from where it is, and validate; what is on disk is not done again.

    Raises:
        ConfigError: what is on disk is of another ``identity``.
    """
    layer, modules = candidate
    own = folder / f"layer-{layer:02d}-{modules}"
    run = TrainingRun(own, {**identity, "layers": [layer], "modules": modules}, config.rounding)
    result = own / f"tasks-{num_tasks}.json"
    if result.is_file():
        return Score(**json.loads(result.read_text(encoding="utf-8")))
    config = replace(config, layers=[layer], modules=modules, num_tasks=num_tasks)
    tasks, validation = load_tasks(config)
    with logged_to(own / "log.txt"), stopped_by_sigterm() as should_stop:
        model, tokenizer = load_model(config.model, device=config.device, dtype=config.dtype, layers=[layer], modules=modules)
        meta_train(model, tokenizer, tasks, replace(config, validate_every=None), run, should_stop=should_stop)
        splits = compute_edited_accuracy(model, tokenizer, config.edit, validation)
    score = Score(layer, modules, num_tasks, sum(splits.values()) / len(splits), splits)
    write_text_atomically(result, json.dumps(asdict(score)) + "\n")
    return score


def _write(scores: Sequence[Score], folder: Path) -> None:
    write_text_atomically(folder / RESULTS, json.dumps([asdict(score) for score in scores], indent=1) + "\n")
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes: Any = figure.subplots()
    rounds = sorted({score.num_tasks for score in scores})
    markers = dict(zip(dict.fromkeys(score.modules for score in scores), "osD", strict=False))
    for number, num_tasks in enumerate(rounds):
        shade = str(0.75 * (1 - (number + 1) / len(rounds)))
        for modules, marker in markers.items():
            own = sorted((s for s in scores if (s.num_tasks, s.modules) == (num_tasks, modules)), key=lambda s: s.layer)
            if own:
                line = "-" if len(own) > 1 else ""
                label = f"{modules}, {num_tasks} tasks"
                axes.plot([s.layer for s in own], [100 * s.accuracy for s in own], line, marker=marker, color=shade, label=label)
    axes.set(xlabel="layer", ylabel="validation accuracy after an edit, %")
    axes.legend(fontsize="small")
    save_figure(figure, folder / PICTURE)
