"""What enters each projection over ordinary text, as second moments: what a step can weigh its directions with.

They are those a model was given, or those in its folder (a checkpoint has the ones it was meta-trained with), or are gathered on
first use by what was registered for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from propmeta_edit.errors import ModelError
from propmeta_edit.models.artefacts import INPUT_MOMENTS, MAKERS
from propmeta_edit.models.devices import in_double
from propmeta_edit.models.wrappers import unwrap
from propmeta_edit.protocols import LanguageModel

FILE = "input_moments.safetensors"  # in a model's folder
Whiten = Callable[[torch.Tensor], torch.Tensor]  # a gradient to D


class InputMoments:
    """``C = E[x xᵀ]`` of the inputs of a model's projections, [in, in] each, by the name of the module."""

    def __init__(self, moments: Mapping[str, torch.Tensor]) -> None:
        self.moments = dict(moments)
        self._inverses: dict[tuple[str, float], torch.Tensor] = {}

    def inverse(self, module: str, damping: float) -> torch.Tensor:
        """``(C + λ c I)⁻¹``, c the mean of C's diagonal; computed once."""
        if (module, damping) not in self._inverses:
            wide = in_double(self.moments[module])
            damped = wide + damping * wide.diagonal().mean() * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped)).to(self.moments[module])
            self._inverses[module, damping] = inverse
        return self._inverses[module, damping]


_GIVEN: WeakKeyDictionary[nn.Module, InputMoments] = WeakKeyDictionary()


def give_input_moments(model: LanguageModel, moments: Mapping[str, torch.Tensor]) -> None:
    """Let the edits of a model weigh their directions with these, as long as it lives.

    Args:
        moments: by the name of the module, [in, in] in fp32 or wider.
    """
    _GIVEN[unwrap(model)] = InputMoments(moments)  # type: ignore[index]


def require_input_moments(model: LanguageModel, weights: Iterable[str]) -> InputMoments:
    """A model's moments, found or gathered for at least these weights; call it while the model is as it was loaded.

    Raises:
        ModelError: the model was given others, or was loaded from no folder.
    """
    modules = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    given = _GIVEN.get(model)  # type: ignore[call-overload]
    if given is None or not set(modules) <= set(given.moments):
        name = getattr(model.config, "_name_or_path", "")
        if given is not None or not name or not Path(name).is_dir():
            lacking = next(module for module in modules if given is None or module not in given.moments)
            raise ModelError(
                f"the whitened step needs the second moments of what enters {lacking}; load the model from a folder, whose own are "
                "then gathered, or give them with propmeta_edit.finetune.input_moments.give_input_moments"
            )
        file = Path(name) / FILE
        found = load_file(file) if file.is_file() else {}
        missing = [module for module in modules if module not in found]
        give_input_moments(model, {**found, **(MAKERS[INPUT_MOMENTS](name, missing, str(model.device)) if missing else {})})
    return _GIVEN[model]  # type: ignore[index]


def write_input_moments(moments: InputMoments, folder: Path) -> None:
    """Put them into a model's folder, where its edits find them."""
    save_file({name: value.cpu().contiguous() for name, value in moments.moments.items()}, folder / FILE)


def find_whiteners(model: LanguageModel, weights: Iterable[str], damping: float) -> list[Whiten]:
    """For each weight what turns its gradient G, in the shape that it comes in, into ``G (C + λ c I)⁻¹``.

    Raises:
        ModelError: as ``require_input_moments``.
    """
    weights = list(weights)
    given = require_input_moments(model, weights)
    found: list[Whiten] = []
    for module in (name.removesuffix(".weight") for name in weights):
        projection: Any = model.get_submodule(module)
        inverse = given.inverse(module, damping).to(projection.weight.device)
        found.append(partial(_whiten, inverse, isinstance(projection, Conv1D)))
    return found


def _whiten(inverse: torch.Tensor, is_input_first: bool, gradient: torch.Tensor) -> torch.Tensor:
    """Stacked copies [N, in, out] have their input first, whatever the projection."""
    return inverse @ gradient if is_input_first or gradient.dim() == 3 else gradient @ inverse
