"""The editor ``MetaFT`` as EasyEdit calls it: the inner loop on the given facts, and the weights of before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch

from propmeta_edit.easyedit.hparams import MetaFTHyperParams, request_fields
from propmeta_edit.errors import ModelError, RequestError
from propmeta_edit.finetune.inner_loop import apply_inner_loop
from propmeta_edit.finetune.weights import apply_snapshot, only_trainable, snapshot
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.records import EditRequest
from propmeta_edit.text.encoding import encode_requests


def apply_metaft_to_model(
    model: Any,
    tok: Any,
    requests: Sequence[Mapping[str, Any]] | Mapping[str, Any],
    hparams: MetaFTHyperParams,
    copy: bool = False,
    return_orig_weights: bool = False,
    **_: Any,
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Write facts into a model by the inner loop (Eq. 2), all of them with one optimiser, K passes.

    Args:
        model: edited in place unless ``copy``; back at its old weights if the edit fails.
        tok: its tokenizer; its padding side is neither used nor changed.
        requests: EasyEdit requests (``prompt``, ``target_new``, ``subject`` if known); left unchanged.
        hparams: settings of the edit.
        copy: edit a deep copy instead.
        return_orig_weights: also return the values from before.

    Returns:
        (edited model, {parameter name: value before the edit}); the second is empty unless ``return_orig_weights``.

    Raises:
        RequestError: an empty target, or a subject that is not in its prompt.
        ModelError: a layer outside the model, or tensors to edit that are not fp32.
    """
    edits = to_edit_requests(requests)
    if copy:
        model = deepcopy(model)
    parameters = select_parameters(model, hparams.layers, hparams.modules)
    _require_full_precision(parameters)
    target = [batch.to(model.device) for batch in encode_requests(tok, [edits], hparams.batch_size)]
    original = snapshot(parameters)
    try:
        with only_trainable(model, parameters):
            apply_inner_loop(model, parameters, target, hparams.inner_loop_settings())
    except BaseException:
        apply_snapshot(parameters, original)
        raise
    return model, original if return_orig_weights else {}


def to_edit_requests(requests: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> list[EditRequest]:
    """EasyEdit's requests, one or several, as ours.

    Raises:
        RequestError: no request at all, or one that cannot be carried out (its number is named).
    """
    several = [requests] if isinstance(requests, Mapping) else list(requests)
    if not several:
        raise RequestError("there is no request to edit; give at least one prompt and target_new")
    edits = []
    for number, request in enumerate(several):
        try:
            edits.append(EditRequest(*request_fields(request)))
        except RequestError as error:
            raise RequestError(f"request {number}: {error}") from error
    return edits


def _require_full_precision(parameters: Mapping[str, torch.Tensor]) -> None:
    narrow = [name for name, parameter in parameters.items() if parameter.dtype not in (torch.float32, torch.float64)]
    if narrow:
        raise ModelError(
            f"the tensors to edit must be fp32, but {narrow[0]} is {parameters[narrow[0]].dtype}: small updates would vanish. Let "
            "MetaFTHyperParams load the model (dtype: bfloat16 keeps the edited layer in fp32), or load it in fp32"
        )
