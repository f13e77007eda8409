"""Frozen projections on a CPU: each weight is laid out once as the processor reads it, instead of in every product.

A product of a dozen tokens with a matrix spends most of its time on rearranging the matrix. Weights that no step changes need that
only once, for one more copy of them a direction; docs/speed.md has what it gives.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from propmeta_edit.models.devices import sum_of_bits
from propmeta_edit.models.forwards import replaced_forwards
from propmeta_edit.models.frozen_blocks import find_frozen_blocks
from propmeta_edit.protocols import LanguageModel

LOG = logging.getLogger(__name__)
SMALLEST = 2**16  # numbers of a weight; below that the call costs more than the layout saves
SHARE_OF_MEMORY = 8  # the copies take at most an eighth of all there is; what is free would differ between a run and its resumption


@contextmanager
def packed_products(model: LanguageModel, trained: Collection[str]) -> Iterator[None]:
    """Inside, projections without trained parameters multiply by packed copies of their weights, forward and back, and blocks that
    are made of such projections are one operation each where a gradient goes through them (``models.frozen_blocks``).

    The copies are kept with the model and made anew when a weight has other numbers. The results differ from the plain products'
    by rounding alone. Nothing changes where it does not apply: on another device or processor, in another dtype, where there is no
    room, and where a module or one around it has been given another forward function (so inside another ``packed_products``).

    Args:
        trained: names of the parameters that are not frozen.
    """
    packed = _find_packed(model, trained)
    forwards = {module: one.forward for module, one in packed.items()}
    with replaced_forwards({**forwards, **{block: one.forward for block, one in find_frozen_blocks(model, packed).items()}}):
        yield


class PackedProjection:
    """A frozen ``nn.Linear`` or ``Conv1D`` [in → out], packed for one direction when that is first needed."""

    def __init__(self, module: nn.Linear | Conv1D) -> None:
        self._weight, self._bias = module.weight.detach(), module.bias
        self._is_linear = isinstance(module, nn.Linear)
        self._sum = int(sum_of_bits(self._weight))
        self._forward: torch.Tensor | None = None
        self._backward: torch.Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight, and of what it is multiplied with."""
        return self._weight.dtype

    def is_of(self, module: nn.Linear | Conv1D) -> bool:
        """Whether the module still has the numbers that were packed, to the bit but for one sum."""
        weight = module.weight
        is_same = weight.data_ptr() == self._weight.data_ptr() and weight.shape == self._weight.shape
        return is_same and module.bias is self._bias and int(sum_of_bits(weight)) == self._sum

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out]."""
        if torch.is_grad_enabled() and inputs.requires_grad:
            output: torch.Tensor = _PackedProduct.apply(inputs, self)  # type: ignore[no-untyped-call]
            return output
        return self.multiply(inputs)

    def multiply(self, inputs: torch.Tensor) -> torch.Tensor:
        """The same, without a gradient."""
        if self._forward is None:
            self._forward = _pack(self._weight if self._is_linear else self._weight.T)
        return _multiply(inputs, self._forward, self._bias)

    def multiply_back(self, gradient: torch.Tensor) -> torch.Tensor:
        """[..., out] → [..., in]: a gradient taken back to the inputs."""
        if self._backward is None:
            self._backward = _pack(self._weight.T if self._is_linear else self._weight)
        return _multiply(gradient, self._backward, None)


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, packed: PackedProjection) -> torch.Tensor:
        ctx.packed = packed
        return packed.multiply(inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.packed.multiply_back(gradient), None


_PACKED: WeakKeyDictionary[nn.Module, PackedProjection] = WeakKeyDictionary()


def _find_packed(model: LanguageModel, trained: Collection[str]) -> dict[nn.Module, PackedProjection]:
    with_trained = {name.rpartition(".")[0] for name in trained}
    frozen = [m for name, m in _named_untouched(model) if type(m) in (nn.Linear, Conv1D) and name not in with_trained]
    frozen = [module for module in frozen if _can_be_packed(module)]
    known = {module: packed for module in frozen if (packed := _PACKED.get(module)) is not None and packed.is_of(module)}
    new = [module for module in frozen if module not in known]
    size = 2 * sum(module.weight.nbytes for module in frozen)
    if size > psutil.virtual_memory().total // SHARE_OF_MEMORY:
        LOG.info("no room for packed copies of %d weights (%.1f GiB): plain products", len(frozen), size / 2**30)
        return {}
    for module in new:
        _PACKED[module] = known[module] = PackedProjection(module)
    return known


def _named_untouched(module: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All modules inside this one, but for those that were given another forward function and what is in them."""
    for name, child in module.named_children():
        if "forward" not in child.__dict__:
            yield path + name, child
            yield from _named_untouched(child, f"{path}{name}.")


def _can_be_packed(module: nn.Linear | Conv1D) -> bool:
    weight = module.weight
    is_plain = type(weight.data) is torch.Tensor and weight.device.type == "cpu" and weight.is_contiguous()
    return is_plain and weight.numel() >= SMALLEST and weight.nbytes % 8 == 0 and _has_packed_products(weight.dtype)


def _has_packed_products(dtype: torch.dtype) -> bool:
    """oneDNN's, as torch's own compiler calls them; measured on x86 only."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    ops = torch.ops.mkldnn
    if not hasattr(ops, "_linear_pointwise") or not hasattr(ops, "_reorder_linear_weight"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and bool(ops._is_mkldnn_bf16_supported()))


def _pack(matrix: torch.Tensor) -> torch.Tensor:
    """[out, in] in the processor's own layout."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous())
    return packed


def _multiply(inputs: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    outputs: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, packed, bias, "none", [], "")
    return outputs
