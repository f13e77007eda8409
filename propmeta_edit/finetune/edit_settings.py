"""What an edit is made with: which tensors the inner loop moves, and how. Meta-training, editing and evaluation share it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from propmeta_edit.errors import ConfigError

INNER_STEPS = ("adamw", "whitened")
POSITIONS = ("all", "subject")


@dataclass(frozen=True)
class EditSettings:
    """Settings of Eq. 2.

    Args:
        layers: 0-based layers to edit, ``all``, or None for a quarter of the depth.
        modules: attention, mlp, or attention+mlp.
        inner_lr: α. The paper's 2e-5 is for models of 1B to 8B; smaller models need more.
        num_inner_steps: K, passes over the target facts; always exactly K, no early stop.
        inner_step: adamw, the paper's, or whitened (``finetune.inner_steps``).
        weight_decay, beta1, beta2, eps: AdamW's, torch's defaults.
        damping: λ of the whitened step.
        positions: the tokens whose gradients an inner step takes: all, the paper's, or the subject's alone, so that what is written
            is found where the subject is read (``finetune.writes``).
        loss_reduction: over answer tokens, ``mean`` or ``sum``.
        batch_size: target facts of one edit in one update.
        tf32: products of fp32 matrices on CUDA round their inputs to TF32; off unless asked, whatever torch is set to outside.

    Raises:
        ConfigError: a value that the loop cannot use.
    """

    layers: Sequence[int] | str | None = None
    modules: str = "attention+mlp"
    inner_lr: float = 2e-5
    num_inner_steps: int = 10
    inner_step: str = "adamw"
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    damping: float = 0.03
    positions: str = "all"
    loss_reduction: str = "mean"
    batch_size: int = 1
    tf32: bool = False

    def __post_init__(self) -> None:
        if self.inner_lr < 0:
            raise ConfigError(f"the inner learning rate must be 0 or more, got {self.inner_lr}")
        if self.num_inner_steps < 0:
            raise ConfigError(f"the number of inner steps must be 0 or more, got {self.num_inner_steps}")
        if self.inner_step not in INNER_STEPS:
            raise ConfigError(f"inner_step must be {' or '.join(INNER_STEPS)}, got {self.inner_step!r}")
        if self.damping <= 0:
            raise ConfigError(f"damping must be above 0, got {self.damping}")
        if self.positions not in POSITIONS:
            raise ConfigError(f"positions must be {' or '.join(POSITIONS)}, got {self.positions!r}")
        if self.loss_reduction not in ("mean", "sum"):
            raise ConfigError(f"loss_reduction must be mean or sum, got {self.loss_reduction!r}")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be 1 or more, got {self.batch_size}")

    @property
    def is_low_rank(self) -> bool:
        """Whether an edit is factors from the start (``finetune.low_rank``), and no copy of a matrix."""
        return self.inner_step == "whitened"

    def to_dict(self) -> dict[str, Any]:
        """Plain values of all that decides an edit of one fact, which ``batch_size`` does not: what saved edits and rows say.

        Those of the whitened step are left out where the step is the paper's, and so are ``positions`` and TF32 where they are.
        """
        left_out = {"batch_size", *(("inner_step", "damping") if self.inner_step == "adamw" else ())}
        left_out |= {"positions"} if self.positions == "all" else set()
        left_out |= set() if self.tf32 else {"tf32"}
        return {name: value for name, value in asdict(self).items() if name not in left_out}
