"""Texts to token ids, with labels on the answer tokens only: the one way in for training and for asking.

``L = -(1/m) Σ_j log p(o_j | c, o_<j)`` needs to know which tokens are the object's: context and " " + object are tokenised
together and the boundary is found by character offsets, since beginning-of-sequence tokens and merges differ by tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from propmeta_edit.errors import ModelError, RequestError, record_named
from propmeta_edit.protocols import ModelConfig, Tokenizer
from propmeta_edit.records import EditRequest, Question
from propmeta_edit.text.prompts import format_question

IGNORED = -100  # what torch's cross-entropy skips
_SAMPLE = "a"  # a text of which every tokenizer makes tokens

Item = TypeVar("Item")
EncodedText = tuple[list[int], list[int]]  # token ids and labels of one text, equally long


@dataclass(frozen=True)
class EncodedBatch:
    """Token ids of B texts, padded on the right to T tokens.

    A causal model sees nothing to the right of a token, so that no text's own tokens ever see padding and no mask is needed.

    Attributes:
        input_ids: [B, T], int64.
        labels: [B, T], int64; the token itself on answer tokens, ``IGNORED`` elsewhere.
        attention_mask: [B, T], int64, 0 on padding: where padding itself is learnt, as CaKE's code does; else None.
        scored: [2, M], int64; text and position of each of the M answer tokens, text by text; a first token is never one, as
            nothing predicts it. Found from ``labels`` once, so that no step of a loop has to wait for the device to count them.
        written: [B, W], int64; the positions that an inner step writes at, filled up with -1; None where it writes at all of them.
        answer_lengths: [B], int64; how many answer tokens each text has.
        read: [R], int64, on the CPU; of all B·T tokens the numbers of those on which the prediction of an answer token depends: the
            others are padding, or stand last.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor | None = None
    written: torch.Tensor | None = None
    scored: torch.Tensor = field(init=False)
    answer_lengths: torch.Tensor = field(init=False)
    read: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        is_scored = self.labels[:, 1:] != IGNORED
        texts, positions = is_scored.nonzero(as_tuple=True)
        object.__setattr__(self, "scored", torch.stack([texts, positions + 1]))
        object.__setattr__(self, "answer_lengths", is_scored.sum(dim=1))
        is_read = is_scored.flip(1).cummax(dim=1).values.flip(1)  # before a later answer token
        is_read = torch.cat([is_read, is_read.new_zeros(len(is_read), 1)], dim=1)
        object.__setattr__(self, "read", is_read.flatten().nonzero()[:, 0].cpu())

    def to(self, device: torch.device | str) -> EncodedBatch:
        """The same batch on another device."""
        moved = copy(self)
        for name in ("input_ids", "labels", "attention_mask", "written", "scored", "answer_lengths"):
            tensor = getattr(self, name)
            object.__setattr__(moved, name, None if tensor is None else tensor.to(device))
        return moved


@contextmanager
def padded_on(tokenizer: Tokenizer, side: str) -> Iterator[None]:
    """Inside, the tokenizer pads on that side; outside as before."""
    before, tokenizer.padding_side = tokenizer.padding_side, side
    try:
        yield
    finally:
        tokenizer.padding_side = before


