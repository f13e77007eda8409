"""EasyEdit's own editors for the benchmark: their settings read strictly, their apply functions found in either form."""

from __future__ import annotations

import dataclasses
import io
import random
from collections.abc import Mapping
from contextlib import redirect_stdout
from functools import partial
from typing import Any

import numpy
import torch

from propmeta_edit.easyedit.forms import find_form, load_easyedit
from propmeta_edit.errors import ConfigError, EasyEditError


def find_algorithm(name: str) -> Any:
    """The apply function of an EasyEdit algorithm.

    Raises:
        EasyEditError: EasyEdit is missing, or the form at hand has no such algorithm.
    """
    load_easyedit()
    from easyeditor.util.alg_dict import ALG_DICT

    if name not in ALG_DICT:
        raise EasyEditError(f"the {find_form().kind} form of EasyEdit has no {name}; it has {', '.join(ALG_DICT)}")
    return partial(_call_quietly, ALG_DICT[name])


def _call_quietly(apply: Any, *args: Any, **kwargs: Any) -> Any:
    """EasyEdit's algorithms print every step, which would tear a progress bar apart."""
    with redirect_stdout(io.StringIO()):
        return apply(*args, **kwargs)


def make_rome_hparams(values: Mapping[str, Any]) -> Any:
    """EasyEdit's ROME settings, with keys that the form at hand does not know refused.

    Raises:
        ConfigError: unknown or missing settings.
    """
    load_easyedit()
    from easyeditor.models.rome import ROMEHyperParams

    fields = {f.name: f for f in dataclasses.fields(ROMEHyperParams)}
    unknown = sorted(set(values) - set(fields))
    missing = sorted(n for n, f in fields.items() if n not in values and f.default is dataclasses.MISSING)
    if unknown or missing:
        raise ConfigError(f"ROME: unknown settings {unknown}, missing settings {missing}")
    return ROMEHyperParams(**values)


def make_rome_contexts(model: Any, tokenizer: Any, hparams: Any, seed: int) -> None:
    """Draw ROME's random openings for this model, seeded, so that no edit's time holds it.

    EasyEdit keeps them in a module global, not per model: without this one model would be edited with another's.
    """
    load_easyedit()
    from easyeditor.models.rome import rome_main

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    rome_main.CONTEXT_TEMPLATES_CACHE = None
    padding_side, tokenizer.padding_side = tokenizer.padding_side, "right"
    try:
        with redirect_stdout(io.StringIO()):
            rome_main.get_context_templates(model, tokenizer, hparams.context_template_length_params)
    finally:
        tokenizer.padding_side = padding_side
