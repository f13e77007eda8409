"""An inner rate that writes facts, from a handful of them: each tried at every rate, nothing trained and nothing kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from propmeta_edit.edits.compute import choose_at_once
from propmeta_edit.errors import ConfigError
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.learning import Learning, mean_learning, read_learning
from propmeta_edit.finetune.many_edits import learnt_edits
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.models.devices import device_of, free_memory
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.models.loading import load_model
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.recipes.meta_training import load_tasks, resolve
from propmeta_edit.records import EditRequest


@dataclass(frozen=True)
class RateTrial:
    """What one inner rate did.

    Attributes:
        found: how each fact went.
    """

    rate: float
    found: list[Learning]

    @property
    def num_learnt(self) -> int:
        return sum(one.is_learnt for one in self.found)


def try_rates(config: MetaTrainConfig, rates: Sequence[float], num_facts: int) -> list[RateTrial]:
    """Write the facts of a run's first tasks, each alone, at every rate, the lowest first.

    Raises:
        ConfigError: fewer than two steps, after which nothing is seen; a model or data that cannot be used.
    """
    if config.num_inner_steps < 2:
        raise ConfigError(f"choosing a rate needs num_inner_steps of 2 or more, got {config.num_inner_steps}")
    config = resolve(replace(config, validate_every=None, facts_per_task=1))
    facts = [[task.target] for task in load_tasks(config)[0][:num_facts]]
    where: dict[str, Any] = {"layers": config.layers, "modules": config.modules, "rank": config.rank}
    model, tokenizer = load_model(config.model, device=config.device, dtype=config.dtype, **where)
    trials = (replace(config.edit, inner_lr=rate) for rate in sorted(rates))
    return [RateTrial(settings.inner_lr, _write_each(model, tokenizer, facts, settings)) for settings in trials]


def _write_each(
    model: LanguageModel, tokenizer: Tokenizer, facts: Sequence[Sequence[EditRequest]], settings: EditSettings
) -> list[Learning]:
    parameters = select_parameters(model, settings.layers, settings.modules)
    at_once = choose_at_once(parameters, settings, free_memory(device_of(parameters)))
    found: list[Learning] = []
    for start in range(0, len(facts), at_once):
        with learnt_edits(model, tokenizer, facts[start : start + at_once], settings) as (_, losses):
            found += read_learning(losses, settings.num_inner_steps)
    return found


def choose(trials: Sequence[RateTrial]) -> RateTrial | None:
    """The lowest rate at which every fact is learnt, since a higher one moves more than it has to."""
    return next((trial for trial in trials if trial.num_learnt == len(trial.found)), None)


def describe_trials(trials: Sequence[RateTrial]) -> str:
    """A line a rate: how many facts it writes, and the mean losses."""
    lines = [f"{'inner rate':<12}{'learnt':<10}target loss, nats a token"]
    for trial in trials:
        mean = mean_learning(trial.found)
        share = f"{trial.num_learnt} of {len(trial.found)}"
        lines.append(f"{trial.rate:<12g}{share:<10}{mean.before:.2f} before, {mean.last:.2f} at the last of {mean.num_steps} steps")
    return "\n".join(lines)
