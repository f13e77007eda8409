"""Several independent edits of one model side by side, each with its own weights in the edited layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from propmeta_edit.finetune.adapted import Adapted, adapted_copies
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.single_edit import require_full_precision
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.models.ownership import locked
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.records import EditRequest
from propmeta_edit.text.encoding import TextEncoder, encode_requests


@contextmanager
def many_edits(
    model: LanguageModel, tokenizer: Tokenizer, edits: Sequence[Sequence[EditRequest]], settings: EditSettings
) -> Iterator[Adapted]:
    """Inside, row block n of any batch is answered with ``edits[n]`` written in (Eq. 2), and with no other edit.

    Yields:
        The edited weights, a copy an edit; the rest is as for ``learnt_edits``.
    """
    with learnt_edits(model, tokenizer, edits, settings) as (adapted, _):
        yield adapted


@contextmanager
def learnt_edits(
    model: LanguageModel, tokenizer: Tokenizer, edits: Sequence[Sequence[EditRequest]], settings: EditSettings
) -> Iterator[tuple[Adapted, list[torch.Tensor]]]:
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
        target = [
            batch.to(model.device) for batch in encode_requests(encoder, edits, settings.batch_size, positions=settings.positions)
        ]
        with adapted_copies(model, parameters, target, settings, len(edits)) as (adapted, losses):
            yield adapted, losses
