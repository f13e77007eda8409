"""Many edits at once: separate weights for each edit in the edited layers, one frozen model around them.

The frozen layers see one ordinary batch, in which the rows of an edit are neighbours; only the edited projections tell the edits
apart, by one batched matrix product with weights stacked along a new first dimension. Since AdamW works number by number and the
loss is summed over edits, one stacked optimiser does what many separate ones would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from propmeta_edit.finetune.buffers import buffer
from propmeta_edit.models.forwards import replaced_forwards
from propmeta_edit.protocols import LanguageModel


class StackedWeights:
    """N copies of some projections' parameters.

    Attributes:
        parameters: by their name in the model, contiguous: biases [N, out], matrices [N, in, out] for every kind of projection,
            so that neither products nor optimisers have to transpose or copy them.
    """

    def __init__(self, model: LanguageModel, parameters: Mapping[str, nn.Parameter], num_edits: int) -> None:
        self._is_transposed = {
            name: name.endswith(".weight") and not isinstance(_projection(model, name), Conv1D) for name in parameters
        }
        self.parameters = {name: self._copies_of(name, value.detach(), num_edits) for name, value in parameters.items()}

    def _copies_of(self, name: str, value: torch.Tensor, num_edits: int) -> nn.Parameter:
        every = self._oriented(name, value).expand(num_edits, *[-1] * value.dim())
        return nn.Parameter(buffer(f"copies of {name}", every, _make_contiguous).copy_(every))

    @property
    def moved(self) -> Mapping[str, torch.Tensor]:
        """The copies themselves."""
        return self.parameters

    def sum_over_edits(self, gradients: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """One contiguous tensor a parameter, in the model's own shape, from one stacked tensor each."""
        return tuple(self._oriented(name, g.sum(dim=0)).contiguous() for name, g in zip(self.parameters, gradients, strict=True))

    def take(self, number: int) -> dict[str, torch.Tensor]:
        """The parameters of one edit, in the model's own shapes and strides."""
        return {name: self._oriented(name, value.detach()[number]).contiguous() for name, value in self.parameters.items()}

    def put(self, number: int, values: Mapping[str, torch.Tensor]) -> None:
        """Give one edit other values, in the model's own shapes."""
        with torch.no_grad():
            for name, value in values.items():
                self.parameters[name][number].copy_(self._oriented(name, value))

    def _oriented(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Between a parameter's own shape and that of its copies; its own inverse."""
        return value.T if self._is_transposed[name] else value


def _make_contiguous(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


@contextmanager
def stacked_weights(model: LanguageModel, parameters: Mapping[str, nn.Parameter], num_edits: int) -> Iterator[StackedWeights]:
    """Inside, the model answers row block n of any batch with the n-th copy of ``parameters``.

    The parameters themselves are left alone: whatever happens inside, the model outside is what it was, to the bit.

    Args:
        model: every parameter given belongs to one of its projections (``nn.Linear`` or ``Conv1D``).
        parameters: by their name in the model, as ``models.layers.select_parameters`` gives them.
        num_edits: N; batches inside must have a multiple of N rows.
    """
    stack = StackedWeights(model, parameters, num_edits)
    forwards = {
        _projection(model, name): _stacked_forward(weight, stack.parameters.get(name.removesuffix("weight") + "bias"))
        for name, weight in stack.parameters.items()
        if name.endswith(".weight")
    }
    with replaced_forwards(forwards):
        yield stack


def _projection(model: LanguageModel, parameter_name: str) -> Any:
    return model.get_submodule(parameter_name.rpartition(".")[0])


def _stacked_forward(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a projection with weights [N, in, out] does to [N·B, ..., in], in the weights' dtype."""

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        rows = inputs.to(weight.dtype).reshape(len(weight), -1, inputs.shape[-1])
        outputs = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias[:, None, :], rows, weight)
        return outputs.reshape(*inputs.shape[:-1], -1).to(inputs.dtype)

    return forward
