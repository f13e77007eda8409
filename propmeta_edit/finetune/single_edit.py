"""One edit of one model, in place: what EasyEdit's editor and ``Edit`` objects share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from propmeta_edit.errors import ModelError
from propmeta_edit.finetune.adapted import adapted_copies
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.inner_loop import apply_inner_loop
from propmeta_edit.finetune.learning import Learning, read_learning
from propmeta_edit.finetune.low_rank import LowRankWeights
from propmeta_edit.finetune.weights import copies_in_place, only_trainable
from propmeta_edit.finetune.written_inputs import remember_inputs
from propmeta_edit.models.devices import device_of, memory_errors_named
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.models.ownership import owned
from propmeta_edit.models.states import to_the_end
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.records import EditRequest
from propmeta_edit.text.encoding import TextEncoder, encode_requests

NO_ROOM = (
    "in an edit, which takes five times the tensors that it moves: edit fewer layers, or modules: attention; take dtype: bfloat16 "
    "for the rest, or --device cpu"
)


class Computed(NamedTuple):
    """An edit that stands nowhere yet.

    Attributes:
        weights: the edited parameters by name; ``LowRankWeights`` where the change is of low rank from the start.
        learning: how it went, of the fact that was learnt worst; nothing with fewer than two steps.
    """

    weights: Mapping[str, torch.Tensor]
    learning: list[Learning]


def compute_facts(model: LanguageModel, tokenizer: Tokenizer, requests: Sequence[EditRequest], settings: EditSettings) -> Computed:
    """What the edited parameters are after the inner loop (Eq. 2) on some facts: all of them with one optimiser, K passes.

    The model's own parameters are not written to: copies stand in their places meanwhile.

    Args:
        model: without wrappers (``models.ownership.owned``).

    Raises:
        RequestError: a fact without a token before its object, or longer than the model has positions.
        ModelError: a layer outside the model, tensors to edit that are not fp32 or wider, or an edit that diverged.
    """
    parameters = select_parameters(model, settings.layers, settings.modules)
    require_full_precision(parameters)
    encoder = TextEncoder(tokenizer, model.config)
    target = [
        batch.to(model.device) for batch in encode_requests(encoder, [requests], settings.batch_size, positions=settings.positions)
    ]
    if settings.is_low_rank:
        with memory_errors_named(NO_ROOM), adapted_copies(model, parameters, target, settings, 1) as (adapted, losses):
            require_finite(adapted.moved, settings)
            return Computed(adapted.take(0), read_learning(losses, settings.num_inner_steps))
    with memory_errors_named(NO_ROOM), copies_in_place(model, parameters) as copies:
        with only_trainable(model, copies):
            losses = apply_inner_loop(model, copies, target, settings)
        require_finite(copies, settings)
    edited = {name: copy.data for name, copy in copies.items()}
    return Computed(edited, read_learning(losses, settings.num_inner_steps))


def write_facts(
    model: LanguageModel, tokenizer: Tokenizer, requests: Sequence[EditRequest], settings: EditSettings
) -> dict[str, torch.Tensor]:
    """``learn_facts`` where nobody asks how it went."""
    return learn_facts(model, tokenizer, requests, settings)[0]


def learn_facts(
    model: LanguageModel, tokenizer: Tokenizer, requests: Sequence[EditRequest], settings: EditSettings
) -> tuple[dict[str, torch.Tensor], list[Learning]]:
    """Write what ``compute_facts`` gives into the model, which was left alone until it is all there.

    Args:
        model: perhaps in wrappers that can be taken off.

    Returns:
        The tensors that stood in the edited parameters before, which were put aside, not copied; and how it went.

    Raises:
        RequestError, ModelError: as ``compute_facts``, or a model that cannot be edited as it is (``models.ownership.owned``).
    """
    with owned(model) as plain:
        computed, learning = compute_facts(plain, tokenizer, requests, settings)
        edited = dict(computed)  # of factors, made here, once
        before = put_in_place({name: plain.get_parameter(name) for name in edited}, edited)
        if isinstance(computed, LowRankWeights):
            remember_inputs(plain, computed.inputs)
        return before, learning


def put_in_place(parameters: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Let parameters hold other tensors, without copying a number: all of them, or none if one does not fit.

    Returns:
        What they held before.
    """
    before = {name: parameters[name].data for name in values}
    try:
        _hold(parameters, values)
    except BaseException:
        to_the_end(lambda: _hold(parameters, before))
        raise
    return before


def _hold(parameters: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    for name, value in values.items():
        parameters[name].data = value


def require_finite(parameters: Mapping[str, torch.Tensor], settings: EditSettings) -> None:
    """Refuse what a loop that diverged leaves.

    Raises:
        ModelError: a tensor with a number that is infinite or none; the sums of all of them, which the device is asked for once,
            tell.
    """
    device = device_of(parameters)
    sums = torch.stack([parameter.detach().sum().to(device) for parameter in parameters.values()])
    if not sums.isfinite().all():
        name = list(parameters)[int((~sums.isfinite()).nonzero()[0])]
        raise ModelError(
            f"the edit diverged: {name} is no longer finite after {settings.num_inner_steps} steps at rate {settings.inner_lr:g}; "
            "lower the rate (lr)"
        )


def require_full_precision(parameters: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors in which small updates would vanish.

    Raises:
        ModelError: one is narrower than fp32.
    """
    narrow = [name for name, parameter in parameters.items() if parameter.dtype not in (torch.float32, torch.float64)]
    if narrow:
        raise ModelError(
            f"the tensors to edit must be fp32, but {narrow[0]} is {parameters[narrow[0]].dtype}: small updates would vanish. Let "
            "MetaFTHyperParams, or load_model with layers=, load the model (dtype: bfloat16 keeps the edited layer in fp32), or "
            "load it in fp32"
        )
