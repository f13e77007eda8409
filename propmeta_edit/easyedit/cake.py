"""CaKE as EasyEdit calls an algorithm: the adapter is merged, so that the weights of before put everything back in either form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from propmeta_edit.baselines.cake import (
    CakeSettings,
    forget_adapter,
    merge_adapter_in_place,
    target_weights,
    train_cake_adapter,
)
from propmeta_edit.config import derive_settings
from propmeta_edit.easyedit.hparams import FromYaml
from propmeta_edit.finetune.weights import apply_snapshot, snapshot
from propmeta_edit.models.devices import resolve_device
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.records import EditRequest, as_requests

# For what ``CakeSettings`` calls otherwise.
EASYEDIT_NAMES = {"learning_rate": "lr", "num_epochs": "num_steps", "batch_size": "train_batch_size"}


@dataclass
class CaKEHyperParams(FromYaml):
    """CaKE's settings under EasyEdit's names where it has one.

    Args:
        model_name: the model to edit: a folder, a bundled name, or a hub id.
        alg_name: always ``CaKE``.
        device: auto, cpu, mps, cuda or cuda:N.
        rank, lora_alpha, lora_dropout: of the LoRA, by PEFT's names.
        lr: of the LoRA.
        num_steps: passes over the texts of a case.
        train_batch_size: texts in one update; ``batch_size``, which EasyEdit's ``edit`` wants to be 1, counts requests.
        max_length: tokens of a text.
        learn_prompts: put the loss on prompts and padding as well, as the published code does.
        seed: of the LoRA's first values and the order of the texts.
        batch_size, model_parallel: read by EasyEdit.
    """

    model_name: str
    alg_name: str = "CaKE"
    device: int | str = "auto"
    rank: int = 8
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lr: float = 1e-4
    num_steps: int = 40
    train_batch_size: int = 4
    max_length: int = 256
    learn_prompts: bool = False
    seed: int = 0
    batch_size: int = 1
    model_parallel: bool = False

    def __post_init__(self) -> None:
        self.device = resolve_device(self.device)
        _ = self.recipe  # refuses values the training would refuse

    @property
    def recipe(self) -> CakeSettings:
        """These settings as the training takes them."""
        return derive_settings(CakeSettings, self, EASYEDIT_NAMES)


def apply_cake_to_model(
    model: LanguageModel,
    tok: Tokenizer,
    requests: Sequence[Mapping[str, Any]],
    hparams: CaKEHyperParams,
    copy: bool = False,
    return_orig_weights: bool = False,
    **_: Any,
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Write facts by one LoRA for all of them, merged into the weights.

    Args:
        requests: EasyEdit requests; ``augmentation``, (text, completion) pairs about the fact, is used where a request has it,
            and made from templates where not, after ``rephrasings``, other prompts for the fact, where it has those.

    Returns:
        (edited model, {parameter name: value before the edit}); the second is empty unless ``return_orig_weights``. An edit that
        fails leaves the model as it was.

    Raises:
        RequestError: an empty target, or a subject that is not in its prompt.
    """
    edits = [_with_augmentation(e, r) for e, r in zip(as_requests(requests), requests, strict=True)]
    if copy:
        model = deepcopy(model)
    weights = target_weights(model)
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        adapted = train_cake_adapter(model, tok, edits, hparams.recipe)
        original = snapshot(weights)  # not before, when there are copies in bf16: these are nearly all of the model's matrices
        try:
            merge_adapter_in_place(adapted)
        except BaseException:  # some matrices are merged, others not
            forget_adapter(adapted.unload())
            apply_snapshot(weights, original)
            raise
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    return model, original if return_orig_weights else {}


def _with_augmentation(edit: EditRequest, request: Mapping[str, Any]) -> EditRequest:
    pairs = tuple((str(text), str(completion)) for text, completion in request.get("augmentation") or ())
    rephrasings = tuple(str(prompt) for prompt in request.get("rephrasings") or ())
    return EditRequest(edit.prompt, edit.target_new, edit.subject, pairs, rephrasings)
