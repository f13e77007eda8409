"""The frozen layers below the first edited one: what they make of a text is computed once, not in every inner step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from propmeta_edit.models.forwards import compute_logits_after, run_to_the_head
from propmeta_edit.models.layers import get_block_list, layers_of
from propmeta_edit.models.shortcuts import agrees
from propmeta_edit.models.states import put_back_after, to_the_end
from propmeta_edit.protocols import LanguageModel
from propmeta_edit.text.encoding import EncodedBatch


class FrozenPrefix:
    """The blocks of a model below the first one that holds a trained parameter (possibly none).

    Args:
        model: a causal language model of transformers.
        parameter_names: the trained parameters.
    """

    def __init__(self, model: LanguageModel, parameter_names: Iterable[str]) -> None:
        self._model = model
        self._first = min(layers_of(model, parameter_names))
        self._blocks = get_block_list(model)  # in which stand-ins take their place
        self._given: list[Any] = []  # what the block below the first edited one gave last
        self._stand_ins = [_StandIn(block, self._given) for block in self._blocks]
        if self._first and not agrees(model, f"starting at layer {self._first}", self._compute_from_states):
            self._first = 0

    def compute_states(self, batch: EncodedBatch) -> Any:
        """What enters the first edited block: what the block below it gives, without gradient; None if no block is below it."""
        if not self._first:
            return None
        handle: Any = None
        try:
            handle = self._blocks[self._first - 1].register_forward_hook(lambda module, inputs, output: self._keep(output))
            with torch.no_grad(), self._replaced(self._stand_ins[self._first :], self._first):
                run_to_the_head(self._model, batch)
        finally:
            if handle is not None:
                to_the_end(handle.remove)
        return self._given[0]

    def _keep(self, output: Any) -> None:
        self._given[:] = [output]

    @contextmanager
    def skipped(self, states: Any) -> Iterator[None]:
        """Inside, the model starts from ``states``, whatever it is given; masks and positions it makes as always."""
        if states is None:
            yield
            return
        self._keep(states)
        stand_in = _StandIn(self._blocks[self._first - 1], self._given, states)
        with self._replaced([*self._stand_ins[: self._first - 1], stand_in]):
            yield

    @contextmanager
    def _replaced(self, stand_ins: Sequence[_StandIn], start: int = 0) -> Iterator[None]:
        """Inside, the blocks from ``start`` on give place to ``stand_ins``."""
        with put_back_after(lambda: self._put([stand_in.block for stand_in in stand_ins], start)):
            self._put(stand_ins, start)
            yield

    def _put(self, blocks: Sequence[nn.Module], start: int) -> None:
        for number, block in enumerate(blocks, start):
            self._blocks[number] = block

    def _compute_from_states(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        batch = EncodedBatch(ids, ids)
        everywhere = torch.ones_like(ids, dtype=torch.bool)
        with self.skipped(self.compute_states(batch)):
            return everywhere, compute_logits_after(self._model, batch, *everywhere.nonzero(as_tuple=True))


class _StandIn(nn.Module):
    """Gives on its own output, or the states it is given, without the block's hooks, which have nothing to do for it.

    Args:
        block: whose place it takes.
        like: first of all, what such a block gives: states, or a tuple that begins with them.
        output: its own, if it has one.
    """

    def __init__(self, block: nn.Module, like: Sequence[Any], output: Any = None) -> None:
        super().__init__()
        self.__dict__.update(block=block, like=like, output=output)  # not as a submodule, whose parameters would be the model's

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)  # such as the kind of its attention, which some models look at

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.output is not None:
            return self.output
        return (hidden_states, *self.like[0][1:]) if isinstance(self.like[0], tuple) else hidden_states
