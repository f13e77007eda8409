"""One model in memory, many edits of it answering: each through a view of its own, or each row of a batch with its own edit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from propmeta_edit.edits.edit import Edit, take_base
from propmeta_edit.errors import ModelError
from propmeta_edit.finetune.stacking import stacked_weights
from propmeta_edit.models.generation import MAX_NEW_TOKENS, generate_greedily


class EditedModel:
    """A model with some edits, sharing every tensor that they do not touch. Whatever is called on it runs with the edits standing.

    Args:
        model: the model; it stands without them between calls.
        edits: applied in this order.
    """

    def __init__(self, model: Any, *edits: Edit) -> None:
        self._model, self._edits = model, edits

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._model, *args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        return self._call(self._model.generate, *args, **kwargs)

    def answer(self, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = MAX_NEW_TOKENS) -> list[str]:
        """The greedy text after each prompt."""
        return self._call(generate_greedily, self._model, tokenizer, prompts, max_new_tokens)  # type: ignore[no-any-return]

    def _call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        standing: list[Edit] = []
        try:
            for edit in self._edits:
                edit.apply(self._model)
                standing.append(edit)
            return function(*args, **kwargs)
        finally:
            for edit in reversed(standing):
                edit.undo(self._model)


def generate_with_edits(
    model: Any, tokenizer: Any, prompts: Sequence[str], edits: Sequence[Edit | None], max_new_tokens: int = MAX_NEW_TOKENS
) -> list[str]:
    """The greedy text after each prompt, each answered with its own edit (None: the model as it is), all in one batch.

    The frozen layers see one ordinary batch; only the edited projections tell the edits apart.

    Args:
        edits: one a prompt; the same object may come again. Every edit must be of projections' weights or biases (linear layers).

    Raises:
        ModelError: as many edits as prompts are needed; an edit of another model, or of something else than a projection.
    """
    if len(edits) != len(prompts):
        raise ModelError(f"every prompt needs its edit or None: got {len(prompts)} prompts and {len(edits)} edits")
    groups: dict[int, list[int]] = {}
    for row, edit in enumerate(edits):
        groups.setdefault(id(edit), []).append(row)
    chosen = [edits[rows[0]] for rows in groups.values()]
    names = sorted({name for edit in chosen if edit is not None for name in edit.weights})
    if not names:
        return generate_greedily(model, tokenizer, prompts, max_new_tokens, batch_size=len(prompts))
    parameters = dict(model.named_parameters())
    base = take_base(model)
    for edit in chosen:
        if edit is not None:
            edit.require_made_on(model, base)
    for name in list(names):
        module, _, leaf = name.rpartition(".")
        if not isinstance(model.get_submodule(module), nn.Linear | Conv1D):
            raise ModelError(f"rows can differ in projections alone, and an edit moves {name}; ask under one edit at a time")
        if leaf == "bias" and f"{module}.weight" not in names:
            names.append(f"{module}.weight")  # the two are computed together
    height = max(len(rows) for rows in groups.values())  # equally many rows an edit, as stacked weights need them
    order = [row for rows in groups.values() for row in (rows + [rows[0]] * height)[:height]]
    with stacked_weights(model, {name: parameters[name] for name in names}, len(chosen)) as stack:
        for number, edit in enumerate(chosen):
            if edit is not None:
                stack.put(number, edit.weights)
        texts = generate_greedily(model, tokenizer, [prompts[row] for row in order], max_new_tokens, batch_size=len(order))
    found = dict(zip(order, texts, strict=True))
    return [found[row] for row in range(len(prompts))]
