"""Texts to token ids, with labels on the answer tokens only.

``L = -(1/m) Σ_j log p(o_j | c, o_<j)`` needs to know which tokens are the object's: context and " " + object are tokenised
together and the boundary is found by character offsets, since beginning-of-sequence tokens and merges differ by tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field

import torch

from propmeta_edit.errors import RequestError
from propmeta_edit.protocols import Tokenizer
from propmeta_edit.records import EditRequest, Question
from propmeta_edit.text.prompts import format_question

IGNORED = -100  # what torch's cross-entropy skips

EncodedText = tuple[list[int], list[int]]  # token ids and labels of one text, equally long


@dataclass(frozen=True)
class EncodedBatch:
    """Token ids of B texts padded to T tokens.

    Attributes:
        input_ids: [B, T], int64.
        attention_mask: [B, T], int64; 0 on padding.
        position_ids: [B, T], int64; counted from each text's first real token.
        labels: [B, T], int64; the token itself on answer tokens, ``IGNORED`` elsewhere.
        is_padded: whether any row holds padding.
        scored: [2, M], int64; text and position of each of the M answer tokens, text by text; a first token is never one, as
            nothing predicts it. Found from ``labels`` once, so that no step of a loop has to wait for the device to count them.
        answer_lengths: [B], int64; how many answer tokens each text has.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    is_padded: bool
    scored: torch.Tensor = field(init=False)
    answer_lengths: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        is_scored = self.labels[:, 1:] != IGNORED
        texts, positions = is_scored.nonzero(as_tuple=True)
        object.__setattr__(self, "scored", torch.stack([texts, positions + 1]))
        object.__setattr__(self, "answer_lengths", is_scored.sum(dim=1))

    def to(self, device: torch.device | str) -> EncodedBatch:
        """The same batch on another device."""
        moved = copy(self)
        for name in ("input_ids", "attention_mask", "position_ids", "labels", "scored", "answer_lengths"):
            object.__setattr__(moved, name, getattr(self, name).to(device))
        return moved


@contextmanager
def padded_on(tokenizer: Tokenizer, side: str) -> Iterator[None]:
    """Inside, the tokenizer pads on that side; outside as before."""
    before, tokenizer.padding_side = tokenizer.padding_side, side
    try:
        yield
    finally:
        tokenizer.padding_side = before


def encode_answer(tokenizer: Tokenizer, context: str, answer: str) -> EncodedText:
    """Token ids of ``context + " " + answer`` and their labels.

    A token that straddles the boundary counts as the answer's: it holds part of it. Nothing follows the answer (no period,
    no end-of-sequence token).

    Returns:
        (input_ids, labels), equally long; labels are ``IGNORED`` on the context.

    Raises:
        RequestError: the answer is empty, or its first token has no token before it to be predicted from.
    """
    if not answer.strip():
        raise RequestError(f"the answer after {context!r} must not be empty, got {answer!r}")
    context = context.rstrip()
    text = f"{context} {answer.strip()}"
    if tokenizer.is_fast:
        encoded = tokenizer(text, return_offsets_mapping=True)
        input_ids = list(encoded["input_ids"])
        is_answer = [end > len(context) for _, end in encoded["offset_mapping"]]
    else:
        input_ids = list(tokenizer(text)["input_ids"])
        boundary = _common_prefix_length(input_ids, list(tokenizer(context)["input_ids"]))
        is_answer = [position >= boundary for position in range(len(input_ids))]
    labels = [token if answers else IGNORED for token, answers in zip(input_ids, is_answer, strict=True)]
    if labels[0] != IGNORED:
        raise RequestError(f"the text {text!r} needs at least one token before its answer {answer!r}")
    return input_ids, labels


def _common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return length


def collate(tokenizer: Tokenizer, encoded: Sequence[EncodedText], padding_side: str = "left") -> EncodedBatch:
    """Pad encoded texts into one batch; every loss is the same under either ``padding_side``."""
    width = max(len(ids) for ids, _ in encoded)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    rows: list[tuple[list[int], list[int], list[int]]] = []
    for ids, labels in encoded:
        padding = width - len(ids)
        before, after = (padding, 0) if padding_side == "left" else (0, padding)
        rows.append(
            (
                [pad_id] * before + ids + [pad_id] * after,
                [0] * before + [1] * len(ids) + [0] * after,
                [IGNORED] * before + labels + [IGNORED] * after,
            )
        )
    input_ids, attention_mask, label_ids = (torch.tensor(column) for column in zip(*rows, strict=True))
    return EncodedBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(dim=1) - 1).clamp(min=0),
        labels=label_ids,
        is_padded=bool((attention_mask == 0).any()),
    )


def encode_requests(tokenizer: Tokenizer, edits: Sequence[Sequence[EditRequest]], batch_size: int = 1) -> list[EncodedBatch]:
    """Target facts for the inner loop, for one edit or for several independent ones side by side.

    Args:
        edits: for each edit its facts, in the order they are learned; as many for every edit.
        batch_size: facts of an edit in one update.

    Returns:
        One batch an update: the first ``batch_size`` facts of the first edit, then those of the second, and so on.

    Raises:
        RequestError: edits of different length.
    """
    if len({len(requests) for requests in edits}) != 1:
        raise RequestError(f"edits side by side need equally many facts, got {sorted({len(requests) for requests in edits})}")
    encoded = [[encode_answer(tokenizer, request.prompt, request.target_new) for request in requests] for requests in edits]
    starts = range(0, len(encoded[0]), batch_size)
    return [collate(tokenizer, [text for texts in encoded for text in texts[start : start + batch_size]]) for start in starts]


def encode_questions(tokenizer: Tokenizer, questions: Sequence[Question], template: str = "qa") -> EncodedBatch:
    """Related questions with their first accepted answers, for the outer loop."""
    texts = [encode_answer(tokenizer, format_question(question.text, template), question.answers[0]) for question in questions]
    return collate(tokenizer, texts)
