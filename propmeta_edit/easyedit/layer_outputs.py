"""What EasyEdit's algorithms expect of a model and today's transformers no longer give.

The PyPI form's MEMIT takes a layer's output for a tuple whose first part is the hidden state, as transformers gave it once; now a
layer answers with the hidden state itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from propmeta_edit.baselines.second_moments import model_folder_name
from propmeta_edit.models.layers import ARCHITECTURES, get_blocks, get_final_norm
from propmeta_edit.protocols import LanguageModel


@contextmanager
def layers_answer_with_tuples(model: LanguageModel) -> Iterator[None]:
    """Inside, hooks on a layer see ``(hidden state,)``; the layer above and the final norm still get the hidden state.

    Models of architectures that are not known here are left as they are.
    """
    if model.config.model_type not in ARCHITECTURES:
        yield
        return
    blocks = get_blocks(model)
    readers = [*blocks[1:], get_final_norm(model)]
    handles = [block.register_forward_hook(_wrap, prepend=True) for block in blocks]
    handles += [reader.register_forward_pre_hook(_unwrap) for reader in readers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def named_after(model: LanguageModel, model_name: str) -> Iterator[None]:
    """Inside, the model goes by the last part of ``model_name``, under which its statistics are kept.

    The forms read that folder's name off the model's own name, one after its whole path, the other after its last part, which is a
    commit's hash for a model from the hub.
    """
    before = model.config._name_or_path
    model.config._name_or_path = model_folder_name(model_name)
    try:
        yield
    finally:
        model.config._name_or_path = before


def _wrap(module: Any, inputs: Any, output: Any) -> Any:
    return (output,) if isinstance(output, torch.Tensor) else output


def _unwrap(module: Any, inputs: Sequence[Any]) -> Any:
    first, *others = inputs
    return (first[0], *others) if isinstance(first, tuple) else None
