"""Layers that answer as EasyEdit's PyPI form expects.

Its MEMIT takes a layer's output for a tuple whose first part is the hidden state, as transformers gave it once; now a layer answers
with the hidden state itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from propmeta_edit.models.layers import get_blocks, get_final_norm


@contextmanager
def layers_answer_with_tuples(model: Any) -> Iterator[None]:
    """Inside, hooks on a layer see ``(hidden state,)``; the layer above and the final norm still get the hidden state."""
    blocks = get_blocks(model)
    readers = [*blocks[1:], get_final_norm(model)]
    handles = [block.register_forward_hook(_wrap, prepend=True) for block in blocks]
    handles += [reader.register_forward_pre_hook(_unwrap) for reader in readers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _wrap(module: Any, inputs: Any, output: Any) -> Any:
    return (output,) if isinstance(output, torch.Tensor) else output


def _unwrap(module: Any, inputs: Sequence[Any]) -> Any:
    first, *others = inputs
    return (first[0], *others) if isinstance(first, tuple) else None
