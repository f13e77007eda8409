"""Whether a shortcut gives a model's own numbers: known for the architectures it was written for, tried on a few tokens for others.

Decoders differ in what they do before the first block and after the last one, in what blocks hand on beside the states, and in what
they make of masks and kept keys. So that none of it has to be known by name, each shortcut is held once a model against what the
model itself says; where they differ, the plain way is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch

from propmeta_edit.errors import ModelError
from propmeta_edit.models.devices import is_out_of_memory
from propmeta_edit.models.layers import ARCHITECTURES
from propmeta_edit.models.states import evaluating, plain_torch
from propmeta_edit.protocols import LanguageModel

LOG = logging.getLogger(__name__)
NUM_TEXTS, LENGTH = 2, 6  # of the trial
_TRIED: WeakKeyDictionary[Any, dict[str, bool]] = WeakKeyDictionary()


def agrees(model: LanguageModel, name: str, shortcut: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> bool:
    """Whether a shortcut may be taken with a model; it is tried once, in evaluation mode.

    Args:
        name: of the shortcut.
        shortcut: from token ids [NUM_TEXTS, LENGTH] to which logits it computes, as a mask [NUM_TEXTS, LENGTH], and those logits,
            text by text.

    Raises:
        ModelError: the model is not causal: what it says after a token depends on those that follow.
    """
    if model.config.model_type in ARCHITECTURES:
        return True
    tried = _TRIED.setdefault(model, {})
    if name not in tried:
        with plain_torch(model), evaluating(model), torch.no_grad():
            tried[name] = _try(model, shortcut)
        LOG.info("%s: %s %s", model.config.model_type, name, "agrees" if tried[name] else "is not the model's own: the plain way")
    return tried[name]


def compute_plainly(model: LanguageModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits after every token as the model itself gives them, [B, T, vocabulary]."""
    logits: torch.Tensor = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, return_dict=True).logits
    return logits


def _try(model: LanguageModel, shortcut: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> bool:
    vocabulary = len(model.get_input_embeddings().weight)
    numbers = torch.arange(1, NUM_TEXTS * LENGTH + 1, device=model.device)
    ids = (numbers * 7919 % vocabulary).view(NUM_TEXTS, LENGTH)
    expected = compute_plainly(model, ids)
    if not are_close(expected[:, : LENGTH // 2], compute_plainly(model, ids[:, : LENGTH // 2])):
        raise ModelError(
            f"this {model.config.model_type} model is not causal: what it says after a token depends on those behind it; load it "
            "as a decoder (is_decoder: true in its config.json)"
        )
    try:
        chosen, logits = shortcut(ids)
    except Exception as error:  # whatever a model makes of arguments that it was not written for
        if is_out_of_memory(error):
            raise
        return False
    return are_close(expected[chosen.to(expected.device)], logits.to(expected.device))


def are_close(expected: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether two tensors are the same but for rounding in their dtype."""
    share = 0.03 if expected.dtype in (torch.float16, torch.bfloat16) else 1e-3  # of the largest; rounding is a tenth of that
    is_close = expected.shape == found.shape and (expected - found).abs().max() <= share * expected.abs().max()
    return bool(is_close)
