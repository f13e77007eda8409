"""Prompts cut into named groups of tokens, and the one token that stands for an entity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from propmeta_edit.errors import RequestError
from propmeta_edit.protocols import Tokenizer
from propmeta_edit.records import Case
from propmeta_edit.text.encoding import TextEncoder
from propmeta_edit.text.prompts import format_question

ARTICLE = "the "


@dataclass(frozen=True)
class Probe:
    """A prompt whose next token is looked at.

    Attributes:
        text: the prompt; it ends in ``the`` where what is expected next has an article, so that the next token is a telling one.
        input_ids: its T token ids, and that of a space where the tokenizer keeps spaces by themselves.
        groups: token positions by name, every position in one group: ``before`` the subject, the ``subject``, the ``phrase`` of
            the edited fact after it, the ``rest`` of the question, the answer ``template`` and the ``last`` token; perhaps empty.
        target: the token that is expected next.
    """

    text: str
    input_ids: tuple[int, ...]
    groups: Mapping[str, tuple[int, ...]]
    target: int

    def ends(self) -> dict[str, int]:
        """The last position of each group that has one."""
        return {name: positions[-1] for name, positions in self.groups.items() if positions}


def content_token(tokenizer: Tokenizer, name: str) -> int:
    """The first telling token of a name after a space: neither of its leading article (``the Argentine peso`` begins like a hundred
    others) nor a space by itself."""
    return _encode_name(tokenizer, name)[1]


def _encode_name(tokenizer: Tokenizer, name: str) -> tuple[tuple[int, ...], int]:
    """(tokens of the space before a name, where the tokenizer has such, and the name's first token), the article left out."""
    ids = tokenizer(" " + name.strip().removeprefix(ARTICLE), add_special_tokens=False)["input_ids"]
    first = next(number for number, token in enumerate(ids) if tokenizer.decode([token]).strip())
    return tuple(ids[:first]), int(ids[first])


def make_question_probe(tokenizer: Tokenizer, case: Case) -> Probe:
    """The case's multi-hop question as it is asked in the benchmark; the answer's token is expected next.

    Raises:
        RequestError: not exactly one edit, no subject, or a question that does not hold the edit's prompt word for word.
    """
    prompt, subject = _only_edit(case)
    if prompt not in case.question.text:
        raise RequestError(f"case {case.case_id}: the question {case.question.text!r} must hold the edit's prompt {prompt!r}")
    text = format_question(case.question.text)
    start = text.index(prompt)
    question_end = text.index(case.question.text) + len(case.question.text)
    cuts = {**_cut_fact(start, prompt, subject), "rest": question_end}
    return _make_probe(tokenizer, text, case.question.answers[0], cuts, "template")


def make_fact_probe(tokenizer: Tokenizer, case: Case) -> Probe:
    """The edited fact's own prompt; the new object's token is expected next.

    Raises:
        RequestError: not exactly one edit, or no subject.
    """
    prompt, subject = _only_edit(case)
    return _make_probe(tokenizer, prompt, case.edits[0].target_new, _cut_fact(0, prompt, subject), "phrase")


def _only_edit(case: Case) -> tuple[str, str]:
    if len(case.edits) != 1 or case.edits[0].subject is None:
        raise RequestError(f"case {case.case_id}: one edit with a subject is needed, got {case.edits!r}")
    return case.edits[0].prompt.rstrip(), case.edits[0].subject


def _cut_fact(start: int, prompt: str, subject: str) -> dict[str, int]:
    """Where the groups of a fact's prompt end, in characters; the prompt begins at ``start``."""
    subject_start = start + prompt.index(subject)
    return {"before": subject_start, "subject": subject_start + len(subject), "phrase": start + len(prompt)}


def _make_probe(tokenizer: Tokenizer, text: str, expected: str, ends: Mapping[str, int], beyond: str) -> Probe:
    """Tokens by the group in which their last character is; those after all of ``ends`` are ``beyond``."""
    if expected.startswith(ARTICLE):
        text = f"{text} {ARTICLE.strip()}"
    ids, offsets = TextEncoder(tokenizer).encode_with_offsets(text)
    space, target = _encode_name(tokenizer, expected)
    input_ids = (*ids, *space)
    groups: dict[str, list[int]] = {name: [] for name in dict.fromkeys([*ends, beyond, "last"])}
    for position in range(len(input_ids) - 1):
        begin, end = offsets[position] if position < len(ids) else (len(text), len(text))
        inside = next((name for name, cut in ends.items() if max(begin, end - 1) < cut), beyond)
        groups[inside].append(position)
    groups["last"].append(len(input_ids) - 1)
    return Probe(text, input_ids, {name: tuple(positions) for name, positions in groups.items()}, target)
