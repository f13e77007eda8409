"""Greedy continuation of prompts: the protocol that every score rests on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from propmeta_edit.models.forwards import compute_logits_after
from propmeta_edit.models.kept_states import Reader, keeps_states, reads_together
from propmeta_edit.models.packed import packed_products
from propmeta_edit.models.states import evaluating, plain_torch
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.text.encoding import IGNORED, TextEncoder, collate
from propmeta_edit.text.sentences import find_sentence_end

MAX_NEW_TOKENS = 10  # the paper's, after CaKE
ENOUGH_LEFT = 0.75  # of a group's rows: above that none is left out
NATURAL_LIMIT = 40  # tokens after which a text that does not stop by itself is cut


@dataclass(frozen=True)
class Continuation:
    """What a model says after a prompt.

    Attributes:
        text: the first ``max_new_tokens`` tokens, or fewer where it stopped.
        whole: the text to its natural stop, the end of its first sentence or of the sequence (at most ``NATURAL_LIMIT`` tokens);
            None where it was not asked for.
    """

    text: str
    whole: str | None = None


def generate_greedily(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 32,
    together: int = 1,
) -> list[str]:
    """The new text after each prompt, decoded greedily, special tokens left out.

    Args:
        batch_size, together: as for ``continue_greedily``.

    Raises:
        RequestError: a prompt without tokens, or one after which the model has no positions for ``max_new_tokens`` more.
    """
    return [said.text for said in continue_greedily(model, tokenizer, prompts, max_new_tokens, (), batch_size, together)]


def continue_greedily(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = MAX_NEW_TOKENS,
    naturally: Sequence[bool] = (),
    batch_size: int = 32,
    together: int = 1,
) -> list[Continuation]:
    """The same, and from the same tokens the texts to their natural stop.

    The tokens are those of transformers' ``generate`` without any setting that comes with the model (sampling, beams, repetition
    penalty), one after another: keys and values are kept in tensors of their final size, and frozen weights are laid out once.

    Args:
        naturally: by prompt, whether it is followed to its natural stop; none is if empty.
        batch_size: prompts that are answered side by side, in their order.
        together: so many neighbours meet the same weights: all of an edit's under stacked weights, and as many for each. What their
            texts begin with in common is read once, and those that are done are left out.
    """
    encoder = TextEncoder(tokenizer, model.config)
    ends = frozenset(_as_ids(model.generation_config.eos_token_id) or _as_ids(tokenizer.eos_token_id))
    rows = [_Row(ids, max_new_tokens) for ids in _encode(encoder, prompts, max_new_tokens)]
    for row, is_natural in zip(rows, naturally, strict=False):
        if is_natural:
            room = encoder.room_after(row.prompt)
            row.limit = max(max_new_tokens, NATURAL_LIMIT if room is None else min(NATURAL_LIMIT, room))
            row.is_natural = True
    with plain_torch(model), evaluating(model), torch.no_grad(), packed_products(model, ()):
        for start in range(0, len(rows), batch_size):
            for row, token in _decode(model, rows[start : start + batch_size], together):
                row.take(token, ends, tokenizer)
    return [row.as_continuation(tokenizer) for row in rows]


def _as_ids(ids: Any) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _encode(encoder: TextEncoder, prompts: Sequence[str], num_tokens: int) -> Iterator[list[int]]:
    for prompt in prompts:
        ids = encoder.encode_prompt(prompt)
        encoder.require_room(ids, prompt, num_tokens)
        yield ids


@dataclass
class _Row:
    """A prompt and what follows it so far."""

    prompt: list[int]
    max_new_tokens: int
    limit: int = 0
    is_natural: bool = False
    tokens: list[int] = field(default_factory=list)
    is_done: bool = False

    def __post_init__(self) -> None:
        self.limit = self.limit or self.max_new_tokens

    def take(self, token: int, ends: frozenset[int], tokenizer: Tokenizer) -> None:
        """The next token, unless the text has ended."""
        if self.is_done:
            return
        if token in ends:
            self.is_done = True
            return
        self.tokens.append(token)
        self.is_done = len(self.tokens) >= self.limit or (
            len(self.tokens) >= self.max_new_tokens and find_sentence_end(_decode_text(tokenizer, self.tokens)) is not None
        )

    def as_continuation(self, tokenizer: Tokenizer) -> Continuation:
        text = _decode_text(tokenizer, self.tokens[: self.max_new_tokens])
        return Continuation(text, _decode_text(tokenizer, self.tokens) if self.is_natural else None)


def _decode_text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)


def _decode(model: LanguageModel, rows: Sequence[_Row], together: int) -> Iterator[tuple[_Row, int]]:
    """Each row with its next token, until all are done; the caller gives it to the row."""
    width, longest = max(len(row.prompt) for row in rows), max(row.limit for row in rows)
    groups = [list(range(start, min(start + together, len(rows)))) for start in range(0, len(rows), together)]
    if not keeps_states(model, width + longest):
        yield from _decode_plainly(model, rows, groups)
        return
    pads = torch.tensor([width - len(row.prompt) for row in rows], device=model.device)
    reader = Reader(model, pads, width + longest)
    if together > 1 and reads_together(model):
        logits = reader.read_together([row.prompt for row in rows], groups)
    else:
        logits = reader.read(torch.tensor([[0] * (width - len(row.prompt)) + row.prompt for row in rows], device=model.device))
    while True:
        ids = logits.float().argmax(dim=-1, keepdim=True).to(pads.device)  # the head may be elsewhere
        yield from zip(rows, ids[:, 0].tolist(), strict=True)
        if all(row.is_done for row in rows):
            return
        groups = _groups_to_keep(rows, groups)
        kept = [number for group in groups for number in group]
        if len(kept) < len(rows):
            rows, chosen = [rows[number] for number in kept], torch.tensor(kept, device=model.device)
            ids, groups = ids[chosen], _counted_anew(groups)
            reader.keep(chosen)
        logits = reader.read(ids)


def _decode_plainly(model: LanguageModel, rows: Sequence[_Row], groups: Sequence[Sequence[int]]) -> Iterator[tuple[_Row, int]]:
    """The same with nothing kept: every token reads its whole text again, padded on the right, where no text sees it."""
    while not all(row.is_done for row in rows):
        texts = [row.prompt + row.tokens for row in rows]
        batch = collate([(text, [IGNORED] * len(text)) for text in texts]).to(model.device)
        last = torch.tensor([len(text) - 1 for text in texts], device=model.device)
        logits = compute_logits_after(model, batch, torch.arange(len(texts), device=model.device), last)
        yield from zip(rows, logits.float().argmax(dim=-1).tolist(), strict=True)
        kept = _groups_to_keep(rows, groups)
        rows, groups = [rows[number] for group in kept for number in group], _counted_anew(kept)


def _groups_to_keep(rows: Sequence[_Row], groups: Sequence[Sequence[int]]) -> list[list[int]]:
    """Equally many rows of each group, among them all that go on; all rows, unless enough are done for the copying to pay."""
    going_on = [[number for number in group if not rows[number].is_done] for group in groups]
    most = max(map(len, going_on))
    if most > ENOUGH_LEFT * max(map(len, groups)):
        return [list(group) for group in groups]
    kept = []
    for group, own in zip(groups, going_on, strict=True):
        done = [number for number in group if number not in own]
        kept.append(sorted([*own, *done[: most - len(own)]]))
    return kept


def _counted_anew(groups: Sequence[Sequence[int]]) -> list[list[int]]:
    """The same groups once there is no other row."""
    numbers = itertools.count()
    return [[next(numbers) for _ in group] for group in groups]
