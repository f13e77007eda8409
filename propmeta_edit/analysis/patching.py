"""Activation patching between two runs of the same text: where something is kept, and up to which layer it is read from there.

The stream after a block, at some positions, is replaced by another run's (Meng et al., 2022; Vig et al., 2020); what follows is
computed anew. Plain forward hooks, for the reason ``analysis.lens`` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from propmeta_edit.analysis.lens import batch_of
from propmeta_edit.errors import ModelError
from propmeta_edit.models.forwards import compute_hidden_states, compute_logits
from propmeta_edit.models.layers import get_blocks
from propmeta_edit.protocols import LanguageModel


@dataclass(frozen=True)
class Patch:
    """The stream after block ``layer`` (0-based) at ``positions`` comes from another run; no position: nothing is replaced."""

    layer: int
    positions: tuple[int, ...]


def compute_patched_log_probs(
    model: LanguageModel, input_ids: Sequence[int], states: torch.Tensor, patches: Sequence[Patch]
) -> torch.Tensor:
    """The model's next-token log-probabilities under each patch alone, all in one pass.

    Until a patch's block its row would be the unpatched run's, so it joins the batch only there: with patches spread over all
    layers this is half the work of one pass a patch.

    Args:
        model: runs the text as it is now, edited or not.
        input_ids: T token ids.
        states: the other run of the same text, [L + 1, T, D], as ``analysis.lens.record_states`` gives it.
        patches: N of them.

    Returns:
        [N, V] in nats, in the order of ``patches``.

    Raises:
        ModelError: a layer or position outside, or states of another text or model.
    """
    blocks = get_blocks(model)
    _check(patches, states, len(blocks), len(input_ids))
    order: list[int] = []
    handles = []
    for layer, block in enumerate(blocks):
        own = [number for number, patch in enumerate(patches) if patch.layer == layer]
        if own:
            order += own
            added = [(patches[number].positions, states[layer + 1]) for number in own]
            handles.append(block.register_forward_hook(_join_at(added)))
    try:
        with torch.no_grad():
            hidden = compute_hidden_states(model, batch_of(model, input_ids))[1:, -1]
            logits = compute_logits(model, hidden)
    finally:
        for handle in handles:
            handle.remove()
    log_probs = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
    return log_probs[torch.tensor(order, dtype=torch.long).argsort()]


def _join_at(added: Sequence[tuple[tuple[int, ...], torch.Tensor]]) -> Callable[..., torch.Tensor]:
    """A hook that adds one row a patch: the unpatched row, which is the first, with other states at the patch's positions."""

    def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        rows = [output]
        for positions, state in added:
            row = output[:1].clone()
            row[0, list(positions)] = state[list(positions)].to(row)
            rows.append(row)
        return torch.cat(rows)

    return hook


def _check(patches: Sequence[Patch], states: torch.Tensor, num_layers: int, num_tokens: int) -> None:
    if states.dim() != 3 or states.shape[:2] != (num_layers + 1, num_tokens):
        raise ModelError(
            f"the other run's states must be [{num_layers + 1}, {num_tokens}, D] for this text, got {list(states.shape)}; record "
            "them with the same model and text"
        )
    for patch in patches:
        if not 0 <= patch.layer < num_layers:
            raise ModelError(f"layer {patch.layer} is outside the model: it has layers 0 to {num_layers - 1} (0-based)")
        outside = [position for position in patch.positions if not 0 <= position < num_tokens]
        if outside:
            raise ModelError(f"position {outside[0]} is outside the text: it has positions 0 to {num_tokens - 1}")
