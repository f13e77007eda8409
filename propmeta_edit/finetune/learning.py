"""Whether facts were learnt, as far as the losses tell that an inner loop computes anyway."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from propmeta_edit.records import EditRequest

LOG = logging.getLogger(__name__)
NOT_LEARNT = math.log(2)  # nats: below it each next token of the answer has more than half of the probability, and so is said
REMEDY = (
    "raise the inner rate (--inner-lr of meta-train, lr in a YAML of MetaFT) or the number of steps; propmeta-edit choose-rate "
    "finds a rate on a handful of facts"
)


@dataclass(frozen=True)
class Learning:
    """How an inner loop went.

    Attributes:
        before: the target loss before the first update, in nats a token (an answer where the settings sum).
        last: the same before the last update: what the loop last saw.
        num_steps: K.
    """

    before: float
    last: float
    num_steps: int

    @property
    def is_learnt(self) -> bool:
        return is_learnt(self.last)

    def __str__(self) -> str:
        return f"target loss {self.before:.2f} before, {self.last:.2f} at the last of {self.num_steps} steps"


def is_learnt(target_loss: float) -> bool:
    """Whether a model with this loss says the fact; one that is no number tells of no fact learnt."""
    return target_loss < NOT_LEARNT


def read_learning(losses: Sequence[torch.Tensor], num_steps: int) -> list[Learning]:
    """How each of N edits went; of an edit in several batches the one that was learnt worst.

    Waits for the device.

    Args:
        losses: what ``apply_inner_loop`` returned, [N] each.
        num_steps: K; with fewer than two nothing is seen after an update, and nothing can be said.
    """
    if num_steps < 2:
        return []
    by_step = torch.stack(list(losses)).view(num_steps, -1, losses[0].numel())[:: num_steps - 1].transpose(1, 2).tolist()
    worst = [max(zip(*pair, strict=True), key=lambda both: both[1]) for pair in zip(*by_step, strict=True)]
    return [Learning(before, last, num_steps) for before, last in worst]


def mean_learning(found: Sequence[Learning]) -> Learning:
    """One for several edits, at least one."""
    return Learning(fmean(one.before for one in found), fmean(one.last for one in found), found[0].num_steps)


def warn_of_unlearnt(edits: Sequence[Sequence[EditRequest]], found: Sequence[Learning]) -> None:
    """Tell of edits whose facts were not learnt, and what can be done.

    Args:
        found: of each edit; empty where nothing can be said.
    """
    if all(one.is_learnt for one in found):
        return
    failed = [(requests[0], one) for requests, one in zip(edits, found, strict=True) if not one.is_learnt]
    request, learning = failed[0]
    LOG.warning(
        "%s not learnt (%s -> %s: %s); %s",
        "this edit was" if len(found) == 1 else f"{len(failed)} of {len(found)} edits were",
        request.prompt,
        request.target_new,
        learning,
        REMEDY,
    )
