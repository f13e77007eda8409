"""CRE (Controlled RippleEdit) files: JSON Lines, one invented subject with three facts and its questions a line."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from propmeta_edit.errors import ConfigError, DataError, RequestError
from propmeta_edit.files import write_text_atomically
from propmeta_edit.records import Case, EditRequest, Question

QUESTION_CHOICES = ("seeded", "all")
_QUESTION_TEXTS = ("question_template", "alias_question", "unalias_question", "entity_name")


def load_cre(path: str | Path, question_choice: str = "seeded", seed: int = 0) -> list[Case]:
    """Read a CRE file; the edit is the atomic fact a question asks about, the question its two-hop wording.

    Args:
        path: a JSON Lines file in the CRE format with ``facts`` and ``questions``; empty lines are skipped.
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
            questions = take(record, "questions", list)
            if not questions:
                raise DataError("the record has no questions")
            case_id = f"cre-{index:06d}"
            if question_choice == "all":
                cases.extend(_make_case(record, question, f"{case_id}#{k}") for k, question in enumerate(questions))
            else:
                chosen = random.Random(f"{seed}:{line}").choice(questions)
                cases.append(_make_case(record, chosen, case_id))
        except (DataError, RequestError) as error:
            raise DataError(str(error), path, line) from error
    return cases


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
    if key not in mapping and key == "facts":
        raise DataError("the record has no 'facts'; an edit is one of its atomic facts, so text-only CRE files do not serve")
    if key not in mapping:
        raise DataError(f"missing key {key!r}; found {', '.join(sorted(mapping)) or 'no keys'}")
    value = mapping[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{key!r} must be of type {kind.__name__}, got {value!r}")
    return value


def _make_case(record: Mapping[str, Any], question: Any, case_id: str) -> Case:
    """The case of one question of a record."""
    if not isinstance(question, dict):
        raise DataError(f"a question must be a JSON object, got {question!r}")
    facts = take(record, "facts", list)
    index = take(question, "fact_idx", int)
    if not 0 <= index < len(facts):
        raise DataError(f"'fact_idx' must be in 0..{len(facts) - 1}, got {index}")
    if not isinstance(facts[index], dict):
        raise DataError(f"fact {index} must be a JSON object, got {facts[index]!r}")
    prefix = _cut_end(take(facts[index], "prefix", str))
    subject = take(record, "subject", str)
    edit = EditRequest(
        prefix,
        take(facts[index], "target", str).strip(),
        subject if subject and subject in prefix else None,
        rephrasings=_read_rephrasings(facts[index], prefix),
    )
    template, alias, unalias, entity = (take(question, key, str) for key in _QUESTION_TEXTS)
    answers = (take_answer(question),)
    tags = {"entity_type": take(record, "entity_type", str), "relation": template, "entity_name": entity}
    tags |= {"hops": "2", "edits": "1"}
    return Case(case_id, (edit,), Question(alias, answers), Question(unalias, answers), tags=tags)


def take_answer(question: Mapping[str, Any]) -> str:
    """A question's answer as text; the file may hold years as numbers.

    Raises:
        DataError: it is missing, or neither a string nor a number.
    """
    answer = question.get("answer")
    if not isinstance(answer, str | int | float) or isinstance(answer, bool):
        raise DataError(f"'answer' must be a string or a number, got {answer!r}")
    return str(answer)


def _read_rephrasings(fact: Mapping[str, Any], prefix: str) -> tuple[str, ...]:
    """The fact's other wording before its object, where the file has one (``paraphrase_prefix``)."""
    if fact.get("paraphrase_prefix") is None:
        return ()
    other = _cut_end(take(fact, "paraphrase_prefix", str))
    return (other,) if other and other != prefix else ()


def _cut_end(prefix: str) -> str:
    """A fact cut before its object, without spaces and full stop at its end."""
    return prefix.strip().rstrip(".").rstrip()
