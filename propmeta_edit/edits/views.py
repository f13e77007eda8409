"""One model in memory, many edits of it answering: each through a view of its own, or each row of a batch with its own edit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from propmeta_edit.edits.compute import fit_into
from propmeta_edit.edits.edit import Edit, take_base
from propmeta_edit.errors import ConfigError, ModelError
from propmeta_edit.finetune.low_rank import low_rank_changes
from propmeta_edit.finetune.stacking import stacked_weights
from propmeta_edit.models.devices import device_of, free_memory
from propmeta_edit.models.generation import MAX_NEW_TOKENS, generate_greedily
from propmeta_edit.models.kept_states import keeps_states
from propmeta_edit.models.ownership import locked, owned
from propmeta_edit.models.wrappers import unwrap
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.text.prompts import first_line, format_question

_BATCH_SIZE = 64
Result = TypeVar("Result")


class EditedModel:
    """A model with some edits, sharing every tensor that they do not touch. Whatever is called on it runs with the edits standing.

    Views of one model may be called from several threads; they take turns.

    Args:
        model: the model; it stands without them between calls.
        edits: applied in this order.
    """

    def __init__(self, model: LanguageModel, *edits: Edit) -> None:
        self._model, self._edits = model, edits

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._model, *args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        return self._call(self._model.generate, *args, **kwargs)

    def answer(self, tokenizer: Tokenizer, prompts: str | Sequence[str], max_new_tokens: int = MAX_NEW_TOKENS) -> list[str]:
        """The greedy text after each prompt; a single text is one prompt, and the list has one answer then."""
        texts = [prompts] if isinstance(prompts, str) else prompts
        return self.through(generate_greedily, tokenizer, texts, max_new_tokens)

    def ask(self, tokenizer: Tokenizer, question: str, max_new_tokens: int = MAX_NEW_TOKENS) -> str:
        """The first line of the greedy answer to a question, put as the benchmark puts it.

        ``answer`` takes prompts as they are, many at once, and gives all that is said.
        """
        [said] = self.answer(tokenizer, format_question(question), max_new_tokens)
        return first_line(said)

    def through(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """What ``function(model, ...)`` gives with the edits standing."""
        result: Result = self._call(function, unwrap(self._model), *args, **kwargs)
        return result

    def _call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        plain = unwrap(self._model)
        with locked(plain), ExitStack() as standing:
            for edit in self._edits:
                standing.enter_context(edit.applied(plain))
            return function(*args, **kwargs)


def generate_with_edits(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    edits: Sequence[Edit | None],
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int | None = None,
) -> list[str]:
    """The greedy text after each prompt, each answered with its own edit (None: the model as it is), many in one batch.

    The frozen layers see one ordinary batch; only the edited projections tell the edits apart.

    Args:
        edits: one a prompt; the same object may come again. Every edit must be of projections' weights or biases (linear layers).
        batch_size: prompts of one batch; if not given 64, with as many edits as half of the device's free memory holds.

    Raises:
        ConfigError: a batch_size below 1.
        ModelError: as many edits as prompts are needed; an edit of another model, or of something else than a projection.
    """
    if len(edits) != len(prompts):
        raise ModelError(f"every prompt needs its edit or None: got {len(prompts)} prompts and {len(edits)} edits")
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size must be 1 or more, got {batch_size}")
    groups: dict[int, list[int]] = {}
    for row, edit in enumerate(edits):
        groups.setdefault(id(edit), []).append(row)
    found: dict[int, str] = {}
    with owned(model) as plain:
        stacked = _find_stacked(plain, [edits[rows[0]] for rows in groups.values()])
        chosen = [edit for edit in edits if edit is not None]
        most_edits = (
            batch_size or fit_into(free_memory(device_of(stacked)), _bytes_an_edit(chosen, stacked)) if stacked else len(groups)
        )
        for pieces in _split(list(groups.values()), batch_size or _BATCH_SIZE, most_edits):
            own = [edits[rows[0]] for rows in pieces]
            height = len(pieces[0])  # equally many rows an edit, as stacked weights need them
            order = [row for rows in pieces for row in (rows + [rows[0]] * height)[:height]]
            texts = _answer_batch(plain, tokenizer, [prompts[row] for row in order], own, max_new_tokens)
            found |= dict(zip(order, texts, strict=True))
    return [found[row] for row in range(len(prompts))]


def _find_stacked(model: LanguageModel, edits: Sequence[Edit | None]) -> dict[str, nn.Parameter]:
    """The model's parameters that these edits need copies of, each of which must be made on this model."""
    chosen = [edit for edit in edits if edit is not None]
    base = take_base(model) if chosen else {}
    for edit in chosen:
        edit.require_made_on(model, base)
    return _projections_of(model, chosen)


