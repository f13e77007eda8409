"""Edits side by side in one model, while they are learnt and while they stand: copies of θ, or changes of low rank beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.inner_loop import apply_inner_loop
from propmeta_edit.finetune.low_rank import low_rank_changes
from propmeta_edit.finetune.prefix import FrozenPrefix
from propmeta_edit.finetune.stacking import stacked_weights
from propmeta_edit.finetune.weights import only_trainable
from propmeta_edit.models.kept_states import keeps_states
from propmeta_edit.protocols import LanguageModel
from propmeta_edit.text.encoding import EncodedBatch


class Adapted(Protocol):
    """N edits in a model: ``StackedWeights`` or ``LowRankChanges``."""

    parameters: dict[str, nn.Parameter]  # what the outer loss is differentiated by, at θ_τ

    @property
    def moved(self) -> Mapping[str, torch.Tensor]:
        """What the inner loop has moved, by parameter name: not finite where an edit diverged."""
        ...

    def sum_over_edits(self, gradients: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """One contiguous tensor a parameter, in the model's own shape, from the gradients by ``parameters``."""
        ...

    def take(self, number: int) -> Mapping[str, torch.Tensor]:
        """The parameters of one edit, in the model's own shapes: ``LowRankWeights`` where they are factors."""
        ...


@contextmanager
def adapted_copies(
    model: LanguageModel,
    parameters: Mapping[str, nn.Parameter],
    target: Sequence[EncodedBatch],
    settings: EditSettings,
    num_edits: int,
) -> Iterator[tuple[Adapted, list[torch.Tensor]]]:
    """Inside, row block n of any batch meets the n-th of N copies of θ, which the inner loop has moved to its own θ_τ (Eq. 2).

    θ itself is never written. Meta-training takes its outer gradient inside, edits are read off or answer inside.

    Args:
        parameters: θ, by name in the model.
        target: as for ``apply_inner_loop``, on the model's device.
        num_edits: N.

    Yields:
        The copies, and what ``apply_inner_loop`` returns: their losses before each update.
    """
    try_shortcuts(model, parameters)  # now: rows of their own would be taken for rows of an edit
    if settings.is_low_rank:
        with low_rank_changes(model, parameters, num_edits) as changes:
            with only_trainable(model, changes.parameters):
                losses = apply_inner_loop(model, changes.parameters, target, settings, num_edits, changes)
            yield changes, losses
        return
    with stacked_weights(model, parameters, num_edits) as adapted:
        with only_trainable(model, adapted.parameters):
            losses = apply_inner_loop(model, adapted.parameters, target, settings, num_edits)
        yield adapted, losses


def try_shortcuts(model: LanguageModel, parameter_names: Iterable[str]) -> None:
    """Try all that the inner loop and generation may take with a model that is not known by name."""
    FrozenPrefix(model, parameter_names)
    keeps_states(model)
