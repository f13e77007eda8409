"""EasyEdit's own evaluation files and their kin as cases: KnowEdit, ZsRE, CounterFact, MzsRE, QAEdit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from propmeta_edit.data.fields import ANYTHING, BLANK, ID, NULL, Parts, Shape, list_of, nested, number, object_of, one_of, show_keys
from propmeta_edit.data.reading import read_records
from propmeta_edit.errors import DataError
from propmeta_edit.records import FACT, Case, EditRequest, Probe, Question

PORTABILITY = ("Reasoning", "Logical_Generalization", "Subject_Aliasing")  # the first that a record has is its question
PROMPTS, TARGETS = ("prompt", "src", "text"), ("target_new", "alt", "labels", "target")  # by format
REPHRASED = ("rephrase_prompt", "rephrase")
OTHER_FACTS = (("locality_prompt", "locality_ground_truth"), ("loc", "loc_ans"))
_NQ = "nq question: "  # before ZsRE's questions about something else
_TEXTS = nested(BLANK)
_ANSWERS = nested(one_of(BLANK, number()))  # in one or two lists, of which the inner one holds aliases; some are blank
_PROBE = object_of(optional={"prompt": _TEXTS, "ground_truth": _ANSWERS, "loc": BLANK, "loc_ans": _ANSWERS})
_PROBES = nested(one_of(_PROBE, NULL))
# ZsRE's portability is one question in fields of its own; the others' is by kind, or a list without kinds.
_ZSRE_PORTABILITY = {"New Question": BLANK, "New Answer": _ANSWERS, "Recalled Relation": ANYTHING}
_BY_KIND = one_of(object_of(optional=_ZSRE_PORTABILITY, others=_PROBES), list_of(_PROBES, least=0))
_RECORD = object_of(
    optional={
        "case_id": ID,
        **dict.fromkeys((*PROMPTS, "subject", "concept"), BLANK),
        **dict.fromkeys((*TARGETS, *REPHRASED), _TEXTS),
        "portability": _BY_KIND,
        "locality": _BY_KIND,
        **{prompt: BLANK for prompt, _ in OTHER_FACTS},
        **{answer: _ANSWERS for _, answer in OTHER_FACTS},
    },
)


def languages_of(value: Any) -> list[str]:
    """The languages of a record in several; none of an ordinary one."""
    if not isinstance(value, dict) or set(PROMPTS) & set(value):
        return []
    return [name for name, part in value.items() if isinstance(part, dict) and set(PROMPTS) & set(part)]


def _parts_of(value: Any) -> Parts:
    return [(f".{name}", value[name], _RECORD) for name in languages_of(value)] or [("", value, _RECORD)]


# A record, or one in several languages as MzsRE has it: {"en": {...}, "de": {...}}.
SHAPE = Shape(_RECORD.what, _RECORD.types, parts=_parts_of)


def load_easyedit_file(path: str | Path) -> list[Case]:
    """Read a KnowEdit, ZsRE, CounterFact (as EasyEdit has it), MzsRE or QAEdit file.

    A case's question is the record's first portability prompt that has an answer, else its rephrased prompt with the new object for
    answer; the first locality prompt that has one becomes the other fact. The tag ``probe`` says which question it is. A record in
    several languages is a case in each (tag ``language``), which is also asked for the fact in the others.

    Raises:
        DataError: the file cannot be read, or a record is broken (with its place and the field).
    """
    cases = []
    for record in read_records(path, SHAPE):
        with record.named():
            languages = languages_of(record.value)
            parts = {name: record.value[name] for name in languages} or {"": record.value}
            made = {name: _make_case(raw, record.index, name) for name, raw in parts.items() if not _lacks_target(raw)}
            cases += [_ask_in_other_languages(name, made) for name in made]
    return cases


def _lacks_target(raw: Mapping[str, Any]) -> bool:
    """ZsRE has records without a new object, which EasyEdit skips as well."""
    alt = raw.get("alt")
    return isinstance(alt, str) and not alt.strip()


def _make_case(raw: Mapping[str, Any], index: int, language: str) -> Case:
    place = f"{language}." if language else ""
    prompt_field, target_field = (_find_field(raw, names, place) for names in (PROMPTS, TARGETS))
    prompt, target = raw[prompt_field], _first_text(raw[target_field], place + target_field)
    subject = (raw.get("subject") or raw.get("concept") or "").strip()
    if "{}" in prompt:
        if not subject:
            raise DataError(f"the prompt {prompt!r} has a place for a subject, and the record has no 'subject'")
        prompt = prompt.replace("{}", subject, 1)
    edit = EditRequest(prompt.strip(), target, subject if subject and subject in prompt else None)
    probe, question = _find_question(raw, target)
    tags = {"edits": "1", "probe": probe} | ({"language": language} if language else {})
    case_id = index if raw.get("case_id") is None else raw["case_id"]
    name = f"easyedit-{case_id}" + (f"-{language}" if language else "")
    return Case(name, (edit,), question, other_fact=_find_locality(raw), tags=tags)


def _ask_in_other_languages(name: str, made: Mapping[str, Case]) -> Case:
    """A case with its fact asked in the record's other languages; MzsRE's prompts are questions."""
    case = made[name]
    others = [other.edits[0] for language, other in made.items() if language != name]
    probes = tuple(Probe(FACT, Question(edit.prompt, (edit.target_new,))) for edit in others)
    return Case(case.case_id, case.edits, case.question, other_fact=case.other_fact, probes=probes, tags=case.tags)


def _find_field(raw: Mapping[str, Any], names: tuple[str, ...], place: str) -> str:
    """The first of several fields that has a value."""
    found = next((name for name in names if raw.get(name) is not None), None)
    if found is not None:
        return found
    null = next((name for name in names if name in raw), None)
    if null is not None:
        raise DataError(f"{place + null!r} must be a string, got null")
    raise DataError(f"missing key '{' or '.join(names)}'; found {show_keys(raw)}")


def _find_question(raw: Mapping[str, Any], target: str) -> tuple[str, Question]:
    portability = raw.get("portability") or {}
    if isinstance(portability, list):
        question = _first_with_answer(portability)
        if question is not None:
            return "portability", question
    else:
        texts, answers = portability.get("New Question"), _all_texts(portability.get("New Answer"))
        if texts and texts.strip() and answers:  # ZsRE's
            return "Reasoning", Question(texts, answers)
        kinds = [*PORTABILITY, *(name for name in portability if name not in (*PORTABILITY, *_ZSRE_PORTABILITY))]
        for kind in kinds:
            question = _first_with_answer(portability.get(kind))
            if question is not None:
                return kind, question
    again = next((text for name in (*REPHRASED, *PROMPTS) for text in _all_texts(raw.get(name))), "")
    return "rephrase", Question(again, (target,))


def _find_locality(raw: Mapping[str, Any]) -> Question | None:
    locality = raw.get("locality") or {}
    for items in (locality,) if isinstance(locality, list) else locality.values():
        question = _first_with_answer(items)
        if question is not None:
            return question
    for prompt, answer in OTHER_FACTS:
        text, answers = (raw.get(prompt) or "").removeprefix(_NQ), _all_texts(raw.get(answer))
        if text.strip() and answers:
            return Question(text, answers)
    return None


def _first_with_answer(items: Any) -> Question | None:
    """The first of a record's probes that has an answer: real files have some whose answer is blank, or none at all."""
    if isinstance(items, list):
        return next((found for item in items if (found := _first_with_answer(item)) is not None), None)
    answers = _all_texts(items.get("ground_truth"), items.get("loc_ans")) if items else ()
    if not answers:
        return None
    texts = _all_texts(items.get("prompt"), (items.get("loc") or "").removeprefix(_NQ))
    if not texts:
        raise DataError(f"a probe with the answer {answers[0]!r} has no 'prompt'; found {show_keys(items)}")
    return Question(texts[0], answers)


def _first_text(value: Any, name: str) -> str:
    texts = _all_texts(value)
    if not texts:
        raise DataError(f"{name!r} must not be empty, got {value!r}")
    return texts[0]


def _all_texts(*values: Any) -> tuple[str, ...]:
    """The texts in any lists, each once, without blank ones; numbers as they are written."""
    found: dict[str, None] = {}
    left = list(reversed(values))
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += reversed(value)
        elif value is not None and str(value).strip():
            found[str(value)] = None
    return tuple(found)
