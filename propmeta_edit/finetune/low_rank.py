"""Edits without copies of a matrix: each adds a few factors to what a projection gives, ``W x + Σ u (k · x)``, and stays these."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from propmeta_edit.errors import ModelError
from propmeta_edit.models.devices import in_double
from propmeta_edit.models.forwards import replaced_forwards
from propmeta_edit.protocols import LanguageModel

Pair = tuple[torch.Tensor, torch.Tensor]  # A [r, in] and B [out, r], whose product B A is a change
Factors = Mapping[str, Pair]  # by parameter name


class LowRankWeights(Mapping[str, torch.Tensor]):
    """Edited weights that are kept as factors: each is ``W₀ + B A``, made anew whenever it is asked for.

    Product and sum are in double and rounded once, so that the same factors give the same bits.

    Args:
        factors: by parameter name.
        transposed: those weights that are [in, out].
        dtype: of the weights.
        before: W₀; None where it is not known, and weights are to be had on a model's own alone (``on``).
        inputs: x of the tokens that were written at, [tokens, in], by the projection's path; nothing where that is not known.
    """

    def __init__(
        self,
        factors: Factors,
        transposed: Collection[str],
        dtype: torch.dtype,
        before: Mapping[str, torch.Tensor] | None = None,
        inputs: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.factors, self.transposed, self.dtype, self.before = dict(factors), frozenset(transposed), dtype, before
        self.inputs = dict(inputs or {})

    def __iter__(self) -> Iterator[str]:
        return iter(self.factors)

    def __len__(self) -> int:
        return len(self.factors)

    def __contains__(self, name: object) -> bool:
        return name in self.factors

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.factors:
            raise KeyError(name)
        if self.before is None:
            raise ModelError("this edit holds its change alone, as factors; apply it to the model it was made on, or pin it to one")
        return self._sum(name, self.before[name])

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of the weights, in the model's own orientation."""
        shapes = {name: (len(b), a.shape[1]) for name, (a, b) in self.factors.items()}
        return {name: torch.Size(shape[::-1] if name in self.transposed else shape) for name, shape in shapes.items()}

    def on(self, before: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights on other W₀, each where that is and in its dtype."""
        return {name: self._sum(name, before[name]) for name in self.factors}

    def changes(self) -> dict[str, torch.Tensor]:
        """B A by itself, in the weights' own orientation and dtype."""
        products = {name: (in_double(b) @ in_double(a)).to(self.dtype) for name, (a, b) in self.factors.items()}
        return {name: value.T.contiguous() if name in self.transposed else value for name, value in products.items()}

    def only(self, names: Collection[str], before: Mapping[str, torch.Tensor] | None) -> LowRankWeights:
        """Some of them, on other W₀."""
        chosen = {name: pair for name, pair in self.factors.items() if name in names}
        inputs = {path: value for path, value in self.inputs.items() if f"{path}.weight" in chosen}
        return LowRankWeights(chosen, self.transposed, self.dtype, before, inputs)

    def to(self, device: torch.device) -> LowRankWeights:
        """Their factors on a device, in storage of their own."""
        moved = {name: (a.to(device, copy=True), b.to(device, copy=True)) for name, (a, b) in self.factors.items()}
        inputs = {path: value.to(device, copy=True) for path, value in self.inputs.items()}
        return LowRankWeights(moved, self.transposed, self.dtype, self.before, inputs)

    def _sum(self, name: str, before: torch.Tensor) -> torch.Tensor:
        wide = in_double(before.detach())
        a, b = (in_double(factor).to(wide.device) for factor in self.factors[name])
        found = torch.addmm(wide, a.T, b.T) if name in self.transposed else torch.addmm(wide, b, a)
        return found.to(before.dtype).to(before.device)


class LowRankChanges:
    """What N edits add to some projections, as factors.

    Attributes:
        parameters: the model's own, θ, which no edit writes to.
    """

    def __init__(self, model: LanguageModel, parameters: Mapping[str, nn.Parameter], num_edits: int) -> None:
        self.parameters, self._num_edits = dict(parameters), num_edits
        self._modules: dict[str, Any] = {
            name.removesuffix(".weight"): model.get_submodule(name.removesuffix(".weight"))
            for name in parameters
            if name.endswith(".weight")
        }
        self._changes: dict[str, _Change] = {}
        self._inputs: dict[str, dict[int, torch.Tensor]] = {}

    def note_inputs(self, path: str, batch: int, inputs: torch.Tensor) -> None:
        """At what a projection was written at by a step on one of the batches; the last step on it counts.

        Args:
            inputs: [R, W, in], the rows of an edit side by side.
        """
        self._inputs.setdefault(path, {})[batch] = inputs.reshape(self._num_edits, -1, inputs.shape[-1])

    def add(self, path: str, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Let a projection give ``Σ values (keys · x)`` more.

        Args:
            path: the projection's.
            keys, values: [R, W, in] and [R, W, out], the rows of an edit side by side.
        """
        keys, values = (value.reshape(self._num_edits, -1, value.shape[-1]) for value in (keys, values))
        if path in self._changes:
            self._changes[path].add(keys, values)
        else:
            self._changes[path] = _Change(keys, values)

    def forwards(self) -> dict[nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
        """What the projections compute with all that was added."""
        return {module: partial(self._multiply, path, module) for path, module in self._modules.items()}

    @property
    def moved(self) -> Mapping[str, torch.Tensor]:
        """Of each weight that changes, the sums of its factors; θ, which is not moved, before the first step."""
        return {f"{path}.weight": change.sums() for path, change in self._changes.items()} or self.parameters

    def sum_over_edits(self, gradients: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Those of θ are sums over the edits as they come."""
        return tuple(gradient.contiguous() for gradient in gradients)

    def take(self, number: int) -> LowRankWeights:
        """One edit's weights, as factors; biases, which do not move, are not among them."""
        transposed = [f"{path}.weight" for path, module in self._modules.items() if isinstance(module, Conv1D)]
        before = {name: parameter.data for name, parameter in self.parameters.items()}
        factors = {f"{path}.weight": self._factors(path, number) for path in self._modules}
        inputs = {path: torch.cat([own[number] for own in seen.values()]) for path, seen in self._inputs.items()}
        return LowRankWeights(factors, transposed, next(iter(before.values())).dtype, before, inputs)

    def _factors(self, path: str, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        if path in self._changes:
            return self._changes[path].factors(number)
        weight = self._modules[path].weight.detach()  # no step was made
        rows, columns = weight.T.shape if isinstance(self._modules[path], Conv1D) else weight.shape
        return weight.new_zeros(0, columns), weight.new_zeros(rows, 0)

    def _multiply(self, path: str, module: Any, inputs: torch.Tensor) -> torch.Tensor:
        weight = module.weight
        x = inputs.to(weight.dtype)
        outputs = F.linear(x, weight.T if isinstance(module, Conv1D) else weight, module.bias)
        if path in self._changes:
            rows = x.reshape(self._num_edits, -1, x.shape[-1])
            outputs = outputs + self._changes[path].multiply(rows).view_as(outputs)
        return outputs.to(inputs.dtype)


class _Change:
    """N edits' changes of one projection: factors, or matrices once factors would be the larger."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._keys, self._values = keys, values  # [N, r, in], [N, r, out]
        self._matrices: torch.Tensor | None = None  # [N, in, out]
        self._most = _most_factors(keys.shape[-1], values.shape[-1])

    def add(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self._matrices is not None:
            self._matrices.baddbmm_(keys.mT, values)
        elif self._keys.shape[1] + keys.shape[1] <= self._most:
            self._keys, self._values = torch.cat([self._keys, keys], dim=1), torch.cat([self._values, values], dim=1)
        else:
            self._matrices = torch.baddbmm(torch.bmm(self._keys.mT, self._values), keys.mT, values)

    def multiply(self, rows: torch.Tensor) -> torch.Tensor:
        """[N, rows, in] → [N, rows, out]."""
        if self._matrices is not None:
            return torch.bmm(rows, self._matrices)
        return torch.bmm(torch.bmm(rows, self._keys.mT), self._values)

    def sums(self) -> torch.Tensor:
        """Numbers that are finite if all factors are."""
        parts = [self._keys, self._values] if self._matrices is None else [self._matrices]
        return torch.stack([part.sum() for part in parts])

    def factors(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._matrices is None:
            return self._keys[number], self._values[number].T
        width = self._keys.shape[-1]
        return torch.eye(width, dtype=self._keys.dtype, device=self._keys.device), self._matrices[number].T


def _most_factors(num_inputs: int, num_outputs: int) -> int:
    """How many rows of factors have as many numbers as the matrix, so that a product with them costs as much."""
    return num_inputs * num_outputs // (num_inputs + num_outputs)


@contextmanager
def low_rank_changes(model: LanguageModel, parameters: Mapping[str, nn.Parameter], num_edits: int) -> Iterator[LowRankChanges]:
    """Inside, row block n of any batch is answered with what was added for the n-th edit.

    Args:
        model: every parameter given belongs to one of its projections (``nn.Linear`` or ``Conv1D``).
        num_edits: N; batches inside must have a multiple of N rows.
    """
    changes = LowRankChanges(model, parameters, num_edits)
    with replaced_forwards(changes.forwards()):
        yield changes
