"""Several independent edits of one model side by side, each with its own weights in the edited layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.inner_loop import apply_inner_loop
from propmeta_edit.finetune.prefix import FrozenPrefix
from propmeta_edit.finetune.single_edit import require_full_precision
from propmeta_edit.finetune.stacking import StackedWeights, stacked_weights
from propmeta_edit.finetune.weights import only_trainable
from propmeta_edit.models.generation import keeps_states
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.models.ownership import locked
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.records import EditRequest
from propmeta_edit.text.encoding import EncodedBatch, TextEncoder, encode_requests


@contextmanager
def adapted_copies(
    model: LanguageModel,
    parameters: Mapping[str, nn.Parameter],
    target: Sequence[EncodedBatch],
    settings: EditSettings,
    num_edits: int,
) -> Iterator[tuple[StackedWeights, list[torch.Tensor]]]:
    """Inside, row block n of any batch meets the n-th of N copies of θ, which the inner loop has moved to its own θ_τ (Eq. 2).

    θ itself is never written. Meta-training takes its outer gradient inside, edits are read off or answer inside.

    Args:
        parameters: θ, by name in the model.
        target: as for ``apply_inner_loop``, on the model's device.
        num_edits: N.

    Yields:
        The copies, and what ``apply_inner_loop`` returns: their losses before each update.
    """
    try_shortcuts(model, parameters)  # now: rows of their own would be taken for rows of an edit
    with stacked_weights(model, parameters, num_edits) as adapted:
        with only_trainable(model, adapted.parameters):
            losses = apply_inner_loop(model, adapted.parameters, target, settings, num_edits)
        yield adapted, losses


def try_shortcuts(model: LanguageModel, parameter_names: Iterable[str]) -> None:
    """Try all that the inner loop and generation may take with a model that is not known by name."""
    FrozenPrefix(model, parameter_names)
    keeps_states(model)


@contextmanager
def many_edits(
    model: LanguageModel, tokenizer: Tokenizer, edits: Sequence[Sequence[EditRequest]], settings: EditSettings
) -> Iterator[StackedWeights]:
    """Inside, row block n of any batch is answered with ``edits[n]`` written in (Eq. 2), and with no other edit.

    Yields:
        The edited weights, a copy an edit; the rest is as for ``learnt_edits``.
    """
    with learnt_edits(model, tokenizer, edits, settings) as (adapted, _):
        yield adapted


@contextmanager
def learnt_edits(
    model: LanguageModel, tokenizer: Tokenizer, edits: Sequence[Sequence[EditRequest]], settings: EditSettings
) -> Iterator[tuple[StackedWeights, list[torch.Tensor]]]:
    """``many_edits``, and how they went.

    The numbers are those of one edit after another up to rounding. Outside, the model has the weights it had, to the bit.

    Args:
        edits: N edits of equally many facts each; batches inside must have a multiple of N rows, those of an edit side by side.

    Yields:
        The edited weights, a copy an edit, and the edits' losses before each update.

    Raises:
        ModelError: a layer outside the model, or tensors to edit that are not fp32 or wider.
    """
    with locked(model):
        parameters = select_parameters(model, settings.layers, settings.modules)
        require_full_precision(parameters)
        encoder = TextEncoder(tokenizer, model.config)
        target = [batch.to(model.device) for batch in encode_requests(encoder, edits, settings.batch_size)]
        with adapted_copies(model, parameters, target, settings, len(edits)) as (adapted, losses):
            yield adapted, losses
