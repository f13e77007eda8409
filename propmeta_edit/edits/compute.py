"""An ``Edit`` from a request, by the inner loop; the model is left as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from propmeta_edit.edits.edit import Edit, find_transposed, take_base
from propmeta_edit.edits.identity import take_fingerprints
from propmeta_edit.errors import ConfigError, record_named
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.learning import read_learning, warn_of_unlearnt
from propmeta_edit.finetune.low_rank import LowRankWeights
from propmeta_edit.finetune.many_edits import learnt_edits
from propmeta_edit.finetune.memory import bytes_of_edits, bytes_of_factors
from propmeta_edit.finetune.single_edit import Computed, compute_facts, require_finite
from propmeta_edit.models.devices import device_of, free_memory
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.models.ownership import owned
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.records import EditRequest, as_requests
from propmeta_edit.text.encoding import TextEncoder

_MOST_AT_ONCE = 64  # beyond this nothing gets faster


class HasEditSettings(Protocol):
    """An editor's own settings, which say what an edit is made with, and on which model: ``MetaFTHyperParams``."""

    @property
    def edit(self) -> EditSettings: ...

    @property
    def model_name(self) -> str: ...


def compute_edit(
    model: LanguageModel,
    tokenizer: Tokenizer,
    request: EditRequest | Mapping[str, Any] | Sequence[EditRequest | Mapping[str, Any]],
    hparams: HasEditSettings | EditSettings,
) -> Edit:
    """Edit by plain fine-tuning (Eq. 2) and give back what it did; several requests are learnt together, as one edit.

    Args:
        model: with the tensors to edit in fp32; perhaps in ``torch.compile`` or data parallelism. Nothing is written to it.
        request: an ``EditRequest``, or a mapping as EasyEdit's requests are: ``prompt``, ``target_new``, perhaps ``subject``.
        hparams: ``MetaFTHyperParams``, whose ``model_name`` the edit keeps as its base; or ``EditSettings`` alone, for a model that
            knows its name.

    Raises:
        RequestError: an empty target, or a subject that is not in its prompt.
        ModelError: a layer outside the model, tensors to edit that are not fp32, an edit that diverged, or a model that cannot be
            edited as it is: sharded, quantised, with adapters, not on one device.
    """
    requests = as_requests(request)
    with owned(model) as plain:
        settings, about = _settle(plain, hparams)
        weights, learning = compute_facts(plain, tokenizer, requests, settings)
        warn_of_unlearnt([requests], learning)
        before = {name: plain.get_parameter(name).data for name in weights}
        state: dict[str, Any] = {"transposed": find_transposed(plain, weights), "learning": learning[0] if learning else None}
        return Edit(tuple(requests), weights, before, take_base(plain), *about, **state)


def edit_many(
    model: LanguageModel,
    tokenizer: Tokenizer,
    requests: Sequence[EditRequest | Mapping[str, Any]],
    hparams: HasEditSettings | EditSettings,
    at_once: int | None = None,
    *,
    keep_on_device: bool = False,
) -> list[Edit]:
    """One independent edit a request, ``at_once`` of them side by side; up to rounding the same as one by one.

    Rounding is all that moves a number whose true gradient is zero, as that of GPT-2's key biases, which changes nothing that the
    model says: AdamW makes full steps of it, and these may differ.

    Args:
        requests: no request gives no edit.
        hparams: as for ``compute_edit``.
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
    computed: dict[int, Computed] = {}
    with owned(model) as plain:
        settings, about = _settle(plain, hparams)
        before = {name: p.data for name, p in select_parameters(plain, settings.layers, settings.modules).items()}
        lengths = _check_each(TextEncoder(tokenizer, plain.config), several)
        by_length = sorted(range(len(several)), key=lengths.__getitem__)  # so that those side by side have little padding
        base = take_base(plain)
        state: dict[str, Any] = {"transposed": find_transposed(plain, before), "fingerprints": take_fingerprints(before)}
        device = plain.device if keep_on_device else torch.device("cpu")
        free = free_memory(device_of(before))
        at_once = at_once or choose_at_once(before, settings, free, keeps_results=device == plain.device)
        for start in range(0, len(several), at_once):
            some = by_length[start : start + at_once]
            written = _write_each(plain, tokenizer, [several[number] for number in some], settings, device)
            computed |= dict(zip(some, written, strict=True))
        edits = []
        for number, own in enumerate(several):
            one = computed[number]
            went = one.learning[0] if one.learning else None
            moved = {name: before[name] for name in one.weights}
            edits.append(Edit(tuple(own), one.weights, moved, base, *about, **state, learning=went))
    warn_of_unlearnt(several, [went for number in range(len(several)) for went in computed[number].learning])
    return edits


def _check_each(encoder: TextEncoder, several: Sequence[Sequence[EditRequest]]) -> list[int]:
    """Refuse facts that cannot be written before the first is, by the request's number among all; else each one's tokens."""
    lengths = []
    for number, requests in enumerate(several):
        with record_named(f"request {number}"):
            lengths.append(sum(len(encoder.encode_answer(request.prompt, request.target_new)[0]) for request in requests))
    return lengths


def _settle(model: LanguageModel, hparams: HasEditSettings | EditSettings) -> tuple[EditSettings, tuple[str, str, dict[str, Any]]]:
    """What the edit is made with, and what an ``Edit`` says of that: base model, method, settings as plain values."""
    if isinstance(hparams, EditSettings):
        settings, base_model = hparams, model.config._name_or_path
    else:
        settings, base_model = hparams.edit, hparams.model_name
    return settings, (str(base_model), "MetaFT", settings.to_dict())


def _write_each(
    model: LanguageModel,
    tokenizer: Tokenizer,
    several: Sequence[Sequence[EditRequest]],
    settings: EditSettings,
    device: torch.device,
) -> list[Computed]:
    """Some independent edits, with their tensors on ``device``; the copies in the model go on return."""
    with learnt_edits(model, tokenizer, several, settings) as (adapted, losses):
        require_finite(adapted.moved, settings)
        how = read_learning(losses, settings.num_inner_steps)
        computed = []
        for number in range(len(several)):
            own = adapted.take(number)
            weights = own.to(device) if isinstance(own, LowRankWeights) else {n: value.to(device) for n, value in own.items()}
            computed.append(Computed(weights, how[number : number + 1]))
        return computed


def choose_at_once(edited: Mapping[str, torch.Tensor], settings: EditSettings, free_bytes: int, keeps_results: bool = True) -> int:
    """How many edits to learn side by side: each takes what the inner loop holds, and a result (of low rank, its factors).

    Args:
        keeps_results: False where each result leaves the device before the next one is made; told apart for edits of low rank, of
            which a result is half of all.
    """
    sizes = [value.nbytes for value in edited.values()]
    if not settings.is_low_rank:
        return fit_into(free_bytes, bytes_of_edits(sizes) + sum(sizes))
    each = bytes_of_factors({name: value.shape for name, value in edited.items()}, settings)
    return fit_into(free_bytes, (1 + keeps_results) * each)


def fit_into(free_bytes: int, bytes_an_edit: int) -> int:
    """How many edits to have at once. What the texts take is small beside their tensors; half of the memory is left for it."""
    return max(1, min(_MOST_AT_ONCE, free_bytes // 2 // max(1, bytes_an_edit)))  # factors of no step have none
