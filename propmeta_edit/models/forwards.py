"""A model's body run on a batch, and other forward functions for some of its modules for a while."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from propmeta_edit.models.shortcuts import agrees, compute_plainly
from propmeta_edit.models.states import put_back_after
from propmeta_edit.protocols import LanguageModel
from propmeta_edit.text.encoding import EncodedBatch


def compute_logits_after(model: LanguageModel, batch: EncodedBatch, texts: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits after chosen tokens, [M, vocabulary]: the head is computed there alone, where the model allows for it."""
    is_usual = has_usual_body(model)
    found = compute_hidden_states(model, batch) if is_usual else compute_plainly(model, batch.input_ids, batch.attention_mask)
    found = found[texts.to(found.device), positions.to(found.device)]  # a model may be spread over several devices
    return compute_logits(model, found) if is_usual else found


def has_usual_body(model: LanguageModel) -> bool:
    """Whether ``compute_hidden_states`` and ``compute_logits`` together are the model."""

    def compute(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        everywhere = torch.ones_like(ids, dtype=torch.bool)
        states = compute_hidden_states(model, EncodedBatch(ids, ids))
        return everywhere, compute_logits(model, states)[everywhere]

    return agrees(model, "body and head by themselves", compute)


def run_to_the_head(model: LanguageModel, batch: EncodedBatch) -> None:
    """Let a batch go through all blocks, for what hooks see there."""
    if has_usual_body(model):
        compute_hidden_states(model, batch)
    else:
        compute_plainly(model, batch.input_ids, batch.attention_mask)


def compute_hidden_states(model: LanguageModel, batch: EncodedBatch) -> torch.Tensor:
    """What the last norm gives, [B, T, hidden]: everything but the head. The numbers are transformers' own, to the bit.

    Nothing here waits for the device: without a mask, kernels are told only that attention is causal, and given embeddings in
    place of ids, GPT-2 does not look among them for padding.
    """
    hidden: torch.Tensor = model.base_model(
        inputs_embeds=model.get_input_embeddings()(batch.input_ids),
        attention_mask=batch.attention_mask,
        position_ids=torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)[None],
        use_cache=False,
        return_dict=True,
        **{cache_argument(type(model.base_model).forward): NoCache()},
    ).last_hidden_state
    return hidden


@cache
def cache_argument(forward: Callable[..., Any]) -> str:
    """What a model calls its cache: ``past_key_values``, or ``cache`` since transformers 5.24, where the other name warns.

    Args:
        forward: of the class of the model's body.
    """
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def compute_logits(model: LanguageModel, states: torch.Tensor) -> torch.Tensor:
    """What the head makes of states after the last norm, [..., hidden] → [..., vocabulary], with its scale and cap.

    Gemmas can have a cap (``final_logit_softcapping``), Cohere's and Granite's models a scale; both change every probability.
    """
    logits: torch.Tensor = model.get_output_embeddings()(states)
    config = model.config.get_text_config()
    factor, divisor = getattr(config, "logit_scale", None), getattr(config, "logits_scaling", None)
    logits = logits if factor is None else logits * factor
    logits = logits if divisor is None else logits / divisor
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


class NoCache(DynamicCache):  # type: ignore[misc]
    """Keeps nothing. Given None, transformers reads from the device whether a row holds several texts."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, each module computes what its function says; outside it is as it was, another library's hook included."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    with put_back_after(lambda: _set_forwards(before)):
        _set_forwards(forwards)
        yield


def _set_forwards(forwards: Mapping[nn.Module, Any]) -> None:
    for module, forward in forwards.items():
        if forward is None:
            module.__dict__.pop("forward", None)  # the class's own shows again
        else:
            module.forward = forward
