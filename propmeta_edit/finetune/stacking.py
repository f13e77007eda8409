"""Many edits at once: separate weights for each edit in the edited layers, one frozen model around them.

The frozen layers see one ordinary batch, in which the rows of an edit are neighbours; only the edited projections tell the edits
apart, by one batched matrix product with weights stacked along a new first dimension. Since AdamW works number by number and the
loss is summed over edits, one stacked optimiser does what many separate ones would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


@contextmanager
def stacked_weights(model: Any, parameters: Mapping[str, nn.Parameter], num_edits: int) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, the model answers row block n of any batch with the n-th copy of ``parameters``.

    The parameters themselves are left alone: whatever happens inside, the model outside is what it was, to the bit.

    Args:
        model: every parameter given belongs to one of its projections (``nn.Linear`` or ``Conv1D``).
        parameters: by their name in the model, as ``models.layers.select_parameters`` gives them.
        num_edits: N; batches inside must have a multiple of N rows.

    Yields:
        Copies by the same names, [N, *shape], with gradients on.
    """
    copies: dict[str, nn.Parameter] = {}
    projections: dict[str, dict[str, nn.Parameter]] = {}
    for name, value in parameters.items():
        module_name, _, leaf = name.rpartition(".")
        is_linear_weight = leaf == "weight" and not isinstance(model.get_submodule(module_name), Conv1D)
        copies[name] = nn.Parameter(_stack(value.detach(), num_edits, is_linear_weight))
        projections.setdefault(module_name, {})[leaf] = copies[name]
    modules = [model.get_submodule(name) for name in projections]
    try:
        for module, stack in zip(modules, projections.values(), strict=True):
            module.forward = _stacked_forward(stack["weight"], stack.get("bias"), isinstance(module, Conv1D))
        yield copies
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)  # the class's own shows again


def _stack(value: torch.Tensor, num_edits: int, in_columns: bool) -> torch.Tensor:
    """[N, *shape] copies; a matrix that products use transposed lies in memory that way, and so will its gradient."""
    if not in_columns:
        return value.expand(num_edits, *value.shape).clone(memory_format=torch.contiguous_format)
    return _stack(value.T, num_edits, False).transpose(1, 2)


def _stacked_forward(
    weight: torch.Tensor, bias: torch.Tensor | None, is_conv1d: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a projection with weights [N, out, in] (Conv1D: [N, in, out]) does to [N·B, ..., in], in the weights' dtype."""
    num_edits = weight.shape[0]

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        rows = inputs.to(weight.dtype).reshape(num_edits, -1, inputs.shape[-1])
        matrix = weight if is_conv1d else weight.transpose(1, 2)
        outputs = torch.bmm(rows, matrix) if bias is None else torch.baddbmm(bias[:, None, :], rows, matrix)
        return outputs.reshape(*inputs.shape[:-1], -1).to(inputs.dtype)

    return forward
