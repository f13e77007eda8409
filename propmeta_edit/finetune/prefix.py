"""The frozen layers below the first edited one: what they make of a text is computed once, not in every inner step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from propmeta_edit.models.forwards import compute_hidden_states, replaced_forwards
from propmeta_edit.models.layers import get_architecture
from propmeta_edit.text.encoding import EncodedBatch


class FrozenPrefix:
    """The blocks of a model below the first one that holds a trained parameter (possibly none).

    Args:
        model: a causal language model of transformers.
        parameter_names: the trained parameters.
    """

    def __init__(self, model: Any, parameter_names: Iterable[str]) -> None:
        self._model = model
        path = get_architecture(model.config.model_type).blocks + "."
        first = min(int(name.removeprefix(path).split(".")[0]) for name in parameter_names)
        blocks = list(model.get_submodule(path[:-1]).children())
        self._below, self._above = blocks[:first], blocks[first:]

    def compute_states(self, batch: EncodedBatch) -> torch.Tensor | None:
        """What enters the first edited block: [B, T, hidden] without gradient; None if no block is below it."""
        if not self._below:
            return None
        states: list[torch.Tensor] = []
        handle = self._below[-1].register_forward_hook(lambda module, inputs, output: states.append(output))
        try:
            with torch.no_grad(), replaced_forwards(dict.fromkeys(self._above, _pass_through)):
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
        forwards: dict[nn.Module, Any] = dict.fromkeys(self._below[:-1], _pass_through)
        with replaced_forwards({**forwards, self._below[-1]: lambda *args, **kwargs: states}):
            yield


def _pass_through(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states
