"""What texts would write into each edited matrix: at every token an input x, and δ, the loss's gradient by the output.

A matrix's gradient is ``Σ δ xᵀ`` over tokens. Taken apart like this it can be had of some tokens alone, such as the subject's, and
each input can be weighed, before there is a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from propmeta_edit.models.forwards import replaced_forwards
from propmeta_edit.protocols import LanguageModel
from propmeta_edit.text.encoding import EncodedBatch


@dataclass(frozen=True)
class Write:
    """What R texts write into one projection.

    Attributes:
        inputs: x at the W tokens of each text that are written at, [R, W, in]; zero where a text has fewer.
        deltas: δ, [R, W, out].
        is_input_first: whether the model's own weight is [in, out], as GPT-2's.
    """

    inputs: torch.Tensor
    deltas: torch.Tensor
    is_input_first: bool

    def squares(self) -> torch.Tensor:
        """Each text's squared norm of ``Σ δ xᵀ``, [R], from products of tokens; no matrix is made."""
        return ((self.deltas @ self.deltas.mT) * (self.inputs @ self.inputs.mT)).sum(dim=(1, 2))

    def gradient(self, parameter: torch.Tensor, is_bias: bool) -> torch.Tensor:
        """``Σ δ xᵀ`` (of a bias ``Σ δ``) as a parameter has it: the model's own, or the stacked copies of N edits."""
        is_stacked = parameter.dim() == (2 if is_bias else 3)
        edits = len(parameter) if is_stacked else 1
        deltas, inputs = (value.reshape(edits, -1, value.shape[-1]) for value in (self.deltas, self.inputs))
        if is_bias:
            return deltas.sum(dim=1).view_as(parameter)
        if is_stacked or self.is_input_first:
            return torch.bmm(inputs.mT, deltas).view_as(parameter)
        return torch.bmm(deltas.mT, inputs).view_as(parameter)


class Writes:
    """Sees every forward pass of some projections, and gives what the last one would write into them."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[torch.Tensor, torch.Tensor, bool]] = {}

    def see(
        self, name: str, forward: Callable[[torch.Tensor], torch.Tensor], is_input_first: bool, x: torch.Tensor
    ) -> torch.Tensor:
        """What ``forward`` gives, as a tensor that a gradient can be asked of."""
        output = forward(x)
        self._seen[name] = x.detach(), output if output.requires_grad else output.requires_grad_(), is_input_first
        return output

    def take(self, loss: torch.Tensor, batch: EncodedBatch, dtype: torch.dtype) -> dict[str, Write]:
        """By projection, what the loss of a batch writes at ``batch.written``, or at all tokens; what led to the loss is used up.

        Args:
            loss: [], of the forward pass that was seen last.
            dtype: of the parameters.
        """
        seen, self._seen = self._seen, {}
        gradients = torch.autograd.grad(loss, [output for _, output, _ in seen.values()])
        found = {}
        for (name, (inputs, _, is_input_first)), deltas in zip(seen.items(), gradients, strict=True):
            if batch.written is not None:
                inputs, deltas = _taken_at(batch.written, inputs), _taken_at(batch.written, deltas)
            found[name] = Write(inputs.to(dtype), deltas.to(dtype), is_input_first)
        return found


def _taken_at(positions: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[R, T, ...] at positions [R, W]: [R, W, ...], zero where a position is -1."""
    positions = positions.to(values.device)[..., None]
    found = values.gather(1, positions.clamp_min(0).expand(-1, -1, values.shape[-1]))
    return found.masked_fill(positions < 0, 0.0)


@contextmanager
def seen_writes(model: LanguageModel, parameter_names: Iterable[str]) -> Iterator[Writes]:
    """Inside, forward passes of the projections that these parameters are of are seen; whatever computes them then goes on to."""
    writes, forwards = Writes(), {}
    for name in dict.fromkeys(name.rpartition(".")[0] for name in parameter_names):
        module: Any = model.get_submodule(name)
        forwards[module] = partial(writes.see, name, module.forward, isinstance(module, Conv1D))
    with replaced_forwards(forwards):
        yield writes


def gradients_of(writes: Mapping[str, Write], parameters: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each parameter's gradient in its own shape, one after another."""
    for name, parameter in parameters.items():
        path, _, leaf = name.rpartition(".")
        yield name, writes[path].gradient(parameter, is_bias=leaf == "bias")
