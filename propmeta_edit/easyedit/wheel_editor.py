"""What EasyEdit's PyPI form takes and silently ignores, supplied as the repository has it, or refused.

Its ``BaseEditor`` knows no ``sequential_edit`` and no ``requests=``, swallows unknown keywords, forgets all but the last chunk of a
batch, and returns no original weights unless ``keep_original_weight=True``, so that edits pile up unseen. Four of its methods are
replaced; the algorithms and the evaluation stay its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from propmeta_edit.easyedit.filled_prompts import fill_in_subject
from propmeta_edit.easyedit.layer_outputs import layers_answer_with_tuples, named_after
from propmeta_edit.errors import EasyEditError
from propmeta_edit.protocols import LanguageModel, Tokenizer

LOG = logging.getLogger(__name__)
EDIT_KEYWORDS = frozenset({"subject", "test_generation", "eval_metric", "train_ds"})
BATCH_KEYWORDS = frozenset({"subject", "test_generation"})
# These return no original weights: they change none, or have their own way to undo an edit, which keep_original_weight asks for.
WITHOUT_WEIGHTS = frozenset({"FT-Api", "IKE", "LoRA", "SERAC"})


def supply_missing() -> None:
    """Replace what is missing in the imported PyPI form, which today's peft and its own editor keep from running LoRA too."""
    from easyeditor.editors.editor import BaseEditor
    from easyeditor.models.lora import lora_main
    from easyeditor.util.alg_dict import ALG_DICT
    from easyeditor.util.hparams import HyperParams

    original = BaseEditor.edit_requests

    def edit_requests(self: Any, requests: Sequence[Mapping[str, Any]], **kwargs: Any) -> tuple[list[dict[str, Any]], Any, Any]:
        return _edit_requests(self, original, requests, **kwargs)

    BaseEditor.edit = _edit
    BaseEditor.edit_requests = edit_requests
    BaseEditor.batch_edit = _batch_edit
    BaseEditor.edit_dataset = _edit_dataset
    if not hasattr(HyperParams, "model_parallel"):
        HyperParams.model_parallel = False  # the editor reads it of LoRA's, which have none
    _fit_lora_to_peft(lora_main)
    ALG_DICT["MEMIT"] = partial(_apply_memit, ALG_DICT["MEMIT"])


def _apply_memit(apply: Any, model: LanguageModel, tok: Tokenizer, requests: Any, hparams: Any, **kwargs: Any) -> Any:
    """The wheel's MEMIT on layers that answer as it expects, with statistics under the name the repository looks for too, unless
    there are some under the wheel's own name for the model, its whole path."""
    has_own = (Path(hparams.stats_dir) / str(model.config._name_or_path).replace("/", "_")).is_dir()
    with layers_answer_with_tuples(model), nullcontext() if has_own else named_after(model, hparams.model_name):
        return apply(model, tok, requests, hparams, **kwargs)


def _fit_lora_to_peft(lora_main: Any) -> None:
    """Two things that peft has changed since the wheel was made."""
    get_peft_model = lora_main.get_peft_model

    def get_unloadable_model(model: LanguageModel, *args: Any, **kwargs: Any) -> Any:
        adapted = get_peft_model(model, *args, **kwargs)
        unload = adapted.unload

        def unload_leaving_config() -> Any:
            base = unload()
            base.peft_config = {}  # the wheel deletes it after unloading, where peft now has deleted it already
            return base

        adapted.unload = unload_leaving_config
        return adapted

    lora_main.get_peft_model = get_unloadable_model
    # peft now demands the step at which it prunes ranks; the wheel never lets it prune, so any number will do.
    lora_main.AdaLoraConfig = partial(lora_main.AdaLoraConfig, total_step=1)


