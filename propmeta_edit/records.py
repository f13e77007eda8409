"""The records that every other room speaks in: edit requests, questions, cases and meta-tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from propmeta_edit.errors import RequestError


def find_lone_surrogate(text: str) -> str | None:
    """Half of a character in a text, as ``\\ud83d``, which no encoding and no tokenizer can take; None where there is none."""
    half = next((letter for letter in text if "\ud800" <= letter <= "\udfff"), None) if not text.isascii() else None
    return None if half is None else f"\\u{ord(half):04x}"


def _require_whole_letters(name: str, text: str) -> None:
    half = find_lone_surrogate(text)
    if half is not None:
        raise RequestError(f"{name} holds {half}, half of a character, which is no text: {text!r}")


@dataclass(frozen=True)
class EditRequest:
    """One fact to write: after ``prompt`` the model shall say ``target_new``.

    Args:
        prompt: the fact without its object, the subject filled in ("Ann Lee is a citizen of").
        target_new: the new object, a non-empty string without a leading space.
        subject: the entity the fact is about; optional, but if given it must occur in ``prompt``.
        augmentation: (text, completion) pairs about the fact, for methods that train on more than the fact itself (CaKE).
        rephrasings: the data's own other wordings of the fact, each a prompt that ``target_new`` completes.

    Raises:
        RequestError: an empty prompt or target, anything that is no text, or a subject that is not in the prompt.
    """

    prompt: str
    target_new: str
    subject: str | None = None
    augmentation: tuple[tuple[str, str], ...] = ()
    rephrasings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("prompt", "target_new"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise RequestError(f"{name} must be a non-empty string, got {value!r} (request {self!r})")
            _require_whole_letters(name, value)
        if self.subject is not None and not isinstance(self.subject, str):
            raise RequestError(
                f"subject must be a string, or None if the request has none, got {self.subject!r} (request {self!r})"
            )
        _require_whole_letters("subject", self.subject or "")
        if self.subject is not None and self.subject not in self.prompt:
            raise RequestError(
                f"the subject {self.subject!r} does not occur in its prompt {self.prompt!r}; "
                "spell it as in the prompt, or leave the subject out"
            )


def as_requests(requests: EditRequest | Mapping[str, Any] | Sequence[EditRequest | Mapping[str, Any]]) -> list[EditRequest]:
    """One request or several, ours or EasyEdit's, as ours.

    Raises:
        RequestError: no request at all, or one that cannot be carried out (its number is named).
    """
    several = list(requests) if isinstance(requests, Sequence) and not isinstance(requests, str) else [requests]
    if not several:
        raise RequestError("there is no request to edit; give at least one prompt and target_new")
    edits = []
    for number, request in enumerate(several):
        try:
            edits.append(_as_request(request))
        except RequestError as error:
            raise RequestError(f"request {number}: {error}") from error
    return edits


def _as_request(request: EditRequest | Mapping[str, Any]) -> EditRequest:
    if isinstance(request, EditRequest):
        return request
    if not isinstance(request, Mapping):
        raise RequestError(f"expected a mapping with prompt and target_new, or an EditRequest, got {request!r}")
    return EditRequest(*request_fields(request))


def request_fields(request: Mapping[str, Any]) -> tuple[str, str, str | None]:
    """(prompt with the subject filled in, target, subject) of an EasyEdit request in any of the shapes that are in use.

    Raises:
        RequestError: a prompt with a place for a subject, and no subject.
    """
    prompt, subject, target = request.get("prompt"), request.get("subject"), request.get("target_new")
    if isinstance(prompt, str) and "{}" in prompt:
        if subject is None:
            raise RequestError(
                f"the prompt {prompt!r} has a place for a subject, and the request gives none; add subject, or fill it in"
            )
        prompt = prompt.replace("{}", subject, 1) if isinstance(subject, str) else prompt
    if isinstance(target, Mapping):
        target = target.get("str")
    return prompt, target, subject  # type: ignore[return-value]


@dataclass(frozen=True)
class Question:
    """A question with every accepted answer; ``cloze`` is the same question as a text to continue, where the data has one."""

    text: str
    answers: tuple[str, ...]
    cloze: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip():
            raise RequestError(f"a question must not be empty, and a string, got {self.text!r}")
        if not self.answers or isinstance(self.answers, str) or not all(isinstance(a, str) and a.strip() for a in self.answers):
            raise RequestError(f"question {self.text!r} needs non-empty answers, a list of strings, got {self.answers!r}")
        for text in (self.text, *self.answers):
            _require_whole_letters(f"question {self.text!r}", text)


@dataclass(frozen=True)
class MetaTask:
    """A task τ of meta-training: the inner loop learns ``target``, the outer loop scores ``related``.

    Args:
        more_related: further questions that follow from the target, for an outer loss over several.
        unrelated: a question about another subject, for an outer loss with a locality term.
        known: a single-hop question about a real subject with its true answer, for a term that keeps what the model knows.
        together: further facts that the same inner loop learns, as tasks of their own.
        bystander: ``related`` about a subject that no fact of the task is about, for a term that keeps edits to their subjects.
    """

    task_id: str
    target: EditRequest
    related: Question
    more_related: tuple[Question, ...] = ()
    unrelated: Question | None = None
    known: Question | None = None
    together: tuple[MetaTask, ...] = ()
    bystander: Question | None = None

    @property
    def facts(self) -> tuple[MetaTask, ...]:
        """All facts that the task's inner loop learns, this one first."""
        return (self, *self.together)


