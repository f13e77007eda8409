"""CRE (Controlled RippleEdit) files: JSON Lines, one invented subject with three facts and its questions a line."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from propmeta_edit.data.cre_text import make_fact
from propmeta_edit.errors import ConfigError, DataError, RequestError
from propmeta_edit.files import write_text_atomically
from propmeta_edit.records import PARAPHRASE, SAME_FACT, Case, EditRequest, Probe, Question

QUESTION_CHOICES = ("seeded", "all")
_QUESTION_TEXTS = ("question_template", "alias_question", "unalias_question", "entity_name")
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
        path: a JSON Lines file in the CRE format with ``questions``, and with ``facts`` or the ``text`` that they are made from
            (``cre_text.make_fact``); empty lines are skipped. A question whose answer is NaN, null or the bare word "nan" has
            none, and is left out.
        question_choice: ``seeded`` draws one question an instance from (seed, line number), so that it does not depend on
            the other lines; ``all`` makes one case a question, its ``case_id`` ending in ``#`` and the question's index.
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
    for index, (line, record) in enumerate(read_json_lines(Path(path))):
        try:
            questions = _take_questions(record)
            case_id = f"cre-{index:06d}"
            if question_choice == "all":
                cases.extend(_make_case(record, question, f"{case_id}#{k}") for k, question in questions.items())
            elif questions:
                chosen = random.Random(f"{seed}:{line}").choice(list(questions.values()))
                case = _make_case(record, chosen, case_id)
                cases.append(replace(case, probes=(*case.probes, *_further_questions(record, chosen, questions.values()))))
        except (DataError, RequestError) as error:
            raise DataError(str(error), path, line) from error
    return cases


def count_cre(path: str | Path) -> CreCounts:
    """Count a CRE file's records, the facts of all its questions, and the questions without an answer.

    Raises:
        DataError: as ``load_cre``.
    """
    facts: dict[bool, set[tuple[int, str, str]]] = {True: set(), False: set()}  # of file or not: (line, prefix, target)
    num_unanswered = 0
    records = read_json_lines(Path(path))
    for line, record in records:
        try:
            questions = _take_questions(record)
            num_unanswered += len(record["questions"]) - len(questions)
            for question in questions.values():
                fact = _find_fact(record, question)
                facts[_has_facts(record)].add((line, take(fact, "prefix", str), take(fact, "target", str)))
        except DataError as error:
            raise DataError(str(error), path, line) from error
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


def read_json_lines(path: Path) -> list[tuple[int, Mapping[str, Any]]]:
    """Every non-empty line of a file as (1-based line number, record).

    Raises:
        DataError: it cannot be read, or a line is no JSON object (with its number).
    """
    try:
        # Not splitlines: JSON strings may hold U+2028 and the like unescaped.
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}; give a CRE file in JSON Lines", path) from error
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 text ({error.reason} at byte {error.start})", path) from error
    records: list[tuple[int, Mapping[str, Any]]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"broken JSON: {error.msg} (column {error.colno})", path, number) from error
        if not isinstance(record, dict):
            raise DataError(f"a record must be a JSON object, got {type(record).__name__}", path, number)
        records.append((number, record))
    return records


def take(mapping: Mapping[str, Any], key: str, kind: type) -> Any:
    """A required value of a given type.

    Raises:
        DataError: it is missing, or of another type.
    """
    if key not in mapping:
        raise DataError(f"missing key {key!r}; found {', '.join(sorted(mapping)) or 'no keys'}")
    value = mapping[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{key!r} must be of type {kind.__name__}, got {value!r}")
    return value


def _take_questions(record: Mapping[str, Any]) -> dict[int, Any]:
    """A record's questions that have an answer, by their index in it."""
    questions = take(record, "questions", list)
    if not questions:
        raise DataError("the record has no questions")
    return {k: question for k, question in enumerate(questions) if not is_unanswered(question)}