# Beyond ground_truth the two forms order their parameters differently: by keyword none is taken for another.
def _edit(
    self: Any,
    prompts: str | list[str] | None = None,
    target_new: str | list[str] | None = None,
    ground_truth: str | list[str | None] | None = None,
    *,
    rephrase_prompts: str | list[str] | None = None,
    locality_inputs: dict[str, Any] | None = None,
    portability_inputs: dict[str, Any] | None = None,
    requests: Sequence[Mapping[str, Any]] | None = None,
    sequential_edit: bool = False,
    keep_original_weight: bool | None = None,
    verbose: bool = True,
    **kwargs: Any,
) -> tuple[list[dict[str, Any]], Any, Any]:
    """Edit one request after another; see the repository's ``BaseEditor.edit``.

    Raises:
        EasyEditError: neither prompts with targets nor requests, or a keyword that this form would ignore.
    """
    _refuse_unknown("edit", kwargs, EDIT_KEYWORDS)
    if requests is None:
        inputs = (rephrase_prompts, locality_inputs, portability_inputs)
        requests = _make_requests(self, prompts, target_new, ground_truth, inputs, kwargs)
    kwargs.pop("subject", None)
    choice = {"sequential_edit": sequential_edit, "keep_original_weight": keep_original_weight}
    result: tuple[list[dict[str, Any]], Any, Any] = self.edit_requests(requests, verbose=verbose, **choice, **kwargs)
    return result


def _edit_requests(
    self: Any,
    original: Callable[..., Any],
    requests: Sequence[Mapping[str, Any]],
    *,
    sequential_edit: bool = False,
    keep_original_weight: bool | None = None,
    verbose: bool = True,
    **kwargs: Any,
) -> tuple[list[dict[str, Any]], Any, Any]:
    """The wheel's own loop (all metrics before; then edit, metrics, restore), the restoring decided by ``sequential_edit``.

    Args:
        keep_original_weight: the wheel's word: False means ``sequential_edit=True``, as edits then stay.

    Returns:
        (metrics, edited model, the last edit's original weights). The wheel's own timing is in the metrics.

    Raises:
        EasyEditError: no requests, a keyword that this form would ignore, or a contradiction between the two words.
    """
    _refuse_unknown("edit_requests", kwargs, EDIT_KEYWORDS - {"subject"})
    if not requests:
        raise EasyEditError("there is no request to edit")
    sequential_edit = _edits_stay(sequential_edit, keep_original_weight)
    if self.alg_name == "LoRA" and (hasattr(self.model, "peft_config") or (sequential_edit and len(requests) > 1)):
        raise EasyEditError("LoRA in this form starts its adapter anew at each edit, which would drop the edit that is to stay")
    complete = [{"portability": {}, "locality": {}, **request} for request in requests]
    with _original_weights_kept(self, restore=not sequential_edit) as kept, _hparams_restored(self):
        result = original(self, complete, keep_original_weight=not sequential_edit, verbose=verbose, **kwargs)
    metrics, edited_model, weights = result
    return metrics, edited_model, kept.get("weights", weights)


def _edits_stay(sequential_edit: bool, keep_original_weight: bool | None) -> bool:
    """What either word says: ``keep_original_weight`` is the wheel's, False meaning ``sequential_edit=True``.

    Raises:
        EasyEditError: a contradiction.
    """
    if keep_original_weight and sequential_edit:
        raise EasyEditError("sequential_edit=True keeps the edits, keep_original_weight=True undoes them; give only one")
    return sequential_edit if keep_original_weight is None else not keep_original_weight


