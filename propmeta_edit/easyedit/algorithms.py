"""EasyEdit's own editors for the benchmark: one YAML serves both of its forms, and an edit is made as each form needs it."""

from __future__ import annotations

import dataclasses
import importlib
import io
import logging
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy
import torch

from propmeta_edit.baselines.cake import forget_adapter, merge_adapter_in_place
from propmeta_edit.easyedit.alphaedit import apply_easyedits_own
from propmeta_edit.easyedit.forms import find_form, load_easyedit
from propmeta_edit.easyedit.layer_outputs import named_after
from propmeta_edit.easyedit.repeated_steps import quick_steps
from propmeta_edit.easyedit.templates import as_template
from propmeta_edit.errors import ConfigError, EasyEditError
from propmeta_edit.finetune.weights import apply_snapshot, snapshot
from propmeta_edit.models.artefacts import resolve_model_folder
from propmeta_edit.models.layers import weights_of
from propmeta_edit.models.loading import read_model_config
from propmeta_edit.models.ownership import locked
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.records import EditRequest
from propmeta_edit.text.encoding import TextEncoder, padded_on

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Baseline:
    """Where an algorithm keeps its parts.

    Args:
        settings: ``module:class`` of its hyper-parameters.
        contexts: the module with its random openings, kept there in a global; "" if it has none.
        only_in_one_form: settings that one form of EasyEdit has and the other does not; dropped where they are not known.
        decisive: settings of that kind without which it would be another method; where they are not known there is no such row.
    """

    settings: str
    contexts: str = ""
    only_in_one_form: frozenset[str] = frozenset()
    decisive: frozenset[str] = frozenset()


_OURS = Baseline("propmeta_edit.easyedit.alphaedit:AlphaEditHyperParams", "easyeditor.models.memit.memit_main")
BASELINES = {
    "ROME": Baseline("easyeditor.models.rome:ROMEHyperParams", "easyeditor.models.rome.rome_main", frozenset({"fp16"})),
    "MEMIT": Baseline("easyeditor.models.memit:MEMITHyperParams", "easyeditor.models.memit.memit_main"),
    "AlphaEdit": Baseline("easyeditor.models.alphaedit:AlphaEditHyperParams", "easyeditor.models.alphaedit.AlphaEdit_main"),
    "CaKE": Baseline("propmeta_edit.easyedit.cake:CaKEHyperParams"),
    "FT": Baseline("easyeditor.models.ft:FTHyperParams", decisive=frozenset({"objective_optimization"})),
    "LoRA": Baseline("easyeditor.models.lora:LoRAHyperParams", only_in_one_form=frozenset({"lora_type", "model_parallel"})),
}
NEEDS_STATISTICS = ("MEMIT", "AlphaEdit")
AT_A_SUBJECT = ("ROME", *NEEDS_STATISTICS)  # they write at the last token of the subject


def find_baseline(name: str) -> Baseline:
    """An algorithm's parts in the form of EasyEdit at hand; AlphaEdit's are ours where EasyEdit has none."""
    if name not in BASELINES:
        raise EasyEditError(f"unknown algorithm {name!r}; those known here are {', '.join(BASELINES)}")
    return _OURS if name == "AlphaEdit" and "AlphaEdit" not in find_form().algorithms else BASELINES[name]


def find_algorithm(name: str) -> Any:
    """The apply function of an EasyEdit algorithm, its printing kept off the terminal.

    Raises:
        EasyEditError: EasyEdit is missing, or the form at hand has no such algorithm.
    """
    load_easyedit()
    from easyeditor.util.alg_dict import ALG_DICT

    if name not in ALG_DICT:
        raise EasyEditError(f"the {find_form().kind} form of EasyEdit has no {name}; it has {', '.join(ALG_DICT)}")
    return partial(_call, name, ALG_DICT[name])


def easyedit_request(edit: EditRequest) -> dict[str, Any]:
    """An edit as EasyEdit's algorithms take it."""
    request: dict[str, Any] = {
        "prompt": edit.prompt,
        "target_new": edit.target_new,
        "ground_truth": None,
        "portability": {},
        "locality": {},
    }
    request |= {"augmentation": [list(pair) for pair in edit.augmentation]} if edit.augmentation else {}
    request |= {"rephrasings": list(edit.rephrasings)} if edit.rephrasings else {}
    return request if edit.subject is None else {**request, "subject": edit.subject}


