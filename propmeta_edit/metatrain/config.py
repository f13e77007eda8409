"""Settings of one meta-training run, as read from ``hparams/MetaTrain/*.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Any, ClassVar

from propmeta_edit.config import derive_settings
from propmeta_edit.errors import ConfigError
from propmeta_edit.finetune.edit_settings import EditSettings

PAIRINGS = ("matched", "shuffled")
OUTER_TERMS = ("related", "in-context", "locality", "efficacy", "bystander", "known")
SCHEDULES = ("constant", "linear")
NEWER = ("rank", "facts_per_task", "batch_size", "inner_step", "damping", "positions", "tf32")  # that there were not always
ELSEWHERE = ("device", "tracker", "save_minutes", "keep_buffers")  # settings on which no result depends
ROUNDING = ("tasks_at_once",)  # settings on which nothing but rounding depends


@dataclass(frozen=True)
class MetaTrainConfig:
    """One meta-training run; the defaults are the paper's settings.

    Args:
        model: the model to start from: a folder, a bundled name, or a hub id.
        data: a CRE train file (JSON Lines), a folder or ``hub:owner/name`` with CRE's files, or ``world`` for the facts that
            come with the package.
        layers: 0-based layers to train, ``all``, or null for a quarter of the depth.
        modules: attention, mlp, or attention+mlp.
        rank: of two factors that both loops move in place of each matrix (``models.factors``): the checkpoint is then a LoRA of
            a few megabytes on the untouched base; null for the matrices themselves, as in the paper.
        inner_lr: α of Eq. 2.
        num_inner_steps: K of Eq. 2.
        inner_step: adamw, the paper's, or whitened, which needs second moments of the model's inputs (``finetune.inner_steps``).
        damping: λ of the whitened step.
        positions: the tokens whose gradients an inner step takes: all, or the subject's alone (``finetune.writes``).
        outer_lr: β of Eq. 3.
        outer_schedule: constant, as in the paper, or linear: β falls to zero over the run's tasks.
        weight_decay: AdamW's, in both loops.
        tasks_per_step: tasks whose gradients are averaged into one outer step, of each process if there are several; 1 is the
            paper's algorithm.
        tasks_at_once: how many of them are computed side by side (each takes three times the trained tensors in fp32, and a
            gradient); null for all of a step.
        keep_buffers: let the tasks of a step be computed in the memory of the step before, which takes more at the peak, as moments
            stay while the outer gradient is taken; null for on a CPU alone. The bits are the same.
        pairing: matched, or shuffled for the control in which every target has another task's question.
        num_tasks: how many tasks to train on, each once; null for all there are.
        facts_per_task: how many facts of one kind a task's inner loop learns together, each asked by the outer loop; a list to
            draw from. 1 is the paper's.
        batch_size: facts of a task in one inner update.
        outer_terms: what the outer loss is the weighted sum of (``metatrain.outer_losses``): related (the paper's, alone),
            in-context, locality, efficacy, bystander, known.
        questions_per_task: related questions about a task's fact that its outer loss is averaged over; 1 in the paper.
        template: the prompt of the related question, qa (the evaluation prompt) or bare.
        loss_reduction: over answer tokens, mean or sum.
        question_choice: seeded for one related question an instance, all for every pair.
        dtype: of the frozen rest of the model while training: float32, bfloat16, float16, auto for bfloat16 on CUDA (for one GPU
            of 24 GB) and float32 elsewhere, or fast for bfloat16 wherever the device has it in hardware. The trained tensors are
            fp32 always.
        tf32: products of fp32 matrices on CUDA round their inputs to TF32, 10 bits of 23; off unless asked.
        device: auto, cpu, mps, cuda or cuda:N.
        shard: spread the model's blocks over the GPUs of a process (transformers' device_map), where it does not fit on one;
            several processes of torchrun share the machine's GPUs out.
        tracker: one of accelerate's (tensorboard, wandb, ...) that gets losses and validation as they come; null for none.
        seed: of the task order and the choice of questions.
        save_every: tasks between two saves of the state that a killed run continues from; null to save by minutes alone.
        save_minutes: minutes after which it is saved at the latest, whatever the number of tasks; null for none.
        validate_every: tasks between two validations (accuracy, leak and net after an edit), which happen before the first task
            and after the last too; null for none.
        validation_cases: how many cases of each validation split; null for all there are.
        checkpoint_every: tasks between two kept copies of the trained tensors; null for none.
    """

    RETIRED: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"compile": "blocks in torch.compile took 1.05 to 1.19 times as long on a CPU (docs/speed.md)"}
    )

    model: str
    data: str = "world"
    layers: list[int] | str | None = None
    modules: str = "attention+mlp"
    rank: int | None = None
    inner_lr: float = 2e-5
    num_inner_steps: int = 10
    inner_step: str = "adamw"
    damping: float = 0.03
    positions: str = "all"
    outer_lr: float = 1e-5
    outer_schedule: str = "constant"
    weight_decay: float = 0.01
    tasks_per_step: int = 1
    tasks_at_once: int | None = None
    keep_buffers: bool | None = None
    pairing: str = "matched"
    num_tasks: int | None = None
    facts_per_task: int | list[int] = 1
    batch_size: int = 1
    outer_terms: dict[str, float] = field(default_factory=lambda: {"related": 1.0})
    questions_per_task: int = 1
    template: str = "qa"
    loss_reduction: str = "mean"
    question_choice: str = "seeded"
    dtype: str = "auto"
    tf32: bool = False
    device: str = "auto"
    shard: bool = False
    tracker: str | None = None
    seed: int = 0
    save_every: int | None = 100
    save_minutes: float | None = 10.0
    validate_every: int | None = None
    validation_cases: int | None = 100
    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        if self.outer_lr < 0:
            raise ConfigError(f"outer_lr must be 0 or more, got {self.outer_lr}")
        for name in ("tasks_per_step", "questions_per_task"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("rank", "tasks_at_once", "num_tasks", "save_every", "validate_every", "validation_cases", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be 1 or more, or null, got {value}")
        if self.save_minutes is not None and not self.save_minutes > 0:
            raise ConfigError(f"save_minutes must be above 0, or null, got {self.save_minutes}")
        for name, allowed in (("pairing", PAIRINGS), ("outer_schedule", SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be {' or '.join(allowed)}, got {getattr(self, name)!r}")
        if not self.sizes or min(self.sizes) < 1:
            raise ConfigError(f"facts_per_task must be 1 or more, or a list of such numbers, got {self.facts_per_task}")
        if self.has_groups and self.pairing != "matched":
            raise ConfigError("tasks of several facts, and those with a bystander, have no pairing but matched")
        if self.rank is not None and (self.shard or self.inner_step == "whitened"):
            raise ConfigError("rank cannot be combined with shard, nor with the whitened step; leave it out, or the other")
        unknown = sorted(set(self.outer_terms) - set(OUTER_TERMS))
        if unknown or not self.outer_terms:
            raise ConfigError(f"outer_terms must be weights of {', '.join(OUTER_TERMS)}, got {unknown or self.outer_terms}")
        _ = self.edit  # refuses values the loop would refuse

    @property
    def sizes(self) -> list[int]:
        """The numbers of facts that a task may have."""
        return [self.facts_per_task] if isinstance(self.facts_per_task, int) else self.facts_per_task

    @property
    def has_groups(self) -> bool:
        """Whether tasks are found by their kind: they have several facts, or a bystander."""
        return self.sizes != [1] or "bystander" in self.outer_terms

    @property
    def rounding(self) -> dict[str, Any]:
        """Those of ``ROUNDING``: a run may be continued with others."""
        return {name: getattr(self, name) for name in ROUNDING}

    @property
    def decisive(self) -> dict[str, Any]:
        """The settings on which a run's result depends: all but those of ``ELSEWHERE`` and ``ROUNDING``.

        Those of ``NEWER`` are left out where they are the paper's, so that runs of before keep their names and can go on.
        """
        usual = {one.name: one.default for one in fields(self) if one.name in NEWER}
        kept = {name: value for name, value in asdict(self).items() if name not in (*ELSEWHERE, *ROUNDING)}
        return {name: value for name, value in kept.items() if name not in usual or value != usual[name]}

    @property
    def edit(self) -> EditSettings:
        """What the inner loop is run with here, and an edit of the result with the same settings."""
        return derive_settings(EditSettings, self)