class TextEncoder:
    """A tokenizer held against its model.

    Tokens that the tokenizer sets before a text (beginning of sequence) stay, in training as in asking; those it would append (end
    of sequence) are left out of both: a prompt that ends with them is answered as a finished text is. Texts that the model has no
    positions for, and tokens that it has no embedding for, are refused.

    Args:
        config: of the model; None where there is none to hold it against.

    Raises:
        ModelError: the tokens of a text do not occur among those with special tokens.
    """

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig | None = None) -> None:
        text_config = None if config is None else config.get_text_config()
        self.tokenizer = tokenizer
        self.num_positions: int | None = getattr(text_config, "max_position_embeddings", None)
        self.vocabulary: int | None = getattr(text_config, "vocab_size", None)
        self.num_appended = _count_appended(tokenizer)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text that is to be continued; one that ends in a space is taken as it is.

        Raises:
            RequestError: no token at all, or more than the model has positions.
            ModelError: a token that the model has no embedding for.
        """
        ids = self._encode(text)
        if not ids:
            raise RequestError(f"the prompt {text!r} has no token; give it at least a word")
        return self._hold(ids, text)

    def encode_answer(self, context: str, answer: str) -> EncodedText:
        """Token ids of ``context + " " + answer`` and their labels.

        A token that straddles the boundary counts as the answer's: it holds part of it. Nothing follows the answer (no period,
        no end-of-sequence token).

        Returns:
            (input_ids, labels), equally long; labels are ``IGNORED`` on the context.

        Raises:
            RequestError: the answer is empty, its first token has no token before it to be predicted from, or the text has more
                tokens than the model has positions.
            ModelError: a token that the model has no embedding for.
        """
        return self._encode_answer(context, answer)[0]

    def encode_fact(self, request: EditRequest) -> tuple[EncodedText, list[int]]:
        """A fact as ``encode_answer`` encodes it, and the positions of its subject's tokens: where it stands in the prompt first.

        The text's first token is never among them if another one is, since to a model the first token of all texts is alike
        (attention rests on it). A fact without a subject gives all its tokens.

        Raises:
            RequestError, ModelError: as ``encode_answer``.
            ModelError: the tokenizer does not say which characters a token is of, as slow ones do not.
        """
        if not self.tokenizer.is_fast:
            raise ModelError("writing at the subject's tokens needs a fast tokenizer (use_fast=True); or set positions to all")
        context = request.prompt.rstrip()
        encoded, offsets = self._encode_answer(context, request.target_new)
        subject = (request.subject or "").strip() or context  # spaces around it may stand in no token
        start = context.find(subject)
        end = start + len(subject)
        found = [place for place, (first, last) in enumerate(offsets) if first < end and last > start and last > first]
        return encoded, found[1:] if found[0] == 0 and len(found) > 1 else found

    def _encode_answer(self, context: str, answer: str) -> tuple[EncodedText, list[tuple[int, int]]]:
        """The same as ``encode_answer``, and where each token begins and ends; a slow tokenizer knows of none."""
        if not answer.strip():
            raise RequestError(f"the answer after {context!r} must not be empty, got {answer!r}")
        context = context.rstrip()
        text = f"{context} {answer.strip()}"
        offsets: list[tuple[int, int]] = []
        if self.tokenizer.is_fast:
            input_ids, offsets = self.encode_with_offsets(text)
            is_answer = [end > len(context) for _, end in offsets]
        else:
            input_ids = self._encode(text)
            boundary = _common_prefix_length(input_ids, self._encode(context))
            is_answer = [position >= boundary for position in range(len(input_ids))]
        labels = [token if answers else IGNORED for token, answers in zip(input_ids, is_answer, strict=True)]
        if not labels or labels[0] != IGNORED:
            raise RequestError(f"the text {text!r} needs at least one token before its answer {answer!r}")
        return (self._hold(input_ids, text), labels), offsets

    def encode_ended_answer(self, context: str, answer: str) -> EncodedText:
        """The same with the end-of-sequence token after it, to be learnt too.

        Raises:
            ModelError: the tokenizer has none.
        """
        input_ids, labels = self.encode_answer(context, answer)
        end = self.tokenizer.eos_token_id
        if end is None:
            raise ModelError("the tokenizer has no end-of-sequence token, with which the answers that are taught end")
        return self._hold([*input_ids, end], context), [*labels, end]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text and where each begins and ends in it, in characters; fast tokenizers alone know that."""
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        return self._without_appended(encoded["input_ids"]), self._without_appended(encoded["offset_mapping"])

    def count_answer_tokens(self, answer: str) -> int:
        """How many tokens the answer takes after a prompt."""
        return sum(label != IGNORED for label in self.encode_answer("The answer is", answer)[1])

    def room_after(self, input_ids: Sequence[int]) -> int | None:
        """How many tokens the model has positions for after these; None where it has no limit."""
        return None if self.num_positions is None else self.num_positions - len(input_ids)

    def require_room(self, input_ids: Sequence[int], text: str, num_tokens: int) -> None:
        """Refuse a prompt that cannot be continued by so many tokens.

        Raises:
            RequestError: naming the text, its length and the model's positions.
        """
        room = self.room_after(input_ids)
        if room is not None and room < num_tokens:
            raise RequestError(
                f"the prompt {_shorten(text)} has {len(input_ids)} tokens and {num_tokens} more are asked for, but the model has "
                f"{self.num_positions} positions; shorten it, or leave this record out"
            )

    def require_nothing_appended(self, method: str) -> None:
        """Refuse a tokenizer that ends texts, for code that cannot take the end away again.

        Raises:
            ModelError: naming the method and what is appended.
        """
        if self.num_appended:
            ids = list(self.tokenizer(_SAMPLE)["input_ids"])[-self.num_appended :]
            raise ModelError(
                f"{method} of EasyEdit cannot use a tokenizer that appends {self.tokenizer.decode(ids)!r} to every text; load it "
                "with add_eos_token=False, or take the end out of its post-processor"
            )

    def require_known_padding(self) -> None:
        """Refuse a padding token that the model has no embedding for, where padding is learnt.

        Raises:
            ModelError: naming the token and the model's vocabulary.
        """
        pad = self.tokenizer.pad_token_id
        if pad is not None:
            self._hold_tokens([pad])

    def _encode(self, text: str) -> list[int]:
        return self._without_appended(self.tokenizer(text)["input_ids"])

    def _without_appended(self, tokens: Sequence) -> list:  # type: ignore[type-arg]
        return list(tokens)[: len(tokens) - self.num_appended]

    def _hold(self, input_ids: list[int], text: str) -> list[int]:
        if self.num_positions is not None and len(input_ids) > self.num_positions:
            raise RequestError(
                f"the text {_shorten(text)} has {len(input_ids)} tokens, but the model has {self.num_positions} positions; shorten "
                "it, or leave this record out"
            )
        return self._hold_tokens(input_ids)

    def _hold_tokens(self, input_ids: list[int]) -> list[int]:
        if self.vocabulary is not None and (largest := max(input_ids)) >= self.vocabulary:
            raise ModelError(
                f"the tokenizer gives token {largest} ({self.tokenizer.decode([largest])!r}), but the model has embeddings for "
                f"{self.vocabulary}; use the model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer))"
            )
        return input_ids