@dataclass(frozen=True)
class EditWith:
    """An algorithm with EasyEdit's calling convention as a function from edit requests to the values of before.

    Args:
        apply: ``apply(model, tok, requests, hparams, copy=, return_orig_weights=, keep_original_weight=)``, which edits in place.
        one_by_one: give it one request after another, for algorithms that take a single one (ROME).
        padding_side: of the tokenizer while editing; most of EasyEdit's count positions from the left.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    apply: Callable[..., tuple[Any, Mapping[str, torch.Tensor]]]
    hparams: Any
    one_by_one: bool = False
    padding_side: str = "right"

    def __call__(self, requests: Sequence[EditRequest]) -> Mapping[str, torch.Tensor]:
        """Write the requests; if one fails, those before it are taken back."""
        TextEncoder(self.tokenizer, self.model.config).require_nothing_appended(type(self.hparams).__name__)
        given = [easyedit_request(request) for request in requests]
        original: dict[str, torch.Tensor] = {}
        arguments = {"copy": False, "return_orig_weights": True, "keep_original_weight": True}
        try:
            with padded_on(self.tokenizer, self.padding_side):
                for group in [[request] for request in given] if self.one_by_one else [given]:
                    _, before = self.apply(self.model, self.tokenizer, group, self.hparams, **arguments)
                    original = {**before, **original}
        except BaseException:
            apply_snapshot(dict(self.model.named_parameters()), original)
            raise
        return original


def _call(name: str, apply: Any, model: LanguageModel, tok: Tokenizer, requests: Any, hparams: Any, **kwargs: Any) -> Any:
    """An edit without EasyEdit's printing, which would tear a progress bar apart; one that fails leaves the model as it was."""
    if name in AT_A_SUBJECT:
        requests = [as_template(request, number, name) for number, request in enumerate(requests)]
    if name == "AlphaEdit" and name in find_form().algorithms:
        apply = partial(apply_easyedits_own, apply)
    written = written_weights(model, hparams)
    before = snapshot(written)
    if name == "LoRA":
        apply = partial(_merge_lora, apply, before)
    with locked(model):
        try:
            with redirect_stdout(io.StringIO()), named_after(model, hparams.model_name), _steps_of(name, model, written, hparams):
                return apply(model, tok, requests, hparams, **kwargs)
        except BaseException:
            remove_adapters(model)
            apply_snapshot(written, before)
            raise


def _steps_of(name: str, model: LanguageModel, written: Mapping[str, torch.Tensor], hparams: Any) -> AbstractContextManager[None]:
    """What an algorithm's steps have in common, computed once."""
    if name not in AT_A_SUBJECT:
        return nullcontext()
    is_memits = name in NEEDS_STATISTICS
    layer = hparams.layers[-1] if is_memits else min(hparams.layers)  # MEMIT adds its vector at the last one alone
    return quick_steps(model, written, layer, is_memits and find_form().kind == "pypi")