@contextmanager
def _original_weights_kept(editor: Any, restore: bool) -> Iterator[dict[str, Any]]:
    """Let every edit return its original weights; keep the last ones in the dict given, and hide them from the wheel, which
    restores whatever it sees, where it is not to restore."""
    apply = editor.apply_algo
    kept: dict[str, Any] = {}

    def apply_and_keep(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        model, weights = apply(*args, **{**kwargs, "keep_original_weight": True})
        kept["weights"] = weights
        nothing_to_restore: Any = (lambda: None) if callable(weights) else {}
        return model, weights if restore else nothing_to_restore

    if editor.alg_name not in WITHOUT_WEIGHTS:
        editor.apply_algo = apply_and_keep
    try:
        yield kept
    except BaseException:
        if restore and kept.get("weights"):
            _restore(editor.model, kept["weights"])
        raise
    finally:
        editor.apply_algo = apply


@contextmanager
def _hparams_restored(editor: Any) -> Iterator[None]:
    """The wheel's single edits set ``batch_size`` to 1 for good; a later ``batch_edit`` is to find what the user gave."""
    batch_size = getattr(editor.hparams, "batch_size", None)
    try:
        yield
    finally:
        if batch_size is not None:
            editor.hparams.batch_size = batch_size


def _batch_edit(
    self: Any,
    prompts: list[str],
    target_new: list[str],
    ground_truth: list[str | None] | None = None,
    *,
    rephrase_prompts: list[str] | None = None,
    locality_inputs: dict[str, Any] | None = None,
    portability_inputs: dict[str, Any] | None = None,
    sequential_edit: bool = False,
    keep_original_weight: bool | None = None,
    verbose: bool = True,
    **kwargs: Any,
) -> tuple[list[dict[str, Any]], Any, Any]:
    """Edit ``hparams.batch_size`` requests at a time; see the repository's ``BaseEditor.batch_edit``.

    Raises:
        EasyEditError: a method that edits one request only, no ``batch_size``, a keyword that this form would ignore, or a
            contradiction between ``sequential_edit`` and ``keep_original_weight``.
    """
    from easyeditor.editors.batch_editor import BatchEditor

    _refuse_unknown("batch_edit", kwargs, BATCH_KEYWORDS)
    sequential_edit = _edits_stay(sequential_edit, keep_original_weight)
    if not BatchEditor.is_batchable_method(self.alg_name):
        raise EasyEditError(f"{self.alg_name} edits one request at a time in this form of EasyEdit; use edit")
    inputs = (rephrase_prompts, locality_inputs, portability_inputs)
    requests = _make_requests(self, prompts, target_new, ground_truth, inputs, kwargs)
    test_generation = bool(kwargs.get("test_generation", False))
    return _edit_chunks(self, requests, _batch_size(self), sequential_edit, verbose, test_generation)


def _edit_dataset(
    self: Any, ds: Any, keep_original_weight: bool = True, verbose: bool = True
) -> tuple[list[dict[str, Any]], Any, Any]:
    """Edit the records of one of EasyEdit's data sets in chunks; the metrics are those of all records.

    Raises:
        EasyEditError: not one of EasyEdit's data sets, an empty one, or no ``batch_size``.
    """
    from easyeditor.editors.singleton_editor import SingletonEditor
    from easyeditor.util.alg_dict import DS_DICT

    known: Any = tuple(DS_DICT.values())
    if not isinstance(ds, known):
        names = ", ".join(kind.__name__ for kind in DS_DICT.values())
        raise EasyEditError(f"edit_dataset takes one of {names}, got {type(ds).__name__}")
    size = 1 if SingletonEditor.is_singleton_method(self.alg_name) else _batch_size(self)
    return _edit_chunks(self, [ds[number] for number in range(len(ds))], size, not keep_original_weight, verbose, False)


def _edit_chunks(
    editor: Any, requests: Sequence[dict[str, Any]], size: int, sequential_edit: bool, verbose: bool, test_generation: bool
) -> tuple[list[dict[str, Any]], Any, Any]:
    """Per chunk: metrics, edit, metrics, and the weights back unless the edits are sequential."""
    from easyeditor.evaluate import compute_edit_quality

    def score(model: LanguageModel, request: dict[str, Any]) -> dict[str, Any]:
        arguments = (model, editor.model_name, editor.hparams, editor.tok, request, editor.hparams.device)
        scores: dict[str, Any] = compute_edit_quality(*arguments, test_generation=test_generation)
        return scores

    if not requests:
        raise EasyEditError("there is no request to edit")
    keep = editor.alg_name not in WITHOUT_WEIGHTS or not sequential_edit
    metrics: list[dict[str, Any]] = []
    for start in range(0, len(requests), size):
        chunk = list(requests[start : start + size])
        before = [score(editor.model, request) for request in chunk]
        clock = perf_counter()
        arguments = (editor.model, editor.tok, chunk, editor.hparams)
        edited, weights = editor.apply_algo(*arguments, copy=False, return_orig_weights=True, keep_original_weight=keep)
        seconds = perf_counter() - clock
        try:
            for number, request in enumerate(chunk):
                after = score(edited, request)
                _add_locality_accuracy(before[number], after)
                case = {"case_id": request.get("case_id", number), "requested_rewrite": request}
                metrics.append({**case, "time": seconds, "pre": before[number], "post": after})
                if verbose:
                    LOG.info("%s -> %s: %s", request["prompt"], request["target_new"], metrics[-1])
        finally:
            if not sequential_edit:
                _restore(editor.model, weights)
        if sequential_edit:
            editor.model = edited
    return metrics, edited, weights


def _add_locality_accuracy(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Locality is the share of answer tokens that the edit left alone, by the name under which EasyEdit reports it."""
    import numpy

    for name, outputs in list(after["locality"].items()):
        pairs = zip(before["locality"][name], outputs, strict=True)
        accuracy = [float(numpy.mean(numpy.equal(old, new))) for old, new in pairs]
        after["locality"][name.removesuffix("_output") + "_acc"] = accuracy


def _restore(model: LanguageModel, weights: Any) -> None:
    """Undo an edit: some of EasyEdit's algorithms return a function for it, the others the values of before."""
    import torch

    from propmeta_edit.finetune.weights import apply_snapshot

    if callable(weights):
        with torch.no_grad():
            weights()
    else:
        apply_snapshot(dict(model.named_parameters()), weights)


def _make_requests(
    editor: Any, prompts: Any, target_new: Any, ground_truth: Any, inputs: tuple[Any, Any, Any], kwargs: Mapping[str, Any]
) -> list[dict[str, Any]]:
    if prompts is None or target_new is None:
        raise EasyEditError("an edit needs prompts and target_new, or requests")
    prompts, target_new = _as_list(prompts), _as_list(target_new)
    subjects = _as_list(kwargs["subject"]) if kwargs.get("subject") is not None else []
    if len(subjects) == len(prompts):  # EasyEdit says what is wrong with other numbers
        named = zip(prompts, subjects, strict=True)
        prompts = [fill_in_subject({"prompt": prompt, "subject": subject})["prompt"] for prompt, subject in named]
    # An end-of-text is the wheel's own default.
    ground_truth = ["<|endoftext|>"] * len(prompts) if ground_truth is None else _as_list(ground_truth)
    if not len(prompts) == len(target_new) == len(ground_truth):
        counts = f"{len(prompts)} prompts, {len(target_new)} targets, {len(ground_truth)} ground truths"
        raise EasyEditError(f"each prompt needs one target and one ground truth, got {counts}")
    subject = {"subject": kwargs["subject"]} if kwargs.get("subject") is not None else {}
    requests: list[dict[str, Any]] = editor._prepare_requests(prompts, target_new, ground_truth, *inputs, **subject)
    for request in requests:  # None: nothing of the kind for this request, as the repository has it
        for kind in ("locality", "portability"):
            request[kind] = {name: item for name, item in request[kind].items() if item["prompt"] is not None}
    return requests


def _as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else list(value)


def _batch_size(editor: Any) -> int:
    size = getattr(editor.hparams, "batch_size", None)
    if not isinstance(size, int) or size < 1:
        raise EasyEditError(f"the hyper-parameters of {editor.alg_name} need a batch_size of 1 or more, got {size!r}")
    return size


def _refuse_unknown(method: str, kwargs: Mapping[str, Any], allowed: frozenset[str]) -> None:
    unknown = sorted(name for name, value in kwargs.items() if name not in allowed and value is not None)
    if unknown:
        raise EasyEditError(
            f"{method}: EasyEdit's PyPI form would ignore {', '.join(unknown)}; beyond the named parameters it takes only "
            f"{', '.join(sorted(allowed))}. The repository may know more: clone it and set EASYEDIT_HOME"
        )
