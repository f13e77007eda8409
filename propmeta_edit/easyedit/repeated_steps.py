"""What the steps of ROME, MEMIT and AlphaEdit have in common is computed once, not in each of their 25 steps.

Each step sends the same few texts through the model, with one vector added at one layer. EasyEdit's code stays as it is; what the
model does inside it changes by rounding alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from propmeta_edit.models.forwards import replaced_forwards
from propmeta_edit.models.layers import get_blocks
from propmeta_edit.models.packed import packed_products
from propmeta_edit.protocols import LanguageModel


@contextmanager
def quick_steps(model: LanguageModel, written: Mapping[str, torch.Tensor], layer: int, is_memits: bool) -> Iterator[None]:
    """Inside, the blocks below ``layer`` answer a batch they have just seen from memory, and frozen projections are packed.

    The second is for CPUs (``models.packed`` says where it applies).

    Args:
        written: the parameters that the edit writes to, by name.
        layer: the first at which a vector is added, 0-based.
        is_memits: the steps are those of the PyPI form's MEMIT. It multiplies by the head's matrix past the head's module; of the
            model's own logits it reads those of the last text alone, and they are computed for no other.
    """
    head: Any = model.get_output_embeddings()
    with packed_products(model, written):
        forwards: dict[nn.Module, Any] = {block: _Remembering(block) for block in get_blocks(model)[:layer]}
        products: AbstractContextManager[object] = nullcontext()
        if is_memits and type(head) is nn.Linear and head.bias is None:
            products = _ThroughTheHead(head) if "forward" in head.__dict__ else products
            forwards[head] = partial(_answer_last_text, head.forward)
        with replaced_forwards(forwards), products:
            yield


def _answer_last_text(forward: Any, states: torch.Tensor) -> torch.Tensor:
    """[texts, tokens, hidden] -> [1, tokens, vocabulary] in a step; all of them elsewhere."""
    logits: torch.Tensor = forward(states[-1:] if torch.is_grad_enabled() else states)
    return logits


class _Remembering:
    """A block's forward function that computes nothing where inputs and weights are those of the last call with a gradient."""

    def __init__(self, block: nn.Module) -> None:
        self._forward, self._parameters = block.forward, list(block.parameters())
        self._asked: Any = None
        self._answer: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or any(_needs_gradient(value) for value in (*args, *kwargs.values())):
            return self._forward(*args, **kwargs)  # texts are read once each here, or are being generated
        asked = (args, kwargs, [parameter._version for parameter in self._parameters])
        if self._asked is None or not _is_same(self._asked, asked):
            self._answer, self._asked = self._forward(*args, **kwargs), asked
        return self._answer


def _needs_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _is_same(one: Any, other: Any) -> bool:
    """Whether tensors and numbers are equal; caches of keys and values, which no step reads, are not looked into."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_is_same(value, other[name]) for name, value in one.items())
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return type(one) is type(other) and (one == other if isinstance(one, int | float | str) else True)


class _ThroughTheHead(TorchFunctionMode):
    """``states @ head.weight.T`` is ``head(states)``."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self._forward, self._weight = head.forward, head.weight.T

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func in _PRODUCTS and len(args) == 2 and self._is_the_heads(args[1]):
            return self._forward(args[0])
        return func(*args, **(kwargs or {}))

    def _is_the_heads(self, matrix: torch.Tensor) -> bool:
        own = self._weight
        return matrix.data_ptr() == own.data_ptr() and matrix.shape == own.shape and matrix.stride() == own.stride()


_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
