"""Where a decoder keeps its parts, found from its modules: their types, names and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from propmeta_edit.protocols import LanguageModel

_ATTENTION = re.compile("attn|attention", re.IGNORECASE)
_TO_ANOTHER_TEXT = re.compile("cross|encoder_att", re.IGNORECASE)
_NORM = re.compile("norm|ln_|_ln", re.IGNORECASE)


@dataclass(frozen=True)
class Architecture:
    """Where a decoder keeps its blocks and final norm, and, inside a block, its attention, MLP and that one's second projection.

    Attributes:
        blocks: path of the list in the model.
        attention: names in a block of what attends to the text itself, attention to another one left out.
        mlp: names in a block of all other projections, or of what holds them; empty for a mixture of experts.
        mlp_output: path in a block; empty without an MLP.
        final_norm: path in the model; empty where there is none.
    """

    blocks: str
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    mlp_output: str
    final_norm: str


def find_layout(model: LanguageModel) -> Architecture | None:
    """The layout of a model that is a list of blocks, each of an attention and an MLP made of linear layers; None for others.

    What mixes tokens otherwise (state spaces, convolutions), and blocks that differ in kind, are among the others.
    """
    whole: Any = model
    base = getattr(whole, "base_model", whole)
    prefix = next((f"{name}." for name, module in whole.named_children() if module is base), "")
    found = {path: blocks for path, blocks in _lists_of_blocks(base) if all(_parts_of(blocks[0]))}
    if len(found) != 1:  # of an encoder and a decoder, say
        return None
    [(path, blocks)] = found.items()
    attention, mlp = _parts_of(blocks[0])
    if any(_parts_of(block) != (attention, mlp) for block in blocks) or not _all_attend_alike(blocks, attention):
        return None
    is_sparse = any(_is_sparse(block.get_submodule(name)) for block in blocks for name in mlp)
    output = "" if is_sparse else _find_output(blocks[0], mlp, _hidden_size(model))
    if output is None:
        return None
    return Architecture(prefix + path, attention, () if is_sparse else mlp, output, _find_final_norm(base, path, prefix))


def is_projection(module: nn.Module) -> bool:
    """Whether it multiplies by one matrix."""
    return isinstance(module, nn.Linear | Conv1D)


def _lists_of_blocks(base: nn.Module) -> Iterable[tuple[str, nn.ModuleList]]:
    lists = [(name, module) for name, module in base.named_modules() if isinstance(module, nn.ModuleList)]
    return [(name, blocks) for name, blocks in lists if len(blocks) and all(map(_has_projection, blocks))]


def _has_projection(module: nn.Module) -> bool:
    return any(is_projection(part) for part in module.modules())


def _parts_of(block: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The children of a block that attend to the text itself, and those others that project, a mixture of experts included."""
    parts = {name: child for name, child in block.named_children() if _has_projection(child) or _is_sparse(child)}
    attending = [name for name, child in parts.items() if _ATTENTION.search(f"{name} {type(child).__name__}")]
    own = tuple(name for name in attending if not _TO_ANOTHER_TEXT.search(name))
    return own, tuple(name for name in parts if name not in attending)


def _all_attend_alike(blocks: nn.ModuleList, attention: Iterable[str]) -> bool:
    """Whether every block has the same kind of attention, in matrices that every token uses, and nothing else along the text."""
    kinds = {tuple(type(block.get_submodule(name)) for name in attention) for block in blocks}
    is_sparse = any(_is_sparse(block.get_submodule(name)) for block in blocks for name in attention)
    return len(kinds) == 1 and not is_sparse and not any(isinstance(module, nn.Conv1d) for module in blocks.modules())


def _is_sparse(module: nn.Module) -> bool:
    """Whether only some of its matrices are used for a token: experts, in a list or stacked in one tensor."""
    has_stacks = any(parameter.dim() > 2 for parameter in module.parameters())
    return has_stacks or any(isinstance(part, nn.ModuleList) and any(map(_has_projection, part)) for part in module.modules())


def _hidden_size(model: LanguageModel) -> int:
    return int(model.config.get_text_config().hidden_size)


def _find_output(block: nn.Module, mlp: Iterable[str], hidden_size: int) -> str | None:
    """The last projection of an MLP that leads back to the block's own width, the one from another width if there is one."""
    shapes: dict[str, tuple[int, int]] = {}
    for child in mlp:
        for name, module in block.get_submodule(child).named_modules(prefix=child):
            if is_projection(module):
                rows, columns = module.weight.shape  # type: ignore[union-attr, misc]
                shapes[name] = (int(rows), int(columns)) if isinstance(module, Conv1D) else (int(columns), int(rows))
    leading_back = [name for name, (_, out) in shapes.items() if out == hidden_size]
    from_another = [name for name in leading_back if shapes[name][0] != hidden_size]
    return next(reversed(from_another or leading_back), None)


def _find_final_norm(base: nn.Module, blocks: str, prefix: str) -> str:
    """The last norm beside the list of blocks, preferably after it; "" if there is none."""
    holder, _, own = blocks.rpartition(".")
    modules = dict(base.get_submodule(holder).named_children())
    children = list(modules)
    named = [name for name, module in modules.items() if _NORM.search(f"{name} {type(module).__name__}")]
    norms = [name for name in named if "emb" not in name and not _has_projection(modules[name])]
    after = [name for name in norms if children.index(name) > children.index(own)]
    return next((f"{prefix}{holder}{holder and '.'}{name}" for name in reversed(after or norms)), "")
