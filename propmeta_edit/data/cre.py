"""CRE (Controlled RippleEdit) files: a record is one invented subject with three facts and its questions."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from propmeta_edit.data.cre_text import make_fact
from propmeta_edit.data.fields import ANSWER_OR_NONE, ANYTHING, BLANK, TEXT, WHOLE, list_of, object_of, show_keys
from propmeta_edit.data.reading import read_records
from propmeta_edit.errors import ConfigError, DataError
from propmeta_edit.files import write_text_atomically
from propmeta_edit.records import PARAPHRASE, SAME_FACT, Case, EditRequest, Probe, Question

QUESTION_CHOICES = ("seeded", "all")
_QUESTION_TEXTS = ("question_template", "alias_question", "unalias_question", "entity_name")
_QUESTION = object_of(
    {**dict.fromkeys(_QUESTION_TEXTS, TEXT), "answer": ANSWER_OR_NONE},
    optional={"fact_idx": WHOLE, "alias_question_paraphrase": BLANK, "unalias_question_paraphrase": BLANK},
)
_FACT = object_of({"prefix": TEXT, "target": TEXT}, optional={"paraphrase_prefix": BLANK, "fact": ANYTHING, "paraphrase": ANYTHING})
SHAPE = object_of(
    {"entity_type": TEXT, "subject": TEXT, "questions": list_of(_QUESTION)},
    optional={
        "facts": list_of(_FACT, least=0),
        "text": BLANK,
        "gender_type": BLANK,
        "entity_names": list_of(TEXT, least=0),
        "subject_type": ANYTHING,
    },
)
WRONG_PARAPHRASE = "ethnic group"  # the paraphrase of its question asks for the religion, in the published files
_NOT_ANSWERED = ("nan", "NaN")  # what became of a missing answer as it was written; "Nan" may be the province of Thailand


@dataclass(frozen=True)
class CreCounts:
    """What a CRE file holds, and where the facts that it asks about came from.

    Args:
        num_records: its records, also those none of whose questions has an answer.
        from_file: different facts that stand in its records' ``facts``.
        from_text: different facts made from the ``text`` of records without.
        num_unanswered: questions left out because they have no answer.
    """

    num_records: int
    from_file: int
    from_text: int
    num_unanswered: int


def load_cre(path: str | Path, question_choice: str = "seeded", seed: int = 0) -> list[Case]:
    """Read a CRE file; the edit is the atomic fact a question asks about, the question its two-hop wording.

    Args:
        path: a file in the CRE format, JSON Lines or one JSON list, with ``questions``, and with ``facts`` or the ``text`` that
            they are made from (``cre_text.make_fact``); empty lines are skipped. A question whose answer is NaN, null or the bare
            word "nan" has none, and is left out.
        question_choice: ``seeded`` draws one question an instance from (seed, line number; in a list, the place from 1), so that
            it does not depend on the other lines; ``all`` makes one case a question, its ``case_id`` ending in ``#`` and the
            question's index.
        seed: used by ``seeded`` only.

    Returns:
        The cases in file order, with the tags ``entity_type``, ``relation`` (the question template), ``entity_name``, ``hops`` and
        ``edits`` (always 2 and 1: one fact is written, and the question goes one relation further).

    Raises:
        ConfigError: an unknown ``question_choice``.
        DataError: the file cannot be read, or a record is broken; it names the path and the line.
    """
    if question_choice not in QUESTION_CHOICES:
        raise ConfigError(f"question_choice must be one of {', '.join(QUESTION_CHOICES)}, got {question_choice!r}")
    cases: list[Case] = []
    for record in read_records(path, SHAPE):
        with record.named():
            questions = _take_questions(record.value)
            case_id = f"cre-{record.index:06d}"
            if question_choice == "all":
                cases.extend(_make_case(record.value, question, f"{case_id}#{k}") for k, question in questions.items())
            elif questions:
                chosen = random.Random(f"{seed}:{record.number}").choice(list(questions.values()))
                case = _make_case(record.value, chosen, case_id)
                cases.append(replace(case, probes=(*case.probes, *_further_questions(record.value, chosen, questions.values()))))
    return cases


def count_cre(path: str | Path) -> CreCounts:
    """Count a CRE file's records, the facts of all its questions, and the questions without an answer.

    Raises:
        DataError: as ``load_cre``.
    """
    facts: dict[bool, set[tuple[int, str, str]]] = {True: set(), False: set()}  # of file or not: (record, prefix, target)
    num_unanswered = 0
    records = read_records(path, SHAPE)
    for record in records:
        with record.named():
            questions = _take_questions(record.value)
            num_unanswered += len(record.value["questions"]) - len(questions)
            for question in questions.values():
                fact = _find_fact(record.value, question)
                facts[_has_facts(record.value)].add((record.index, fact["prefix"], fact["target"]))
    return CreCounts(len(records), len(facts[True]), len(facts[False]), num_unanswered)


def save_cre(records: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Write records as JSON Lines, in full or not at all.

    Args:
        records: CRE records, or any mappings that JSON can hold.
        path: the file to write or replace; its folder is created if missing.

    Raises:
        DataError: the file cannot be written.
    """
    save_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), path)


