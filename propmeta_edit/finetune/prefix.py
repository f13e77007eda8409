"""The frozen layers below the first edited one: what they make of a text is computed once, not in every inner step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from propmeta_edit.models.forwards import compute_hidden_states
from propmeta_edit.models.layers import get_block_list, layers_of
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
        self._stand_ins = [_StandIn(block) for block in self._blocks]

    def compute_states(self, batch: EncodedBatch) -> torch.Tensor | None:
        """What enters the first edited block: [B, T, hidden] without gradient; None if no block is below it."""
        if not self._first:
            return None
        states: list[torch.Tensor] = []
        handle = self._blocks[self._first - 1].register_forward_hook(lambda module, inputs, output: states.append(output))
        try:
            with torch.no_grad(), self._replaced(self._stand_ins[self._first :], self._first):
                compute_hidden_states(self._model, batch)
        finally:
            handle.remove()
        return states[0]

    @contextmanager
    def skipped(self, states: torch.Tensor | None) -> Iterator[None]:
        """Inside, the model starts from ``states``, whatever it is given; masks and positions it makes as always."""
        if states is None:
            yield
            return
        stand_ins = [*self._stand_ins[: self._first - 1], _StandIn(self._blocks[self._first - 1], states)]
        with self._replaced(stand_ins):
            yield

    @contextmanager
    def _replaced(self, stand_ins: Sequence[_StandIn], start: int = 0) -> Iterator[None]:
        """Inside, the blocks from ``start`` on give place to ``stand_ins``."""
        for number, stand_in in enumerate(stand_ins, start):
            self._blocks[number] = stand_in
        try:
            yield
        finally:
            for number, stand_in in enumerate(stand_ins, start):
                self._blocks[number] = stand_in.block


class _StandIn(nn.Module):
    """Gives on its own states, or those it is given, without the block's hooks: they would fetch the weights of a sharded one."""

    def __init__(self, block: nn.Module, states: torch.Tensor | None = None) -> None:
        super().__init__()
        self.__dict__.update(block=block, states=states)  # not as a submodule, whose parameters would be the model's

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)  # such as the kind of its attention, which some models look at

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states if self.states is None else self.states
