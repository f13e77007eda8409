"""What the edits that stand in a model were written at, so that those after them leave it alone.

Facts that are written one after another push each other out: subjects are alike, and what is written at one is read at the others.
So every token that a standing edit wrote at counts as one more token of ordinary text, ``C + Σ x xᵀ``, and is dear to the whitened
steps to come. An edit of a model in which none stands is what it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import nn

from propmeta_edit.finetune.input_moments import find_whiteners
from propmeta_edit.models.devices import in_double, sum_of_bits
from propmeta_edit.models.wrappers import unwrap
from propmeta_edit.protocols import LanguageModel

Inputs = Mapping[str, torch.Tensor]  # x of every token that was written at, [tokens, in], by the projection's path


@dataclass
class _Standing:
    """An edit's inputs, and by its parameters the sum of the bits that they had once it stood."""

    inputs: Inputs
    sums: dict[str, torch.Tensor]


@dataclass
class _Memory:
    """The edits in the order in which they came to stand, and the whiteners after the first ``number`` of them, by damping."""

    edits: list[_Standing] = field(default_factory=list)
    whiteners: dict[float, tuple[int, dict[str, torch.Tensor]]] = field(default_factory=dict)


_MEMORIES: WeakKeyDictionary[LanguageModel, _Memory] = WeakKeyDictionary()


def forget_replaced(model: LanguageModel) -> None:
    """Forget the edits that stand no more: those after the last one whose weights the model still has, to the bit.

    Weights that were put back, by an undo or by EasyEdit between two edits, so take their edits with them. Waits for the device, if
    there is any edit to be looked at.
    """
    memory = _MEMORIES.get(unwrap(model))
    if memory is None:
        return
    parameters = dict(model.named_parameters())
    while memory.edits and not _still_has(parameters, memory.edits[-1].sums):
        memory.edits.pop()
    memory.whiteners = {damping: known for damping, known in memory.whiteners.items() if known[0] <= len(memory.edits)}


def remember_inputs(model: LanguageModel, inputs: Inputs) -> None:
    """An edit was written at these, and stands in the model from now on; ``forget_replaced`` was called before it did."""
    if not inputs:
        return
    sums = {f"{path}.weight": sum_of_bits(model.get_parameter(f"{path}.weight")) for path in inputs}
    _MEMORIES.setdefault(unwrap(model), _Memory()).edits.append(_Standing(dict(inputs), sums))


def standing_whiteners(model: LanguageModel, weights: Mapping[str, nn.Parameter], damping: float) -> dict[str, torch.Tensor]:
    """For the projection of each weight ``(C + λ c I + Σ x xᵀ)⁻¹`` with the tokens that edits which stand in the model wrote at.

    Raises:
        ModelError: as ``require_input_moments``.
    """
    fresh = find_whiteners(model, weights, damping)
    forget_replaced(model)
    memory = _MEMORIES.get(unwrap(model))
    if memory is None or not memory.edits:
        return fresh
    number, found = memory.whiteners.get(damping, (0, fresh))
    if found.keys() != fresh.keys():  # those of other layers
        number, found = 0, fresh
    for edit in memory.edits[number:]:
        found = _after(edit.inputs, found)
    memory.whiteners[damping] = len(memory.edits), found
    return found


def _after(inputs: Inputs, whiteners: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``(M⁻¹ + Σ x xᵀ)⁻¹ = M − M Xᵀ (I + X M Xᵀ)⁻¹ X M``; what projections beside each other share is computed once."""
    done: dict[int, torch.Tensor] = {}
    found = {}
    for path, inverse in whiteners.items():
        if path in inputs and id(inverse) not in done:
            x = inputs[path].to(inverse)
            seen = x @ inverse  # X M
            small = in_double(seen) @ in_double(x).T
            small = small + torch.eye(len(x), dtype=small.dtype, device=small.device)
            done[id(inverse)] = inverse - seen.T @ torch.linalg.solve(small, in_double(seen)).to(inverse)
        found[path] = done.get(id(inverse), inverse)
    return found


def _still_has(parameters: Mapping[str, nn.Parameter], sums: Mapping[str, torch.Tensor]) -> bool:
    return all(name in parameters and bool(sum_of_bits(parameters[name]) == value) for name, value in sums.items())