def written_weights(model: LanguageModel, hparams: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters that an algorithm with these settings writes to, by name; {} for CaKE, which restores them itself."""
    if hasattr(hparams, "rewrite_module_tmp"):
        modules = tuple(f"{hparams.rewrite_module_tmp.format(layer)}." for layer in hparams.layers)
        return {name: p for name, p in model.named_parameters() if name.startswith(modules)}
    return weights_of(model, getattr(hparams, "target_modules", ()))


def remove_adapters(model: LanguageModel) -> None:
    """Put the projections back in whose places a LoRA stands that was never merged or unloaded."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.get_base_layer())
    forget_adapter(model)


def _merge_lora(
    apply: Any, original: dict[str, torch.Tensor], model: Any, tok: Tokenizer, requests: Any, hparams: Any, **kwargs: Any
) -> tuple[Any, dict[str, torch.Tensor]]:
    """EasyEdit's LoRA gives an adapter around the model; merged, the weights of before put everything back as for the others."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    use_cache = model.config.use_cache
    hooks = model.get_input_embeddings()._forward_hooks
    own_hooks = set(hooks)
    main: Any = importlib.import_module("easyeditor.models.lora.lora_main")
    if not isinstance(main.AdaLoraConfig, partial):
        # EasyEdit never lowers AdaLoRA's rank, so this number is of no account, but today's peft refuses to start without one.
        main.AdaLoraConfig = partial(main.AdaLoraConfig, total_step=1)
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)  # of the adapter's random half and of dropout, so that an edit does not depend on the ones before
            adapted, _ = apply(model, tok, requests, hparams, **kwargs)
        merge_adapter_in_place(adapted)
    finally:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
        for key in set(hooks) - own_hooks:  # it is enabled more than once, and only the last is taken out by that
            del hooks[key]
        model.config.use_cache = use_cache
        model.eval()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    return model, original


def default_layers(name: str, depth: int) -> list[int] | None:
    """The layers to write to in a model of ``depth`` layers if none are given: as deep, in proportion, as in a 32-layer Llama.

    Returns:
        0-based layers: ROME's 5 of 32, MEMIT's and AlphaEdit's five from 4 of 32, EasyEdit's FT's 21 of 32; None for algorithms
        that write to no layers in particular.
    """
    if name in NEEDS_STATISTICS:
        first = max(0, min(depth * 4 // 32, depth - 5))
        return list(range(first, min(first + 5, depth)))
    share = {"ROME": 5 / 32, "FT": 21 / 32}.get(name)
    return None if share is None else [min(round(share * depth), depth - 1)]


def fill_layers(name: str, values: Mapping[str, Any], model_name: str) -> dict[str, Any]:
    """Settings with ``layers`` and ``v_loss_layer`` (the last) from the depth of the model, where they are left out or null.

    Raises:
        ModelError: they are needed and there is no such model.
    """
    needed = {"FT": ("layers",)}.get(name, ("layers", "v_loss_layer") if name in ("ROME", *NEEDS_STATISTICS) else ())
    lacking = [key for key in needed if values.get(key) is None]
    if not lacking:
        return dict(values)
    depth = read_model_config(resolve_model_folder(model_name)).num_hidden_layers
    filled = {"layers": default_layers(name, depth), "v_loss_layer": depth - 1}
    for key in lacking:
        LOG.info("%s: %s %s, by the %d layers of %s; not an EasyEdit recommendation", name, key, filled[key], depth, model_name)
    return {**values, **{key: filled[key] for key in lacking}}


def make_hparams(name: str, values: Mapping[str, Any]) -> Any:
    """An algorithm's settings; those that only the other form of EasyEdit has are dropped with a log line.

    Layers that are not given follow from the model's depth (``fill_layers``).

    Raises:
        ConfigError: unknown or missing settings.
        EasyEditError: the form at hand cannot do what the settings ask for.
    """
    load_easyedit()
    baseline = find_baseline(name)
    module, class_name = baseline.settings.split(":")
    settings_class = getattr(importlib.import_module(module), class_name)
    fields = {f.name: f for f in dataclasses.fields(settings_class)}
    values = fill_layers(name, values, str(values.get("model_name", "")))
    _refuse_another_method(name, values, fields, baseline)
    dropped = sorted((set(values) - set(fields)) & baseline.only_in_one_form)
    if dropped:
        LOG.info("%s: this form of EasyEdit has no %s; not used", name, ", ".join(dropped))
    kept = {key: value for key, value in values.items() if key not in dropped}
    unknown = sorted(set(kept) - set(fields))
    missing = sorted(n for n, f in fields.items() if n not in kept and _has_no_default(f))
    if unknown or missing:
        raise ConfigError(f"{name}: unknown settings {unknown}, missing settings {missing}")
    for length, number in kept.get("context_template_length_params", ()):
        if number < 5 or number % 5:  # EasyEdit starts as many from each of five words and leaves the rest out
            raise ConfigError(
                f"{name}: context_template_length_params has [{length}, {number}]; the second, of openings, must be a multiple of 5"
            )
    return settings_class(**kept)


def _refuse_another_method(name: str, values: Mapping[str, Any], known: Collection[str], baseline: Baseline) -> None:
    """Refuse settings without which the form of EasyEdit at hand would do something else under the same name.

    Raises:
        EasyEditError: naming them.
    """
    lacking = sorted((set(values) - set(known)) & baseline.decisive)
    if lacking:
        raise EasyEditError(
            f"the {find_form().kind} form of EasyEdit has no {', '.join(lacking)} for {name}, which makes it another method there; "
            "use a clone of its repository: EASYEDIT_HOME=<clone>"
        )
    if values.get("lora_type", "adalora") != "adalora" and "lora_type" not in known:
        raise EasyEditError(f"the {find_form().kind} form of EasyEdit has adalora alone, not {values['lora_type']!r}; use a clone")


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def make_contexts(name: str, model: LanguageModel, tokenizer: Tokenizer, hparams: Any, seed: int) -> None:
    """Draw an algorithm's random openings for this model, seeded, so that no edit's time holds it.

    EasyEdit keeps them, and second moments, in module globals, not per model: one model would be edited with another's.
    """
    load_easyedit()
    baseline = find_baseline(name)
    if not baseline.contexts:
        return
    main: Any = importlib.import_module(baseline.contexts)
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    main.CONTEXT_TEMPLATES_CACHE = None
    getattr(main, "COV_CACHE", {}).clear()
    lengths: Sequence[Any] = [hparams.context_template_length_params] if name == "ROME" else []
    with redirect_stdout(io.StringIO()), padded_on(tokenizer, "right"):
        main.get_context_templates(model, tokenizer, *lengths)
