"""What is measured: a verdict on what a model said of each case, and the share of the cases where it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from propmeta_edit.evaluation.scoring import contains_answer, contains_answer_at_word_boundary
from propmeta_edit.models.generation import MAX_NEW_TOKENS
from propmeta_edit.records import WEIGHED, Case, Probe, Question
from propmeta_edit.text.sentences import first_sentence


@dataclass(frozen=True)
class CaseOutcome:
    """What a method's model said after the edits of a case.

    Attributes:
        generated: the first ``max_new_tokens`` greedy tokens after the question.
        whole: the same text to its natural stop.
        cloze_generated: after the cloze, if the case has one.
        fact_generated, facts_whole: after each edit's own prompt, likewise.
        seconds_per_edit: of the edit call alone; None where nothing is edited, or where several cases were edited at once.
        second_hop_generated, other_fact_generated: after the single-hop questions, if the case has them.
        neighbour_generated, neighbour_before: after the other subject's question, with the edits and without.
        before: after the question, without the edits, where there are probes to compare with.
        probes: of each of the case's probes its kind, question, answers, ``against``, and what was said ``before`` (None where it
            is not compared) and ``after`` the edits; of weighed ones ``nats`` instead (``evaluation.weighing``).
        answer_tokens, fact_tokens: of the shortest accepted answer, and of the longest edited object; None where nobody counted.
    """

    generated: str
    cloze_generated: str | None
    fact_generated: tuple[str, ...]
    seconds_per_edit: float | None
    second_hop_generated: str | None = None
    other_fact_generated: str | None = None
    neighbour_generated: str | None = None
    neighbour_before: str | None = None
    whole: str | None = None
    facts_whole: tuple[str, ...] = ()
    before: str | None = None
    probes: tuple[Mapping[str, Any], ...] = ()
    answer_tokens: int | None = None
    fact_tokens: int | None = None
    max_new_tokens: int = MAX_NEW_TOKENS


@dataclass(frozen=True)
class Measure:
    """One measure, from the verdict to the column.

    Args:
        field: of a row: the verdict, None where it is not asked.
        column: of a table: the share of the verdicts that are not None.
        title: of the column, for reading.
        judge: the verdict on what was said.
        is_due: whether a case asks for it; a case that failed is then wrong, not missing, or failures would raise the share.
        has_interval: whether the table gives its 95 % interval.
    """

    field: str
    column: str
    title: str
    judge: Callable[[Case, CaseOutcome], bool | None]
    is_due: Callable[[Case], bool] = lambda case: True
    has_interval: bool = False


def _answers(said: str | None, question: Question | None) -> bool | None:
    return None if said is None or question is None else contains_answer(said, question.answers)


def _tells_all_facts(case: Case, said: CaseOutcome) -> bool:
    facts = zip(said.fact_generated, case.edits, strict=True)
    return all(contains_answer(text, (edit.target_new,)) for text, edit in facts)


def _answers_naturally(case: Case, said: CaseOutcome) -> bool | None:
    return None if said.whole is None else contains_answer(first_sentence(said.whole), case.question.answers)


def _tells_all_facts_naturally(case: Case, said: CaseOutcome) -> bool | None:
    if not said.facts_whole:
        return None
    facts = zip(said.facts_whole, case.edits, strict=True)
    return all(contains_answer(first_sentence(text), (edit.target_new,)) for text, edit in facts)


def _is_longer(tokens: int | None, said: CaseOutcome) -> bool | None:
    return None if tokens is None else tokens > said.max_new_tokens


def _leaves_neighbour(case: Case, said: CaseOutcome) -> bool | None:
    return None if said.neighbour_generated is None else said.neighbour_generated == said.neighbour_before


MEASURES = (
    Measure(
        "correct",
        "accuracy",
        "accuracy %",
        lambda case, said: contains_answer(said.generated, case.question.answers),
        has_interval=True,
    ),
    Measure(
        "correct_word_boundary",
        "accuracy_word_boundary",
        "at word boundary %",
        lambda case, said: contains_answer_at_word_boundary(said.generated, case.question.answers),
    ),
    Measure(
        "cloze_correct",
        "accuracy_cloze",
        "cloze %",
        lambda case, said: _answers(said.cloze_generated, case.question),
        lambda case: case.question.cloze is not None,
    ),
    Measure("natural_correct", "accuracy_natural", "natural stop %", _answers_naturally, has_interval=True),
    Measure("efficacy", "efficacy", "efficacy %", _tells_all_facts, has_interval=True),
    Measure("natural_efficacy", "efficacy_natural", "efficacy, natural stop %", _tells_all_facts_naturally),
    Measure(
        "locality_second_hop",
        "locality_second_hop",
        "locality, second hop %",
        lambda case, said: _answers(said.second_hop_generated, case.second_hop),
        lambda case: case.second_hop is not None,
    ),
    Measure(
        "locality_other_fact",
        "locality_other_fact",
        "locality, other fact %",
        lambda case, said: _answers(said.other_fact_generated, case.other_fact),
        lambda case: case.other_fact is not None,
    ),
    Measure(
        "locality_neighbourhood",
        "locality_neighbourhood",
        "locality, neighbourhood %",
        _leaves_neighbour,
        lambda case: case.neighbour is not None,
    ),
    Measure(
        "answer_too_long",
        "answers_too_long",
        "answers too long %",
        lambda case, said: _is_longer(said.answer_tokens, said),
        lambda case: False,
    ),
    Measure(
        "fact_too_long",
        "facts_too_long",
        "objects too long %",
        lambda case, said: _is_longer(said.fact_tokens, said),
        lambda case: False,
    ),
)


def judge(case: Case, said: CaseOutcome) -> dict[str, object]:
    """What was said of a case and every verdict on it, as the fields of a row."""
    return {
        "generated": said.generated,
        "cloze_generated": said.cloze_generated,
        "fact_generated": said.fact_generated,
        "whole": said.whole,
        "facts_whole": said.facts_whole,
        "before": said.before,
        "probes": said.probes,
        "seconds_per_edit": said.seconds_per_edit,
        **{measure.field: measure.judge(case, said) for measure in MEASURES},
    }


def judge_failed(case: Case) -> dict[str, object]:
    """The verdicts on a case that nothing was said of, and its probes likewise: wrong wherever one is due."""
    probes = tuple(as_record(probe, None, None if probe.kind in WEIGHED else "") for probe in case.probes)
    return {"probes": probes, **{measure.field: False if measure.is_due(case) else None for measure in MEASURES}}


def as_record(probe: Probe, before: str | None, after: str | None, nats: tuple[float, float] | None = None) -> dict[str, Any]:
    """A probe as rows keep it; a weighed one with how unlikely both its objects are (``nats``, None where the case failed)."""
    about = {"kind": probe.kind, "question": probe.question.text, "answers": list(probe.question.answers)}
    record = {**about, "against": list(probe.against), "before": before, "after": after}
    return {**record, "nats": None if nats is None else list(nats)} if probe.kind in WEIGHED else record
