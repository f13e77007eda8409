"""A frozen block of a Llama-like decoder on a CPU as one operation: the same arithmetic, without a graph of its small steps.

Of a block's time on a dozen tokens a third goes into a hundred calls that each move a few kilobytes. Here a block is one node of
the graph, whose gradient is written out; docs/speed.md has what it gives. It is for blocks that are known to compute this, and each
is tried once all the same, on the first states that it is given. Where it differs, and wherever else it does not apply, the block's
own forward function runs.

Of texts side by side a block computes the tokens that something is read from, and neither padding nor what stands behind the last
token that is read (``tokens_read``): to the numbers that are read they do not matter.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F

from propmeta_edit.models.devices import is_out_of_memory
from propmeta_edit.models.forwards import NoCache
from propmeta_edit.models.shortcuts import are_close
from propmeta_edit.protocols import LanguageModel

LOG = logging.getLogger(__name__)
KNOWN = [f"transformers.models.{name.lower()}.modeling_{name.lower()}.{name}DecoderLayer" for name in ("Llama", "Mistral", "Qwen2")]
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
WORTH_LEAVING_OUT = 0.1  # of all tokens; the calls for fewer cost more
_TRIED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_READ: ContextVar[torch.Tensor | None] = ContextVar("tokens that are read", default=None)


class Product(Protocol):
    """A frozen projection, forward and back."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its weight."""
        ...

    def multiply(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out], without a gradient."""
        ...

    def multiply_back(self, gradient: torch.Tensor) -> torch.Tensor:
        """[..., out] → [..., in]."""
        ...


@contextmanager
def tokens_read(read: torch.Tensor | None) -> Iterator[None]:
    """Inside, frozen blocks need give states of these tokens alone; what they give of the others is nothing that means anything.

    Args:
        read: numbers of tokens among all B·T of the batch, [M], with all that stand before one of them in its text; None for all,
            as where so few are left out that the calls for it cost more.
    """
    token = _READ.set(read)
    try:
        yield
    finally:
        _READ.reset(token)


def find_frozen_blocks(model: LanguageModel, packed: Mapping[nn.Module, Product]) -> dict[nn.Module, FrozenBlock]:
    """The blocks of known kinds all of whose projections are packed."""
    known = [module for module in model.modules() if f"{type(module).__module__}.{type(module).__qualname__}" in KNOWN]
    return {block: FrozenBlock(block, packed) for block in known if _is_untouched(block, packed)}


def _is_untouched(block: Any, packed: Mapping[nn.Module, Product]) -> bool:
    projections = [getattr(block.self_attn, name) for name in ATTENTION] + [getattr(block.mlp, name) for name in MLP]
    inside = [module for module in block.modules() if module is not block]
    are_packed = all(module in packed for module in projections)
    return are_packed and "forward" not in block.__dict__ and not any(_is_watched(module) for module in inside)


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody's hook or function stands in a module, which would not be called."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" in module.__dict__ or any(hooks)


class FrozenBlock:
    """Two norms, attention with rotary embeddings and grouped keys, and a gated MLP, with packed projections."""

    def __init__(self, block: Any, packed: Mapping[nn.Module, Product]) -> None:
        self._block, self._plain = block, block.forward
        self.attention_norm, self.mlp_norm = block.input_layernorm, block.post_attention_layernorm
        self.head_size, self.scale = block.self_attn.head_dim, block.self_attn.scaling
        self.query, self.key, self.value, self.output = (packed[getattr(block.self_attn, name)] for name in ATTENTION)
        self.gate, self.up, self.down = (packed[getattr(block.mlp, name)] for name in MLP)

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, position_embeddings: Any = None, **more: Any) -> Any:
        """[B, T, hidden] → [B, T, hidden], as transformers calls a block."""
        given = {"attention_mask": attention_mask, "position_embeddings": position_embeddings, **more}
        if not self._applies(hidden_states, given):
            return self._plain(hidden_states, **given)
        if self._block not in _TRIED:
            _TRIED[self._block] = self._agrees(hidden_states.detach(), given)
        if not _TRIED[self._block]:
            return self._plain(hidden_states, **given)
        return _apply(hidden_states, self, *position_embeddings, attention_mask, _READ.get())

    def _applies(self, hidden_states: torch.Tensor, given: Mapping[str, Any]) -> bool:
        """Whether a gradient is wanted, attention is a plain product with a mask that is added, and nothing is kept or dropped."""
        mask, caches = given["attention_mask"], (given.get("past_key_values"), given.get("cache"))
        return (
            torch.is_grad_enabled()
            and hidden_states.requires_grad
            and isinstance(mask, torch.Tensor)
            and mask.dtype == hidden_states.dtype == self.query.dtype
            and all(cache is None or isinstance(cache, NoCache) for cache in caches)
            and not (self._block.training and self._block.self_attn.attention_dropout)
        )

    def _agrees(self, states: torch.Tensor, given: Mapping[str, Any]) -> bool:
        with torch.no_grad():
            expected = self._plain(states, **given)
            try:
                found = _apply(states, self, *given["position_embeddings"], given["attention_mask"], None)
            except Exception as error:  # whatever another version of transformers has in a block
                if is_out_of_memory(error):
                    raise
                found = None
        is_same = isinstance(expected, torch.Tensor) and found is not None and are_close(expected, found)
        if not is_same:
            LOG.info("%s computes something else than it is known for: the plain way", type(self._block).__name__)
        return is_same


class _BlockFunction(torch.autograd.Function):
    """The forward pass rounds where transformers' does; the backward pass is its gradient, from the same rounded numbers.

    Of the M tokens that are read, [M, ...], but for attention, which needs them in their texts.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        block: FrozenBlock,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor,
        read: torch.Tensor | None,
    ) -> torch.Tensor:
        tokens, size = _Tokens(hidden, read), block.head_size
        cos, sin = (tokens.take(part.expand(*hidden.shape[:2], -1))[:, None] for part in (cos, sin))  # the same for all heads
        states = tokens.take(hidden)
        normed, unit, scale = _norm(states, block.attention_norm)
        query, key = (_rotate(_heads(part.multiply(normed), size), cos, sin) for part in (block.query, block.key))
        groups = query.shape[1] // key.shape[1]
        value = _heads(block.value.multiply(normed), size)
        query, key, value = _stack(tokens.put(query), groups), _stack(tokens.put(key)), _stack(tokens.put(value))
        scores = torch.bmm(query, key.transpose(1, 2)).mul_(block.scale)
        scores.view(len(hidden), -1, *mask.shape[-2:]).add_(mask)
        weights = torch.softmax(scores, dim=-1)
        attended = tokens.take(_unstack(torch.bmm(weights, value), len(hidden), groups).flatten(2))
        middle = block.output.multiply(attended).add_(states)
        normed, middle_unit, middle_scale = _norm(middle, block.mlp_norm)
        gate, up = block.gate.multiply(normed), block.up.multiply(normed)
        opened = F.silu(gate)
        ctx.block, ctx.tokens = block, tokens
        ctx.save_for_backward(cos, sin, unit, scale, query, key, value, weights, middle_unit, middle_scale, gate, up, opened)
        return tokens.put(block.down.multiply(opened * up).add_(middle))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        block, tokens, size, batch = ctx.block, ctx.tokens, ctx.block.head_size, len(gradient)
        cos, sin, unit, scale, query, key, value, weights, middle_unit, middle_scale, gate, up, opened = ctx.saved_tensors
        groups = query.shape[1] // key.shape[1]
        gradient = tokens.take(gradient)
        of_product = block.down.multiply_back(gradient)
        of_normed = block.up.multiply_back(of_product * opened)
        of_normed += block.gate.multiply_back(torch.ops.aten.silu_backward(of_product.mul_(up), gate))
        of_middle = _norm_back(of_normed, block.mlp_norm, middle_unit, middle_scale).add_(gradient)
        of_attended = _stack(tokens.put(_heads(block.output.multiply_back(of_middle), size)), groups)
        of_value = torch.bmm(weights.transpose(1, 2), of_attended)
        of_weights = torch.bmm(of_attended, value.transpose(1, 2))
        of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype).mul_(block.scale)
        of_query = tokens.take(_unstack(torch.bmm(of_scores, key), batch, groups))
        of_key = tokens.take(_unstack(torch.bmm(of_scores.transpose(1, 2), query), batch))
        of_normed = block.query.multiply_back(_rotate_back(of_query, cos, sin).flatten(1))
        of_normed += block.key.multiply_back(_rotate_back(of_key, cos, sin).flatten(1))
        of_normed += block.value.multiply_back(tokens.take(_unstack(of_value, batch)).flatten(1))
        found = _norm_back(of_normed, block.attention_norm, unit, scale).add_(of_middle)
        return tokens.put(found), None, None, None, None, None


