"""Several independent edits of one model side by side, each with its own weights in the edited layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from propmeta_edit.finetune.inner_loop import InnerLoopSettings, apply_inner_loop
from propmeta_edit.finetune.single_edit import require_full_precision
from propmeta_edit.finetune.stacking import stacked_weights
from propmeta_edit.finetune.weights import only_trainable
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.records import EditRequest
from propmeta_edit.text.encoding import encode_requests


@contextmanager
def many_edits(
    model: Any,
    tokenizer: Any,
    edits: Sequence[Sequence[EditRequest]],
    settings: InnerLoopSettings,
    *,
    layers: Sequence[int] | str | None,
    modules: str = "attention+mlp",
    batch_size: int = 1,
) -> Iterator[None]:
    """Inside, row block n of any batch is answered with ``edits[n]`` written in (Eq. 2), and with no other edit.

    The numbers are those of one edit after another up to rounding. Outside, the model has the weights it had, to the bit.

    Args:
        edits: N edits of equally many facts each; batches inside must have a multiple of N rows, those of an edit side by side.
        batch_size: facts of an edit in one update.

    Raises:
        ModelError: a layer outside the model, or tensors to edit that are not fp32 or wider.
    """
    parameters = select_parameters(model, layers, modules)
    require_full_precision(parameters)
    target = [batch.to(model.device) for batch in encode_requests(tokenizer, edits, batch_size)]
    with stacked_weights(model, parameters, len(edits)) as adapted:
        with only_trainable(model, adapted.parameters):
            apply_inner_loop(model, adapted.parameters, target, settings, len(edits))
        yield