def _projections_of(model: LanguageModel, edits: Sequence[Edit]) -> dict[str, nn.Parameter]:
    names = sorted({name for edit in edits for name in edit.weights})
    for name in list(names):
        module, _, leaf = name.rpartition(".")
        if not isinstance(model.get_submodule(module), nn.Linear | Conv1D):
            raise ModelError(f"rows can differ in projections alone, and an edit moves {name}; ask under one edit at a time")
        if leaf == "bias" and f"{module}.weight" not in names:
            names.append(f"{module}.weight")  # the two are computed together
    return {name: model.get_parameter(name) for name in names}


def _bytes_an_edit(edits: Sequence[Edit], stacked: Mapping[str, nn.Parameter]) -> int:
    """At most: of what it keeps itself, and of the same once more in a batch."""
    if _are_factors(edits):
        return 2 * max(sum(a.nbytes + b.nbytes for a, b in (edit.factors or {}).values()) for edit in edits)
    return 2 * sum(value.nbytes for value in stacked.values())


def _are_factors(edits: Sequence[Edit]) -> bool:
    return all(edit.factors is not None for edit in edits)


def _split(groups: Sequence[Sequence[int]], most_rows: int, most_edits: int) -> list[list[list[int]]]:
    """Batches of groups of rows, long groups in pieces. The longest come first, as all of a batch are filled up to its first."""
    starts = [(rows, start) for rows in groups for start in range(0, len(rows), most_rows)]
    pieces = sorted((list(rows[start : start + most_rows]) for rows, start in starts), key=len, reverse=True)
    batches = []
    while pieces:
        number = max(1, min(most_edits, most_rows // len(pieces[0])))
        batches.append(pieces[:number])
        pieces = pieces[number:]
    return batches


def _answer_batch(
    model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str], edits: Sequence[Edit | None], max_new_tokens: int
) -> list[str]:
    """One batch of equally many neighbouring prompts an edit."""
    chosen = [edit for edit in edits if edit is not None]
    if not chosen:
        return generate_greedily(model, tokenizer, prompts, max_new_tokens, batch_size=len(prompts))
    keeps_states(model)  # tried now: rows of its own would be taken for rows of an edit
    with _own_edits(model, _projections_of(model, chosen), edits):
        return generate_greedily(model, tokenizer, prompts, max_new_tokens, batch_size=len(prompts))


@contextmanager
def _own_edits(model: LanguageModel, parameters: Mapping[str, nn.Parameter], edits: Sequence[Edit | None]) -> Iterator[None]:
    """Inside, row block n of any batch meets the n-th edit; no weights are made where all are kept as factors."""
    if _are_factors([edit for edit in edits if edit is not None]):
        with low_rank_changes(model, parameters, len(edits)) as changes:
            for name, parameter in parameters.items():
                pairs = [(edit.factors or {}).get(name) if edit else None for edit in edits]
                keys = [parameter.new_zeros(0, 0) if pair is None else pair[0].to(parameter) for pair in pairs]
                values = [parameter.new_zeros(0, 0) if pair is None else pair[1].T.to(parameter) for pair in pairs]
                changes.add(name.removesuffix(".weight"), _padded(keys), _padded(values))
            yield
        return
    before = {name: parameter.data for name, parameter in parameters.items()}
    with stacked_weights(model, parameters, len(edits)) as stack:
        for number, edit in enumerate(edits):
            if edit is not None:
                stack.put(number, edit.weights_on(before))
        yield


def _padded(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """[r, width] each, some of no rows, as [N, R, width]: zeros change nothing."""
    found = rows[0].new_zeros(len(rows), max(len(one) for one in rows), max(one.shape[1] for one in rows))
    for own, one in zip(found, rows, strict=True):
        own[: len(one), : one.shape[1]] = one
    return found