SAME_FACT, PARAPHRASE, FACT = "same fact", "paraphrase", "fact"  # of the edited subject
OTHER, ELSEWHERE, REAL = "other", "elsewhere", "real"  # of subjects that no edit is about
TOGETHER = "together"  # of each of several facts that are one edit
EDITED, REWORDED, NEIGHBOUR = "edited prompt", "reworded prompt", "neighbourhood prompt"
WEIGHED = (EDITED, REWORDED, NEIGHBOUR)  # prompts whose new object and that of before are weighed by probability


@dataclass(frozen=True)
class Probe:
    """A further question that a case is asked after its edits.

    Args:
        kind: ``same fact``: another consequence of the edited fact; ``paraphrase``: the case's question in other words;
            ``fact``: the edited fact as a question; ``other``: the case's question about another invented subject; ``elsewhere``:
            the edited fact's prompt about another subject; ``real``: a question about a real subject, whose answer should stay;
            ``together``: the question of one of several facts that are written in one edit. Those of ``WEIGHED`` are prompts as
            they stand, of the edit, in other words, and about another subject with the same object of before: nothing is generated
            after them, but their first answer, the new object, is weighed against the first of ``against``, that of before.
        question: with the answers that are right for its own subject.
        against: answers that are wrong here and right for the edited subject (or for another fact of the same edit).
    """

    kind: str
    question: Question
    against: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """One evaluation case: write ``edits``, then ask ``question`` (a consequence of them).

    Args:
        case_id: unique within its data set.
        edits: the facts to write, in order; one for CRE, one to four for MQuAKE.
        question: the multi-hop question that follows from the edits.
        second_hop: the single-hop question about knowledge the model should have had before, if the data has one.
        neighbour: a question about another subject, which these edits must not change (its answers are of no account).
        other_fact: a single-hop question about something else, which the model should still answer.
        known: the edited fact before the edit, as a question about its real subject, if the data has it; other cases ask it.
        probes: further questions, for the measures of ``evaluation.counts``.
        tags: whatever results are broken down by, e.g. ``{"relation": "currency", "entity_type": "Country"}``.
    """

    case_id: str
    edits: tuple[EditRequest, ...]
    question: Question
    second_hop: Question | None = None
    neighbour: Question | None = None
    other_fact: Question | None = None
    known: Question | None = None
    probes: tuple[Probe, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)

    def as_task(self) -> MetaTask:
        """This case as a meta-training task.

        Raises:
            RequestError: the case has more than one edit; tasks have exactly one target.
        """
        if len(self.edits) != 1:
            raise RequestError(f"case {self.case_id} has {len(self.edits)} edits; a meta-training task has exactly one")
        return MetaTask(self.case_id, self.edits[0], self.question, known=self.second_hop)