def is_unanswered(question: Any) -> bool:
    """Whether its answer is NaN, null or the word nan, so that it asks nothing."""
    if not isinstance(question, dict) or "answer" not in question:
        return False  # broken in another way, of which the user is told
    answer = question["answer"]
    if isinstance(answer, str):
        return answer.strip() in _NOT_ANSWERED
    return answer is None or (isinstance(answer, float) and math.isnan(answer))


def _make_case(record: Mapping[str, Any], question: Any, case_id: str) -> Case:
    """The case of one question of a record."""
    fact = _find_fact(record, question)
    prefix = _cut_end(take(fact, "prefix", str))
    subject = take(record, "subject", str)
    edit = EditRequest(
        prefix,
        take(fact, "target", str).strip(),
        subject if subject and subject in prefix else None,
        rephrasings=_read_rephrasings(fact, prefix),
    )
    template, alias, unalias, entity = (take(question, key, str) for key in _QUESTION_TEXTS)
    answers = (take_answer(question),)
    tags = {"entity_type": take(record, "entity_type", str), "relation": template, "entity_name": entity}
    tags |= {"hops": "2", "edits": "1"}
    again = question.get("alias_question_paraphrase")
    is_same = isinstance(again, str) and again.strip() and WRONG_PARAPHRASE not in template.casefold()
    probes = (Probe(PARAPHRASE, Question(again, answers)),) if is_same else ()
    return Case(case_id, (edit,), Question(alias, answers), Question(unalias, answers), probes=probes, tags=tags)


def _further_questions(record: Mapping[str, Any], chosen: Mapping[str, Any], questions: Iterable[Any]) -> list[Probe]:
    """The other questions of a record that follow from the same fact."""
    fact = _find_fact(record, chosen)
    same = [q for q in questions if q is not chosen and _find_fact(record, q) == fact]
    return [Probe(SAME_FACT, Question(take(q, "alias_question", str), (take_answer(q),))) for q in same]


def take_answer(question: Mapping[str, Any]) -> str:
    """A question's answer as text; the file may hold years as numbers.

    Raises:
        DataError: it is missing, or neither a string nor a number.
    """
    answer = question.get("answer")
    if not isinstance(answer, str | int | float) or isinstance(answer, bool):
        raise DataError(f"'answer' must be a string or a number, got {answer!r}")
    return str(answer)


def _has_facts(record: Mapping[str, Any]) -> bool:
    return record.get("facts") not in (None, [])  # a column of a data set has one of these where a record has none


def _find_fact(record: Mapping[str, Any], question: Any) -> Mapping[str, Any]:
    """The fact a question asks about: the record's own, or made from its text if it has none."""
    if not isinstance(question, dict):
        raise DataError(f"a question must be a JSON object, got {question!r}")
    if not _has_facts(record):
        if record.get("text") is None:
            raise DataError(
                f"the record has neither 'facts' nor 'text'; an edit is one of its facts, so give it one of both (it has "
                f"{', '.join(sorted(record))})"
            )
        return make_fact(record, question)
    facts = take(record, "facts", list)
    index = take(question, "fact_idx", int)
    if not 0 <= index < len(facts):
        raise DataError(f"'fact_idx' must be in 0..{len(facts) - 1}, got {index}")
    fact = facts[index]
    if not isinstance(fact, dict):
        raise DataError(f"fact {index} must be a JSON object, got {fact!r}")
    return fact


def _read_rephrasings(fact: Mapping[str, Any], prefix: str) -> tuple[str, ...]:
    """The fact's other wording before its object, where the file has one (``paraphrase_prefix``)."""
    if fact.get("paraphrase_prefix") is None:
        return ()
    other = _cut_end(take(fact, "paraphrase_prefix", str))
    return (other,) if other and other != prefix else ()


def _cut_end(prefix: str) -> str:
    """A fact cut before its object, without spaces and full stop at its end."""
    return prefix.strip().rstrip(".").rstrip()