def _count_appended(tokenizer: Tokenizer) -> int:
    """How many tokens the tokenizer sets after a text."""
    plain, framed = list(tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]), list(tokenizer(_SAMPLE)["input_ids"])
    starts = [start for start in range(len(framed) - len(plain) + 1) if plain and framed[start : start + len(plain)] == plain]
    if len(starts) > 1 and tokenizer.is_fast:  # as where the sample is a word that it does not know, and ends are that token too
        return _count_without_text(tokenizer(_SAMPLE, return_offsets_mapping=True)["offset_mapping"])
    if starts:
        return len(framed) - len(plain) - starts[-1]
    raise ModelError(
        f"the tokenizer cannot be used: of {_SAMPLE!r} it makes the tokens {plain} without special tokens and {framed} with them, "
        "and the first must stand among the second"
    )


def _count_without_text(offsets: Sequence[Sequence[int]]) -> int:
    """How many tokens at the end stand for no character."""
    return next((number for number, (start, end) in enumerate(reversed(offsets)) if end > start), len(offsets))


def _common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return length


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:50]} ... {text[-25:]}")


def collate(encoded: Sequence[EncodedText], pad_id: int = 0, written: Sequence[Sequence[int]] | None = None) -> EncodedBatch:
    """Pad encoded texts into one batch.

    Args:
        pad_id: any token of the model will do where padding is not learnt, since nothing sees it.
        written: of each text, the positions that an inner step writes at; None for all.
    """
    width = max(len(ids) for ids, _ in encoded)
    ids = [ids + [pad_id] * (width - len(ids)) for ids, _ in encoded]
    labels = [labels + [IGNORED] * (width - len(labels)) for _, labels in encoded]
    places = None if written is None else _fill_up(written)
    return EncodedBatch(input_ids=torch.tensor(ids), labels=torch.tensor(labels), written=places)


def _fill_up(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows])


def encode_requests(
    encoder: TextEncoder,
    edits: Sequence[Sequence[EditRequest]],
    batch_size: int = 1,
    records: Sequence[str] = (),
    positions: str = "all",
) -> list[EncodedBatch]:
    """Target facts for the inner loop, for one edit or for several independent ones side by side.

    Args:
        edits: for each edit its facts, in the order they are learned; as many for every edit.
        batch_size: facts of an edit in one update.
        records: what errors call each edit.
        positions: ``all``, or ``subject`` for batches that say which tokens are the subjects'.

    Returns:
        One batch an update: the first ``batch_size`` facts of the first edit, then those of the second, and so on.

    Raises:
        RequestError: edits of different length, or a fact that cannot be encoded, with its record and number.
    """
    if len({len(requests) for requests in edits}) != 1:
        raise RequestError(f"edits side by side need equally many facts, got {sorted({len(requests) for requests in edits})}")
    names = records or ([f"edit {number}" for number in range(len(edits))] if len(edits) > 1 else [""])
    encoded: list[list[EncodedText]] = []
    written: list[list[list[int]]] = []
    for name, requests in zip(names, edits, strict=True):
        encoded.append([])
        written.append([])
        for number, request in enumerate(requests):
            of_several = [f"request {number}"] if len(requests) > 1 or not name else []
            with record_named(", ".join([name, *of_several] if name else of_several)):
                if positions == "all":
                    encoded[-1].append(encoder.encode_answer(request.prompt, request.target_new))
                else:
                    text, places = encoder.encode_fact(request)
                    encoded[-1].append(text)
                    written[-1].append(places)
    return [
        collate(_next_of(encoded, start, batch_size), written=_next_of(written, start, batch_size) or None)
        for start in range(0, len(encoded[0]), batch_size)
    ]


def _next_of(several: Sequence[Sequence[Item]], start: int, number: int) -> list[Item]:
    """``number`` items of each from ``start`` on."""
    return [item for own in several for item in own[start : start + number]]


def encode_questions(
    encoder: TextEncoder, questions: Sequence[Question], template: str = "qa", records: Sequence[str] = ()
) -> EncodedBatch:
    """Related questions with their first accepted answers, for the outer loop; ``records`` is what errors call each."""
    encoded = []
    for name, question in zip(records or [f"question {n}" for n in range(len(questions))], questions, strict=True):
        with record_named(name):
            encoded.append(encoder.encode_answer(format_question(question.text, template), question.answers[0]))
    return collate(encoded)
