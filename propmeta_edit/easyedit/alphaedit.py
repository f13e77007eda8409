"""AlphaEdit for the form of EasyEdit that has none: its MEMIT's keys and values, and an update in the null space of what is kept.

Steps as in its paper (ICLR 2025): the value z of each request at the last edited layer, then layer by layer the keys, the
residual's share, and the projected update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from propmeta_edit.baselines.null_space import load_projection, read_projection, solve_update, stamp_of
from propmeta_edit.baselines.second_moments import model_folder_name, statistics_file
from propmeta_edit.easyedit.hparams import FromYaml
from propmeta_edit.easyedit.layer_outputs import layers_answer_with_tuples
from propmeta_edit.easyedit.templates import as_template
from propmeta_edit.finetune.weights import apply_snapshot, snapshot
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.text.encoding import padded_on


@dataclass
class AlphaEditHyperParams(FromYaml):
    """Settings under EasyEdit's names.

    Args:
        layers: edited from the first to the last; the values belong to the last.
        model_name: the model to edit: a folder, a bundled name, or a hub id.
        alg_name: always ``AlphaEdit``.
        v_loss_layer: the layer after which the value's loss is taken.
        rewrite_module_tmp, layer_module_tmp, mlp_module_tmp, attn_module_tmp: where a layer's parts are, ``{}`` for its number.
        ln_f_module, lm_head_module: where the last norm and the head are.
        fact_token: whose state is the key: ``subject_last``.
        v_num_grad_steps, v_lr, v_weight_decay, kl_factor, clamp_norm_factor: of the search for the value: steps, rate, decay,
            weight of staying near what the model said, and the longest step in norms of the state.
        nullspace_threshold: eigenvalues of ``E[k kᵀ]`` below it span what may be written to.
        L2: the weight of the update's own size.
        stats_dir, mom2_dataset, mom2_n_samples: where the second moments are (``propmeta-edit statistics`` writes them).
        mom2_dtype: the second moments' own.
        mom2_adjustment, mom2_update_weight, layer_selection, P_loc: EasyEdit's, of no account here; projections are kept beside the
            second moments they belong to.
        device: cpu, cuda, or the number of a CUDA device.
        max_length, batch_size, model_parallel: read by EasyEdit.
    """

    layers: list[int]
    model_name: str
    stats_dir: str
    v_loss_layer: int
    rewrite_module_tmp: str
    layer_module_tmp: str
    ln_f_module: str
    lm_head_module: str
    alg_name: str = "AlphaEdit"
    layer_selection: str = "all"
    fact_token: str = "subject_last"
    v_num_grad_steps: int = 25
    v_lr: float = 0.1
    v_weight_decay: float = 0.5
    clamp_norm_factor: float = 0.75
    kl_factor: float = 0.0625
    mom2_adjustment: bool = True
    mom2_update_weight: float = 15000
    mlp_module_tmp: str = ""
    attn_module_tmp: str = ""
    mom2_dataset: str = "wikipedia"
    mom2_n_samples: int = 100000
    mom2_dtype: str = "float32"
    nullspace_threshold: float = 2e-2
    L2: float = 10
    P_loc: str = ""
    device: int | str = "cpu"
    max_length: int = 40
    batch_size: int = 1
    model_parallel: bool = False


@dataclass
class EditChain:
    """Edits that build on one another: the keys they wrote ([in, m]; with EasyEdit's own code ``K Kᵀ`` of them, [in, in]), and how
    the weights stood after the last of them.

    A model whose weights no longer stand so was restored or edited by something else: its next edit starts a new chain.
    """

    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    left_at: dict[str, torch.Tensor] = field(default_factory=dict)

    def continues(self, weights: Mapping[str, torch.Tensor]) -> bool:
        """Whether the weights are those the last edit left."""
        return self.left_at.keys() == weights.keys() and all(torch.equal(self.left_at[n], w.detach()) for n, w in weights.items())


_CHAINS: WeakKeyDictionary[Any, EditChain] = WeakKeyDictionary()


def apply_alphaedit_to_model(
    model: LanguageModel,
    tok: Tokenizer,
    requests: Sequence[Mapping[str, Any]],
    hparams: Any,
    copy: bool = False,
    return_orig_weights: bool = False,
    **_: Any,
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Write facts into the second MLP projections of several layers, all of them together.

    Args:
        model: edited in place unless ``copy``; back at its old weights if the edit fails.
        tok: padded on the right meanwhile, since positions are counted from the left.
        requests: EasyEdit requests, each with its ``subject``.
        hparams: ``AlphaEditHyperParams``, EasyEdit's or ours.

    Returns:
        (edited model, {parameter name: value before the edit}); the second is empty unless ``return_orig_weights``.

    Raises:
        RequestError: a request without a subject that occurs in its prompt, or with braces.
        ModelError: the second moments are missing.
    """
    from easyeditor.models.memit import memit_main

    templates = [as_template(request, number, "AlphaEdit") for number, request in enumerate(requests)]
    if copy:
        model = deepcopy(model)
    weights = _edited_weights(model, hparams)
    chain = _chain_of(model, weights)
    original = snapshot(weights)
    try:
        with torch.no_grad(), layers_answer_with_tuples(model), padded_on(tok, "right"):  # positions from the left
            contexts = memit_main.get_context_templates(model, tok)
            _write(model, tok, templates, hparams, weights, chain, contexts)
    except BaseException:
        apply_snapshot(weights, original)
        _CHAINS.pop(model, None)
        raise
    _CHAINS[model] = EditChain(chain.kept, snapshot(weights))
    return model, original if return_orig_weights else {}


def _write(
    model: LanguageModel,
    tok: Tokenizer,
    requests: list[dict[str, Any]],
    hparams: Any,
    weights: Mapping[str, torch.Tensor],
    chain: EditChain,
    contexts: Any,
) -> None:
    from easyeditor.models.memit.compute_ks import compute_ks
    from easyeditor.models.memit.compute_z import compute_z, get_module_input_output_at_words

    z_layer = hparams.layers[-1]
    with torch.enable_grad():
        values = torch.stack([compute_z(model, tok, request, hparams, z_layer, contexts) for request in requests], dim=1).detach()

    def keys_of(layer: int) -> torch.Tensor:
        keys: torch.Tensor = compute_ks(model, tok, requests, hparams, layer, contexts)
        return keys.T.float()  # [in, n]

    for number, (layer, (name, weight)) in enumerate(zip(hparams.layers, weights.items(), strict=True)):
        keys = keys_of(layer)
        outputs = get_module_input_output_at_words(
            model,
            tok,
            z_layer,
            context_templates=[request["prompt"] for request in requests],
            words=[request["subject"] for request in requests],
            module_template=hparams.layer_module_tmp,
            fact_token_strategy=hparams.fact_token,
        )[1]
        residuals = (values - outputs.T).float() / (len(hparams.layers) - number)  # what is left, shared by the layers to come
        projection = load_projection(_statistics(hparams, name), hparams.nullspace_threshold, keys.device)
        kept = chain.kept.get(name, keys[:, :0]).to(keys.device)
        update = solve_update(keys, residuals, projection, kept, hparams.L2)
        weight += (update if update.shape == weight.shape else update.T).to(weight.dtype)  # GPT-2 stores [in, out]
    for layer, name in zip(hparams.layers, weights, strict=True):
        keys = keys_of(layer).cpu()
        chain.kept[name] = torch.cat([chain.kept.get(name, keys[:, :0]), keys], dim=1)


def apply_easyedits_own(
    apply: Any, model: LanguageModel, tok: Tokenizer, requests: Sequence[Mapping[str, Any]], hparams: Any, **kwargs: Any
) -> tuple[Any, dict[str, torch.Tensor]]:
    """EasyEdit's AlphaEdit with our projections, and with earlier edits' keys only while edits build on one another.

    By itself it keeps both in module globals, for whichever model comes next, remembers keys of edits that were undone, and has
    room for keys only where a model's name holds one of three words.
    """
    from easyeditor.models.alphaedit import AlphaEdit_main

    weights = _edited_weights(model, hparams)
    chain = _chain_of(model, weights)
    files = tuple(_statistics(hparams, name) for name in weights)
    stamps = tuple(stamp_of(file) for file in files)
    AlphaEdit_main.P, AlphaEdit_main.P_loaded = _stack_projections(files, stamps, hparams.nullspace_threshold), True
    kept = [chain.kept[name] for name in weights] if chain.kept else None
    AlphaEdit_main.cache_c = torch.zeros_like(AlphaEdit_main.P) if kept is None else torch.stack(kept)
    AlphaEdit_main.cache_c_new = True
    hparams = replace(hparams, P_loc=str(files[0]))  # it computes projections of its own unless this file exists
    model, original = apply(model, tok, requests, hparams, **kwargs)
    written = dict(zip(weights, AlphaEdit_main.cache_c, strict=True))
    _CHAINS[model] = EditChain(written, snapshot(_edited_weights(model, hparams)))
    return model, original


@lru_cache(maxsize=1)  # of one model at a time, 4 GB for one of 8B: stacked once, not in every edit's time
def _stack_projections(files: tuple[Path, ...], stamps: tuple[int, ...], threshold: float) -> torch.Tensor:
    return torch.stack([read_projection(file, threshold) for file in files])


def _edited_weights(model: LanguageModel, hparams: Any) -> dict[str, torch.nn.Parameter]:
    names = [f"{hparams.rewrite_module_tmp.format(layer)}.weight" for layer in hparams.layers]
    return {name: model.get_parameter(name) for name in names}


def _chain_of(model: LanguageModel, weights: Mapping[str, torch.Tensor]) -> EditChain:
    chain = _CHAINS.get(model)
    return chain if chain is not None and chain.continues(weights) else EditChain()


def _statistics(hparams: Any, parameter: str) -> Path:
    module = parameter.removesuffix(".weight")
    folder = model_folder_name(hparams.model_name)
    return statistics_file(Path(hparams.stats_dir), folder, hparams.mom2_dataset, module, hparams.mom2_n_samples)
