"""The outer loop over all tasks: one pass, progress shown, losses recorded."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from propmeta_edit.errors import ModelError
from propmeta_edit.finetune.weights import only_trainable
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.fomaml import TaskGradients, apply_outer_step, compute_task_gradients
from propmeta_edit.models.layers import num_parameters, select_parameters
from propmeta_edit.records import MetaTask
from propmeta_edit.text.encoding import encode_questions, encode_requests

LOG = logging.getLogger(__name__)
SMOOTHING = 0.98  # of the losses on the progress bar


@dataclass(frozen=True)
class TaskLosses:
    """What one task showed: the target loss before the last inner update, and the related loss at θ_τ, in nats a token."""

    task_id: str
    target_loss: float | None
    related_loss: float


def order_tasks(tasks: Sequence[MetaTask], seed: int, num_tasks: int | None) -> list[MetaTask]:
    """Shuffle once with a fixed seed and take the first ``num_tasks``; each is used once."""
    shuffled = random.Random(seed).sample(list(tasks), len(tasks))
    if num_tasks is not None and num_tasks > len(shuffled):
        raise ModelError(f"num_tasks is {num_tasks}, but the data has {len(shuffled)} tasks; lower it or generate more")
    return shuffled[:num_tasks]


def meta_train(model: Any, tokenizer: Any, tasks: Sequence[MetaTask], config: MetaTrainConfig) -> list[TaskLosses]:
    """Meta-train ``model`` in place (Eq. 1-4): one pass over ``tasks`` in the order given.

    Everything outside the chosen layer and modules keeps its bits; flags and mode are as before on return.

    Raises:
        ModelError: a loss that is not finite (the task is named), or a layer outside the model.
    """
    parameters = select_parameters(model, config.layers, config.modules)
    LOG.info("training %d tensors, %.2f M numbers", len(parameters), num_parameters(parameters) / 1e6)
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=config.outer_lr, weight_decay=config.weight_decay)
    history: list[TaskLosses] = []
    bar = tqdm(total=len(tasks), desc="meta-training", unit="task", smoothing=0.05)
    with only_trainable(model, parameters), bar:
        for start in range(0, len(tasks), config.tasks_per_step):
            step_tasks = tasks[start : start + config.tasks_per_step]
            gradients = _task_gradients(model, tokenizer, parameters, step_tasks, config)
            apply_outer_step(optimizer, parameters, [gradients])
            history += _read_losses(step_tasks, gradients)
            bar.set_postfix(_smoothed(history))
            bar.update(len(step_tasks))
    return history


def _task_gradients(
    model: Any, tokenizer: Any, parameters: Mapping[str, nn.Parameter], tasks: Sequence[MetaTask], config: MetaTrainConfig
) -> TaskGradients:
    target = [batch.to(model.device) for batch in encode_requests(tokenizer, [[task.target] for task in tasks])]
    related = encode_questions(tokenizer, [task.related for task in tasks], config.template).to(model.device)
    return compute_task_gradients(model, parameters, target, related, config.inner, len(tasks))


def _read_losses(tasks: Sequence[MetaTask], gradients: TaskGradients) -> list[TaskLosses]:
    related = gradients.related_losses.tolist()
    target = [None] * len(tasks) if gradients.target_losses is None else gradients.target_losses.tolist()
    for task, target_loss, related_loss in zip(tasks, target, related, strict=True):
        if not math.isfinite(related_loss) or not math.isfinite(target_loss or 0.0):
            raise ModelError(
                f"task {task.task_id} ({task.target.prompt!r} -> {task.target.target_new!r}) gave target loss {target_loss} and "
                f"related loss {related_loss}; lower inner_lr or outer_lr, and keep the trained tensors in fp32"
            )
    return [TaskLosses(task.task_id, *losses) for task, *losses in zip(tasks, target, related, strict=True)]


def _smoothed(history: Sequence[TaskLosses]) -> dict[str, str]:
    """Recent losses, later tasks weighing more."""
    recent = list(history[-200:])
    weights = [SMOOTHING**age for age in range(len(recent))][::-1]
    shown = {"related": sum(w * h.related_loss for w, h in zip(weights, recent, strict=True)) / sum(weights)}
    if recent[-1].target_loss is not None:
        shown["target"] = sum(w * (h.target_loss or 0.0) for w, h in zip(weights, recent, strict=True)) / sum(weights)
    return {name: f"{value:.3f}" for name, value in shown.items()}


def history_as_rows(history: Sequence[TaskLosses]) -> list[dict[str, Any]]:
    """The losses as plain rows, for a table on disk."""
    return [asdict(losses) for losses in history]
