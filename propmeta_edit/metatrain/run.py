"""The folder of a meta-training run while it goes on: what a killed run continues from, checkpoints on a schedule, curve and log.

```
settings.json                what the run was started with; another start with other settings is refused
state.safetensors            trained tensors, outer optimiser, progress; the one before it is kept beside it
checkpoints/tasks-000500.safetensors   the trained tensors alone, on the schedule
learning_curve.png log.txt
```
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from propmeta_edit.errors import ModelError
from propmeta_edit.files import write_json_atomically
from propmeta_edit.finetune.saved_state import load_state, read_tensors_with_text, tensors_of, write_state, write_tensors
from propmeta_edit.store import differences, require_made_from

LOG = logging.getLogger(__name__)
SETTINGS = "settings.json"
_KEPT = re.compile(r"tasks-(\d+)\.safetensors")


@dataclass(frozen=True)
class TaskLosses:
    """What one task showed: the target loss before the last inner update, and the related loss at θ_τ, in nats a token."""

    task_id: str
    target_loss: float | None
    related_loss: float


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        losses: one entry a finished task, in their order.
        validation: what validation gave, each with ``num_tasks``, the tasks finished before it.
        seconds: spent on the outer steps, validation and saving apart; it says nothing about the bits, so it is not compared.
    """

    losses: list[TaskLosses] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    seconds: float = field(default=0.0, compare=False)

    def copy(self) -> Progress:
        """As it stands, whatever is added to this one later."""
        return replace(self, losses=list(self.losses), validation=list(self.validation))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=0)

    @classmethod
    def from_json(cls, text: str) -> Progress:
        values = json.loads(text)
        return cls([TaskLosses(**row) for row in values["losses"]], values["validation"], values["seconds"])


class TrainingRun:
    """A run's folder. It becomes this run's with ``claim``: a run that cannot begin must not keep the folder from the next one.

    Args:
        folder: created when it is claimed.
        settings: everything that decides the run's results, as plain JSON values.
        rounding: settings on which nothing but rounding depends; a run may be continued with others, which is logged then.
        is_writer: False for those processes of a run that only read it.

    Raises:
        OriginError: the folder belongs to a run that was made from something else.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], rounding: Mapping[str, Any] | None = None, is_writer: bool = True
    ) -> None:
        self.folder = folder
        self._rounded_otherwise: list[str] = []
        self._claimed = {**settings, **(rounding or {})} if is_writer else None
        path = folder / SETTINGS
        if not is_writer:
            return
        if path.is_file():
            started_with = json.loads(path.read_text(encoding="utf-8"))
            remedy = "continue it with those, choose another output, or remove that folder"
            require_made_from(settings, started_with, folder, "holds a run", remedy)
            self._rounded_otherwise = differences(started_with, rounding or {})

    def claim(self) -> None:
        """Say in the folder whose it is, once everything was checked."""
        if self._claimed is not None:
            write_json_atomically(self.folder / SETTINGS, self._claimed)

    def save(self, state: Mapping[str, torch.Tensor], progress: Progress) -> None:
        """Write the state; until the new one is whole the old one stays.

        Args:
            state: what ``saved_state.take_state`` gave.

        Raises:
            ModelError: it cannot be written, for instance because the disk is full.
        """
        write_state(self.folder, state, progress.to_json())

    def load(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Progress:
        """Put the last good state into ``parameters`` and ``optimizer``; a fresh start where there is none.

        Raises:
            ModelError: a state of other tensors, or of another version.
        """
        text = load_state(self.folder, parameters, optimizer)
        if text is None:
            return Progress()
        try:
            progress = Progress.from_json(text)
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"the state in {self.folder} is of another version ({error!r}); remove that folder") from error
        LOG.info("continuing after %d tasks", len(progress.losses))
        if self._rounded_otherwise:
            LOG.warning("rounding differs from here on, with %s", "; ".join(self._rounded_otherwise))
        return progress

    def write_checkpoint(self, state: Mapping[str, torch.Tensor], num_tasks: int) -> None:
        """The trained tensors of a state, which is that after ``num_tasks`` tasks.

        Raises:
            ModelError: they cannot be written.
        """
        write_tensors(kept_state(self.folder, num_tasks), tensors_of(state))


@contextmanager
def unclaimed_removed(folder: Path) -> Iterator[None]:
    """Inside, a run is begun in ``folder``; if it fails before it claims the folder, one that was not there before goes again."""
    was_there = folder.exists()
    try:
        yield
    except BaseException:
        if not was_there and not (folder / SETTINGS).is_file():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def kept_state(folder: Path, num_tasks: int) -> Path:
    """Where the run in ``folder`` keeps its trained tensors as they were after ``num_tasks`` tasks."""
    return folder / "checkpoints" / f"tasks-{num_tasks:06d}.safetensors"


def read_kept_state(file: Path) -> dict[str, torch.Tensor]:
    """The trained tensors that a run kept, by name.

    Raises:
        ModelError: the file cannot be read, or its contents are not those that were written.
    """
    try:
        return read_tensors_with_text(file)[0]
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read {file}: {error}") from error
    except ValueError as error:
        raise ModelError(f"{file} is damaged: {error}; meta-train again") from error


def find_kept_states(folder: str | Path) -> dict[int, Path]:
    """The states that a meta-training run kept (``checkpoint_every``), by number of tasks, the earliest first.

    Args:
        folder: a meta-tuned checkpoint, the folder of its run, or the folder of the files themselves.

    Raises:
        ModelError: no such file in any of these.
    """
    folder = Path(folder)
    for place in (folder / "training" / "checkpoints", folder / "checkpoints", folder):
        found = {int(match[1]): file for file in place.glob("tasks-*.safetensors") if (match := _KEPT.fullmatch(file.name))}
        if found:
            return dict(sorted(found.items()))
    raise ModelError(
        f"{folder} keeps no states of a meta-training run (tasks-000160.safetensors and so on, there or in training/checkpoints); "
        "meta-train with checkpoint_every"
    )
