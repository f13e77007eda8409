"""A model's body run on a batch, and other forward functions for some of its modules for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from propmeta_edit.protocols import LanguageModel
from propmeta_edit.text.encoding import EncodedBatch


def compute_hidden_states(model: LanguageModel, batch: EncodedBatch) -> torch.Tensor:
    """What the last norm gives, [B, T, hidden]: everything but the head. The numbers are transformers' own, to the bit.

    Nothing here waits for the device, but for the masks of padded texts where layers look through a window.
    """
    hidden: torch.Tensor = model.base_model(
        input_ids=batch.input_ids,
        attention_mask=_make_mask(model, batch),
        position_ids=batch.position_ids,
        past_key_values=_NoCache(),
        use_cache=False,
    ).last_hidden_state
    return hidden


class _NoCache(DynamicCache):  # type: ignore[misc]
    """Keeps nothing. Given None, transformers reads from the device whether a row holds several texts."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states


def _make_mask(model: LanguageModel, batch: EncodedBatch) -> torch.Tensor | None:
    """Which token sees which, as transformers would make it: [B, 1, T, T]. From [B, T] it reads whether there is any padding.

    None for texts without padding, which attention kernels know how to do faster.
    """
    if not batch.is_padded:
        return None
    kind = model.config._attn_implementation
    if kind not in ("eager", "sdpa") or _has_windows(model.config):
        return batch.attention_mask
    length = batch.input_ids.shape[1]
    sees = torch.ones(length, length, dtype=torch.bool, device=batch.input_ids.device).tril()
    sees = sees & batch.attention_mask[:, None, None, :].bool()
    if kind == "sdpa":
        return sees
    dtype = model.get_input_embeddings().weight.dtype
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)


def _has_windows(config: Any) -> bool:
    """Whether any layer has a mask of its own."""
    kinds = getattr(config, "layer_types", None)
    return any(kind != "full_attention" for kind in kinds) if kinds else getattr(config, "sliding_window", None) is not None


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