def save_text(text: str, path: str | Path) -> None:
    """Write UTF-8 text in full or not at all.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        write_text_atomically(path, text)
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror or error}", path) from error
    except UnicodeEncodeError as error:
        raise DataError(f"cannot be written: it holds half of a character ({error.reason})", path) from error


def _take_questions(record: Mapping[str, Any]) -> dict[int, Any]:
    """A record's questions that have an answer, by their index in it."""
    return {k: question for k, question in enumerate(record["questions"]) if not is_unanswered(question)}


def is_unanswered(question: Mapping[str, Any]) -> bool:
    """Whether its answer is NaN, null or the word nan, so that it asks nothing."""
    answer = question["answer"]
    if isinstance(answer, str):
        return answer.strip() in _NOT_ANSWERED
    return answer is None or (isinstance(answer, float) and math.isnan(answer))


def _make_case(record: Mapping[str, Any], question: Mapping[str, Any], case_id: str) -> Case:
    """The case of one question of a record."""
    fact = _find_fact(record, question)
    prefix, subject = _cut_end(fact["prefix"]), record["subject"]
    rephrasings = _read_rephrasings(fact, prefix)
    edit = EditRequest(prefix, fact["target"].strip(), subject if subject in prefix else None, rephrasings=rephrasings)
    template, alias, unalias, entity = (question[key] for key in _QUESTION_TEXTS)
    answers = (str(question["answer"]),)
    tags = {"entity_type": record["entity_type"], "relation": template, "entity_name": entity, "hops": "2", "edits": "1"}
    again = (question.get("alias_question_paraphrase") or "").strip()
    is_same = again and WRONG_PARAPHRASE not in template.casefold()
    probes = (Probe(PARAPHRASE, Question(question["alias_question_paraphrase"], answers)),) if is_same else ()
    return Case(case_id, (edit,), Question(alias, answers), Question(unalias, answers), probes=probes, tags=tags)


def _further_questions(record: Mapping[str, Any], chosen: Mapping[str, Any], questions: Iterable[Any]) -> list[Probe]:
    """The other questions of a record that follow from the same fact."""
    fact = _find_fact(record, chosen)
    same = [q for q in questions if q is not chosen and _find_fact(record, q) == fact]
    return [Probe(SAME_FACT, Question(q["alias_question"], (str(q["answer"]),))) for q in same]


def _has_facts(record: Mapping[str, Any]) -> bool:
    return record.get("facts") not in (None, [])  # a column of a data set has one of these where a record has none


def _find_fact(record: Mapping[str, Any], question: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fact a question asks about: the record's own, or made from its text if it has none."""
    if not _has_facts(record):
        if not (record.get("text") or "").strip():
            raise DataError(
                f"the record has neither 'facts' nor 'text'; an edit is one of its facts, so give it one of both (it has "
                f"{show_keys(record)})"
            )
        return make_fact(record, question)
    index, facts = question.get("fact_idx"), record["facts"]
    if index is None:
        raise DataError("a question of a record with 'facts' needs 'fact_idx', the place of its fact among them, from 0")
    if not 0 <= index < len(facts):
        raise DataError(f"'fact_idx' must be in 0..{len(facts) - 1}, got {index}")
    return facts[index]  # type: ignore[no-any-return]


def _read_rephrasings(fact: Mapping[str, Any], prefix: str) -> tuple[str, ...]:
    """The fact's other wording before its object, where the file has one (``paraphrase_prefix``)."""
    other = _cut_end(fact.get("paraphrase_prefix") or "")
    return (other,) if other and other != prefix else ()


def _cut_end(prefix: str) -> str:
    """A fact cut before its object, without spaces and full stop at its end."""
    return prefix.strip().rstrip(".").rstrip()
