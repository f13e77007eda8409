"""An ``Edit`` from a request, by the inner loop; the model is left as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import nn

from propmeta_edit.edits.edit import Edit, find_transposed, take_base
from propmeta_edit.edits.identity import take_fingerprints
from propmeta_edit.errors import ConfigError
from propmeta_edit.finetune.inner_loop import InnerLoopSettings, apply_inner_loop
from propmeta_edit.finetune.single_edit import put_in_place, require_finite, require_full_precision, write_facts
from propmeta_edit.finetune.stacking import stacked_weights
from propmeta_edit.finetune.weights import only_trainable
from propmeta_edit.models.devices import free_memory
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.records import EditRequest, as_requests
from propmeta_edit.text.encoding import encode_requests

_MOST_AT_ONCE = 64  # beyond this nothing gets faster


class EditSettings(Protocol):
    """What an edit needs of ``MetaFTHyperParams``."""

    layers: Any
    modules: str
    batch_size: int
    model_name: Any

    def inner_loop_settings(self) -> InnerLoopSettings: ...


def compute_edit(
    model: Any,
    tokenizer: Any,
    request: EditRequest | Mapping[str, Any] | Sequence[EditRequest | Mapping[str, Any]],
    hparams: EditSettings,
) -> Edit:
    """Edit by plain fine-tuning (Eq. 2) and give back what it did; several requests are learnt together, as one edit.

    Args:
        model: with the tensors to edit in fp32; the same to the bit on return.
        request: an ``EditRequest``, or a mapping as EasyEdit's requests are: ``prompt``, ``target_new``, perhaps ``subject``.
        hparams: ``MetaFTHyperParams``, or anything with its ``layers``, ``modules``, ``batch_size`` and ``inner_loop_settings()``.

    Raises:
        RequestError: an empty target, or a subject that is not in its prompt.
        ModelError: a layer outside the model, tensors to edit that are not fp32, or an edit that diverged.
    """
    requests = as_requests(request)
    original = write_facts(
        model,
        tokenizer,
        requests,
        hparams.inner_loop_settings(),
        layers=hparams.layers,
        modules=hparams.modules,
        batch_size=hparams.batch_size,
    )
    parameters = dict(model.named_parameters())
    weights = {name: parameters[name].data for name in original}
    put_in_place(parameters, original)
    about = (str(hparams.model_name), "MetaFT", describe_settings(hparams))
    return Edit(tuple(requests), weights, original, take_base(model), *about, transposed=find_transposed(model, weights))


def edit_many(
    model: Any,
    tokenizer: Any,
    requests: Sequence[EditRequest | Mapping[str, Any]],
    hparams: EditSettings,
    at_once: int | None = None,
    *,
    keep_on_device: bool = False,
) -> list[Edit]:
    """One independent edit a request, ``at_once`` of them side by side; up to rounding the same as one by one.

    Rounding is all that moves a number whose true gradient is zero, as that of GPT-2's key biases, which changes nothing that the
    model says: AdamW makes full steps of it, and these may differ.

    Args:
        requests: no request gives no edit.
        at_once: as many as fit into half of the device's free memory, but no more than 64, if not given.
        keep_on_device: leave the edits' tensors where the model is, which saves copying them (0.8 GiB an edit of one layer of an 8B
            model). All edits together must then fit beside the model and what the next ``at_once`` take.

    Returns:
        Edits with their tensors on the CPU, wherever the model is, so that finished ones take no room from those to come; with
        ``keep_on_device`` on the model's device.

    Raises:
        ConfigError: an ``at_once`` below 1.
        RequestError: as ``compute_edit``; the number of the request is named.
        ModelError: as ``compute_edit``; an edit that diverged ends the call.
    """
    if at_once is not None and (not isinstance(at_once, int) or at_once < 1):
        raise ConfigError(f"at_once must be a whole number of edits, 1 or more, or None for as many as fit, got {at_once!r}")
    several = [[request] for request in as_requests(requests)] if requests else []
    edits: list[Edit] = []
    parameters = select_parameters(model, hparams.layers, hparams.modules)
    require_full_precision(parameters)
    before = {name: parameter.data for name, parameter in parameters.items()}
    base = take_base(model)
    state: dict[str, Any] = {"transposed": find_transposed(model, before), "fingerprints": take_fingerprints(before)}
    about = (str(hparams.model_name), "MetaFT", describe_settings(hparams))
    at_once = at_once or choose_at_once(before, free_memory(model.device))
    for start in range(0, len(several), at_once):
        some = several[start : start + at_once]
        weights = _write_each(model, tokenizer, parameters, some, hparams, model.device if keep_on_device else torch.device("cpu"))
        edits += [Edit(tuple(own), values, before, base, *about, **state) for own, values in zip(some, weights, strict=True)]
    return edits


def _write_each(
    model: Any,
    tokenizer: Any,
    parameters: Mapping[str, nn.Parameter],
    several: Sequence[Sequence[EditRequest]],
    hparams: EditSettings,
    device: torch.device,
) -> list[dict[str, torch.Tensor]]:
    """What the parameters are after each of some independent edits, on ``device``."""
    target = [batch.to(model.device) for batch in encode_requests(tokenizer, several, hparams.batch_size)]
    with stacked_weights(model, parameters, len(several)) as stack:
        with only_trainable(model, stack.parameters):
            apply_inner_loop(model, stack.parameters, target, hparams.inner_loop_settings(), len(several))
        require_finite(stack.parameters, hparams.inner_loop_settings())
        return [{name: value.to(device) for name, value in stack.take(number).items()} for number in range(len(several))]


def choose_at_once(edited: Mapping[str, torch.Tensor], free_bytes: int, copies: int = 5) -> int:
    """How many edits to have side by side. What the texts take is small beside their tensors; half of the memory is left for it.

    Args:
        copies: of the edited tensors that an edit needs: while it is computed weights, a gradient, AdamW's two moments, a result.
    """
    bytes_an_edit = copies * sum(value.nbytes for value in edited.values())
    return max(1, min(_MOST_AT_ONCE, free_bytes // 2 // bytes_an_edit))


def describe_settings(hparams: EditSettings) -> dict[str, Any]:
    """Layer, modules and the inner loop's settings, as plain values."""
    return {"layers": hparams.layers, "modules": hparams.modules, **asdict(hparams.inner_loop_settings())}
