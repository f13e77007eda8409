"""The editor ``MetaFT`` as EasyEdit calls it: the inner loop on the given facts, and the weights of before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch

from propmeta_edit.easyedit.hparams import MetaFTHyperParams
from propmeta_edit.finetune.learning import warn_of_unlearnt
from propmeta_edit.finetune.single_edit import learn_facts
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.records import as_requests


def apply_metaft_to_model(
    model: LanguageModel,
    tok: Tokenizer,
    requests: Sequence[Mapping[str, Any]] | Mapping[str, Any],
    hparams: MetaFTHyperParams,
    copy: bool = False,
    return_orig_weights: bool = False,
    **_: Any,
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Write facts into a model by the inner loop (Eq. 2), all of them with one optimiser, K passes; facts that were not learnt are
    warned of.

    Args:
        model: edited in place unless ``copy``, once all of the edit is there: one that fails has written nothing.
        tok: its tokenizer; its padding side is neither used nor changed.
        requests: EasyEdit requests (``prompt``, ``target_new``, ``subject`` if known); left unchanged.
        hparams: settings of the edit.
        copy: edit a deep copy instead.
        return_orig_weights: also return the values from before.

    Returns:
        (edited model, {parameter name: value before the edit}); the second is empty unless ``return_orig_weights``.

    Raises:
        RequestError: an empty target, or a subject that is not in its prompt.
        ModelError: a layer outside the model, tensors to edit that are not fp32, or a model that cannot be edited as it is.
    """
    edits = as_requests(requests)
    if copy:
        model = deepcopy(model)
    original, learning = learn_facts(model, tok, edits, hparams.edit)
    warn_of_unlearnt([edits], learning)
    return model, original if return_orig_weights else {}
