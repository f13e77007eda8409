"""The process-wide state that importing EasyEdit changes: random generators and the root logger."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def global_state_restored() -> Iterator[None]:
    """Put the random states of python, numpy and torch, and the root logger's handlers and level, back on exit."""
    import numpy
    import torch

    python_state, numpy_state, torch_state = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
        else:
            # A seed given before CUDA starts is kept for its start; the seed in force before is put in the place of EasyEdit's.
            torch.cuda.manual_seed_all(torch.initial_seed())
        root.handlers[:] = handlers
        root.setLevel(level)
