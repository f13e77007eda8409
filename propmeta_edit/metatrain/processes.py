"""The processes that share one run: started by ``torchrun`` or ``accelerate launch`` on one machine or several; one without either.

Each computes the gradients of its own tasks; sums are taken over all of them, so every process makes the same outer step.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Processes:
    """Which of how many this one is.

    Attributes:
        rank: 0 for the one that writes files.
        count: of all processes.
        device: where this one computes; None for wherever the settings say.
    """

    rank: int = 0
    count: int = 1
    device: str | None = None

    @property
    def is_main(self) -> bool:
        """Whether this one writes files."""
        return self.rank == 0

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in place."""
        if self.count > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def join(self, own: Sequence[Any]) -> list[Any]:
        """The items of all processes, by rank; they must pickle."""
        if self.count == 1:
            return list(own)
        parts: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(parts, list(own))
        return [item for part in parts for item in part]

    def any_says(self, own: bool) -> bool:
        """Whether any of them says so."""
        return any(self.join([own]))

    def wait(self) -> None:
        """Until all have got here."""
        if self.count > 1:
            torch.distributed.barrier()


ALONE = Processes()


def find_processes(device: str = "auto") -> Processes:
    """The processes this one was started with; the group that joins them is set up on first use.

    Args:
        device: the run's setting; ``cpu`` joins them over gloo even where there are GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    return Processes(state.process_index, state.num_processes, str(state.device))


def own_gpus() -> list[int]:
    """The numbers of the GPUs that are this process's: all of the machine's, or an equal share if a launcher started several
    processes on it; first the one where the process computes."""
    number, others = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    whole_shares = torch.cuda.device_count() // others * others
    return list(range(number, whole_shares, others))
