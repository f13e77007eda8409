"""A model's body run on a batch, and other forward functions for some of its modules for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from propmeta_edit.text.encoding import EncodedBatch


def compute_hidden_states(model: Any, batch: EncodedBatch) -> torch.Tensor:
    """What the last norm gives, [B, T, hidden]: everything but the head."""
    hidden: torch.Tensor = model.base_model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask if batch.is_padded else None,
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state
    return hidden


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, each module computes what its function says; outside it is as it was, another library's hook included."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, own in before.items():
            if own is None:
                del module.forward  # the class's own shows again
            else:
                module.forward = own
