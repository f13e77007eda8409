"""The logit lens: what the model would say if each layer were its last (nostalgebraist, 2020), at every position.

Plain forward hooks, since the project's own room for architectures already knows where blocks and norms are, and a library would
bring models and weights of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from propmeta_edit.models.forwards import compute_hidden_states, compute_logits
from propmeta_edit.models.layers import get_blocks, get_final_norm
from propmeta_edit.protocols import LanguageModel
from propmeta_edit.text.encoding import EncodedBatch


def batch_of(model: LanguageModel, input_ids: Sequence[int]) -> EncodedBatch:
    """One unpadded text, [1, T], on the model's device, without labels."""
    ids = torch.tensor([list(input_ids)], device=model.device)
    return EncodedBatch(ids, ids)


def record_states(model: LanguageModel, input_ids: Sequence[int]) -> torch.Tensor:
    """The residual stream of one text: what enters the first block, then what leaves each block.

    Returns:
        [L + 1, T, D] without gradient, for a model of L blocks.
    """
    states: list[torch.Tensor] = []
    blocks = get_blocks(model)
    with torch.no_grad(), _kept_inputs(blocks[0], states), _kept_outputs(blocks, states):
        compute_hidden_states(model, batch_of(model, input_ids))
    return torch.cat(states)


@contextmanager
def _kept_inputs(block: torch.nn.Module, states: list[torch.Tensor]) -> Iterator[None]:
    handle = block.register_forward_pre_hook(
        lambda module, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _kept_outputs(blocks: Sequence[torch.nn.Module], states: list[torch.Tensor]) -> Iterator[None]:
    handles = [block.register_forward_hook(lambda module, inputs, output: states.append(output)) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def read_states(model: LanguageModel, states: torch.Tensor) -> torch.Tensor:
    """States through the model's own last norm and head.

    Args:
        states: [..., D], of any layer.

    Returns:
        log-probabilities in nats, [..., V]; of the states after the last block they are the model's own.
    """
    with torch.no_grad():
        logits = compute_logits(model, get_final_norm(model)(states))
        return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def read_tokens(model: LanguageModel, states: torch.Tensor, tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the lens says of some tokens.

    Args:
        states: [..., D].
        tokens: K token ids.

    Returns:
        (log-probabilities in nats [..., K], ranks [..., K]: how many tokens are likelier, 0 for the likeliest).
    """
    log_probs = read_states(model, states)
    chosen = log_probs[..., list(tokens)]
    ranks = torch.stack([(log_probs > chosen[..., k : k + 1]).sum(dim=-1) for k in range(len(tokens))], dim=-1)
    return chosen, ranks
