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

    Nothing here waits for the device: without a mask, kernels are told only that attention is causal, and given embeddings in
    place of ids, GPT-2 does not look among them for padding.
    """
    hidden: torch.Tensor = model.base_model(
        inputs_embeds=model.get_input_embeddings()(batch.input_ids),
        attention_mask=batch.attention_mask,
        position_ids=torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)[None],
        past_key_values=_NoCache(),
        use_cache=False,
        return_dict=True,
    ).last_hidden_state
    return hidden


def compute_logits(model: LanguageModel, states: torch.Tensor) -> torch.Tensor:
    """What the head makes of states after the last norm, [..., hidden] → [..., vocabulary], below its cap if it has one.

    Gemmas can have one (``final_logit_softcapping``); it changes every probability.
    """
    logits: torch.Tensor = model.get_output_embeddings()(states)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


class _NoCache(DynamicCache):  # type: ignore[misc]
    """Keeps nothing. Given None, transformers reads from the device whether a row holds several texts."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states


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
