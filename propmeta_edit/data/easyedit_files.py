"""EasyEdit's own evaluation files (one JSON list): KnowEdit, ZsRE and CounterFact, as cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from propmeta_edit.data.mquake import read_json_list
from propmeta_edit.errors import DataError, RequestError
from propmeta_edit.records import Case, EditRequest, Question

PORTABILITY = ("Reasoning", "Logical_Generalization", "Subject_Aliasing")  # the first that a record has is its question


def load_easyedit_file(path: str | Path) -> list[Case]:
    """Read a KnowEdit, ZsRE or CounterFact file.

    A case's question is the record's first portability prompt that has an answer, else its rephrased prompt with the new object for
    answer; the first locality prompt that has one becomes the other fact. The tag ``probe`` says which question it is.

    Raises:
        DataError: the file cannot be read, or a record is broken (with its index).
    """
    cases = []
    for index, raw in enumerate(read_json_list(Path(path))):
        try:
            if raw.get("alt") == "":
                continue  # ZsRE has records without a new object, which EasyEdit skips as well
            cases.append(_make_case(raw, index))
        except KeyError as error:
            raise DataError(f"record {index}: missing key {error}", path) from error
        except RequestError as error:
            raise DataError(f"record {index}: {error}", path) from error
        except (AttributeError, IndexError, TypeError) as error:
            raise DataError(f"record {index}: in none of EasyEdit's formats ({error})", path) from error
    return cases


def _make_case(raw: Mapping[str, Any], index: int) -> Case:
    prompt = _take(raw, "prompt", "src", "text")
    target = _first_text(_take(raw, "target_new", "alt", "labels"))
    subject = raw.get("subject") or raw.get("concept")
    if isinstance(subject, str) and "{}" in prompt:
        prompt = prompt.replace("{}", subject, 1)
    edit = EditRequest(prompt.strip(), target, subject if subject and subject in prompt else None)
    probe, question = _find_question(raw, target)
    tags = {"edits": "1", "probe": probe}
    return Case(f"easyedit-{raw.get('case_id', index)}", (edit,), question, other_fact=_find_locality(raw), tags=tags)


def _take(raw: Mapping[str, Any], *names: str) -> Any:
    for name in names:
        if name in raw:
            return raw[name]
    raise KeyError(" or ".join(names))


def _find_question(raw: Mapping[str, Any], target: str) -> tuple[str, Question]:
    portability = raw.get("portability") or {}
    if portability.get("New Question"):  # ZsRE's
        return "Reasoning", Question(portability["New Question"], _all_texts(portability["New Answer"]))
    for name in PORTABILITY:
        question = _first_with_answer(portability.get(name))
        if question is not None:
            return name, question
    return "rephrase", Question(_first_text(_take(raw, "rephrase_prompt", "rephrase", "prompt", "src", "text")), (target,))


def _find_locality(raw: Mapping[str, Any]) -> Question | None:
    for items in (raw.get("locality") or {}).values():
        question = _first_with_answer(items)
        if question is not None:
            return question
    for prompt, answer in (("locality_prompt", "locality_ground_truth"), ("loc", "loc_ans")):
        if raw.get(prompt) and raw.get(answer):
            return Question(raw[prompt].removeprefix("nq question: "), (str(raw[answer]),))
    return None


def _first_with_answer(items: Sequence[Mapping[str, Any]] | None) -> Question | None:
    """The first of a record's probes that has an answer: real files have some whose answer is blank."""
    for item in items or ():
        answers = _all_texts(item["ground_truth"])
        if any(answer.strip() for answer in answers):
            return Question(_first_text(item["prompt"]), answers)
    return None


def _first_text(value: Any) -> str:
    return _first_text(value[0]) if isinstance(value, list) else str(value)


def _all_texts(value: Any) -> tuple[str, ...]:
    """EasyEdit nests answers in one or two lists, of which the inner one holds aliases."""
    if not isinstance(value, list):
        return (str(value),)
    return tuple(dict.fromkeys(text for item in value for text in _all_texts(item) if text.strip()))