class _Tokens:
    """Between the tokens of a batch and those that are read of it.

    Args:
        hidden: [B, T, ...].
        read: [M], or None for all.
    """

    def __init__(self, hidden: torch.Tensor, read: torch.Tensor | None) -> None:
        self._shape = hidden.shape[:2]
        self._read = None if read is None or len(read) > (1 - WORTH_LEAVING_OUT) * self._shape.numel() else read

    def take(self, states: torch.Tensor) -> torch.Tensor:
        """[B, T, ...] → [M, ...]."""
        flat = states.flatten(0, 1)
        return flat if self._read is None else flat.index_select(0, self._read)

    def put(self, states: torch.Tensor) -> torch.Tensor:
        """[M, ...] → [B, T, ...], zero where nothing is read."""
        if self._read is not None:
            states = states.new_zeros(self._shape.numel(), *states.shape[1:]).index_copy_(0, self._read, states)
        return states.reshape(*self._shape, *states.shape[1:])


_apply: Any = _BlockFunction.apply


def _norm(states: torch.Tensor, norm: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RMSNorm, and what its gradient needs: the states at unit scale [M, hidden] and 1 / their scale [M, 1], both in fp32."""
    wide = states.float()
    scale = torch.rsqrt_(wide.square().mean(dim=-1, keepdim=True).add_(norm.variance_epsilon))
    unit = wide * scale
    return unit.to(states.dtype) * norm.weight, unit, scale


def _norm_back(gradient: torch.Tensor, norm: Any, unit: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``s (g − u · mean(g u))`` with g = gradient · weight, u the unit states and s = 1 / their scale."""
    of_unit = (gradient * norm.weight).float()
    common = (of_unit * unit).mean(dim=-1, keepdim=True)
    found = torch.addcmul(of_unit, unit, common, value=-1).mul_(scale)
    return found.to(gradient.dtype)


def _heads(states: torch.Tensor, size: int) -> torch.Tensor:
    """[M, heads · size] → [M, heads, size]."""
    return states.view(*states.shape[:-1], -1, size)


def _stack(states: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """[B, T, heads, size] → [B · heads / groups, groups · T, size]: queries of the same key below each other."""
    batch, length, _, size = states.shape
    return states.view(batch, length, -1, groups, size).permute(0, 2, 3, 1, 4).reshape(-1, groups * length, size)


def _unstack(states: torch.Tensor, batch: int, groups: int = 1) -> torch.Tensor:
    """The inverse of ``_stack``."""
    states = states.view(batch, -1, groups, states.shape[1] // groups, states.shape[2]).permute(0, 3, 1, 2, 4)
    return states.flatten(2, 3)


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embeddings of [M, heads, size]."""
    first, second = states.chunk(2, dim=-1)
    return (states * cos).add_(torch.cat((-second, first), dim=-1).mul_(sin))


def _rotate_back(gradient: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = (gradient * sin).chunk(2, dim=-1)
    return torch.cat((second, -first), dim=-1).addcmul_(gradient, cos)
