"""What enters each projection over ordinary text, as second moments: what a step can weigh its directions with.

They are those a model was given, or those in its folder (a checkpoint has the ones it was meta-trained with), or are gathered on
first use by what was registered for that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from propmeta_edit.errors import ModelError
from propmeta_edit.models.artefacts import INPUT_MOMENTS, MAKERS
from propmeta_edit.models.devices import in_double
from propmeta_edit.models.wrappers import unwrap
from propmeta_edit.protocols import LanguageModel

FILE = "input_moments.safetensors"  # in a model's folder


class InputMoments:
    """``C = E[x xᵀ]`` of the inputs of a model's projections, [in, in] each, by the name of the module.

    Projections that read the same states, such as queries, keys and values, may be given one tensor: its inverse is computed once.
    """

    def __init__(self, moments: Mapping[str, torch.Tensor]) -> None:
        self.moments = dict(moments)
        first: dict[int, str] = {}
        self._reads_as = {module: first.setdefault(id(value), module) for module, value in self.moments.items()}
        self._inverses: dict[tuple[str, float, torch.device], torch.Tensor] = {}

    def inverse(self, module: str, damping: float, device: torch.device) -> torch.Tensor:
        """``(C + λ c I)⁻¹`` on a device, c the mean of C's diagonal; computed once, and kept there."""
        key = (self._reads_as[module], damping, device)
        if key not in self._inverses:
            wide = in_double(self.moments[module])
            damped = wide + damping * wide.diagonal().mean() * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped)).to(self.moments[module])
            self._inverses[key] = inverse.to(device)
        return self._inverses[key]


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
        found = {**found, **(MAKERS[INPUT_MOMENTS](name, missing, str(model.device)) if missing else {})}
        give_input_moments(model, _shared(found))
    return _GIVEN[model]  # type: ignore[index]


def _shared(moments: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with one tensor for those modules beside each other whose moments are the same to the bit: they read the same."""
    found: dict[str, torch.Tensor] = {}
    for module, value in moments.items():
        beside = [other for name, other in found.items() if name.rpartition(".")[0] == module.rpartition(".")[0]]
        found[module] = next((other for other in beside if other.shape == value.shape and torch.equal(other, value)), value)
    return found


def write_input_moments(moments: InputMoments, folder: Path) -> None:
    """Put them into a model's folder, where its edits find them."""
    save_file({name: value.cpu().contiguous().clone() for name, value in moments.moments.items()}, folder / FILE)


def find_whiteners(model: LanguageModel, weights: Iterable[str], damping: float) -> dict[str, torch.Tensor]:
    """For the projection of each weight ``(C + λ c I)⁻¹``, c the mean of C's diagonal, where the weight is; biases have none.

    Raises:
        ModelError: as ``require_input_moments``.
    """
    weights = [name for name in weights if name.endswith(".weight")]
    given = require_input_moments(model, weights)
    return {
        name.removesuffix(".weight"): given.inverse(name.removesuffix(".weight"), damping, model.get_parameter(name).device)
        for name in weights
    }
