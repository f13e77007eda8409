"""Tensors that one run of the inner loop leaves to the next: the same memory for copies of θ and moments, task after task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_KEPT: ContextVar[dict[str, torch.Tensor] | None] = ContextVar("kept buffers", default=None)


@contextmanager
def kept_buffers(buffers: dict[str, torch.Tensor] | None) -> Iterator[None]:
    """Inside, ``buffer`` gives out tensors of ``buffers`` again, by role; one task at a time may be computed then.

    Args:
        buffers: filled and used; None for new tensors every time.
    """
    token = _KEPT.set(buffers)
    try:
        yield
    finally:
        _KEPT.reset(token)


def buffer(role: str, like: torch.Tensor, make: Callable[[torch.Tensor], torch.Tensor] = torch.empty_like) -> torch.Tensor:
    """A tensor of the shape, dtype and device of ``like``, with whatever numbers: the one that had this role before, if it fits.

    Args:
        role: what it is for, and nothing else at the same time.
        make: a new one, where none is kept.
    """
    kept = _KEPT.get()
    if kept is None:
        return make(like)
    found = kept.get(role)
    if found is None or (found.shape, found.dtype, found.device) != (like.shape, like.dtype, like.device):
        kept[role] = found = make(like)
    return found
