"""MQuAKE files (one JSON list of cases): edits, the first multi-hop question, and the 213-case subset."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from propmeta_edit.errors import DataError, RequestError
from propmeta_edit.records import FACT, PARAPHRASE, Case, EditRequest, Probe, Question

SUBSET_SIZE = 213
_FULL_SIZE = 3000

logger = logging.getLogger(__name__)


def load_mquake(path: str | Path) -> list[Case]:
    """Read a file of the MQuAKE family, CaKE's augmented copies and both shapes of MQuAKE-Remastered included.

    Args:
        path: a JSON list of cases.

    Returns:
        The cases in file order: all edits of the case, its first question with the new answer and that answer's aliases,
        ``cloze_question`` as the cloze where the file has one, and the tags ``hops``, ``edits`` and ``relation`` (the
        relation id of the last hop); ``hops`` and ``relation`` only where the case records its chain.

    Raises:
        DataError: the file cannot be read (with the line of broken JSON), or a case is broken (with its index and id).
    """
    return [_make_case(raw, index, path) for index, raw in enumerate(read_json_list(Path(path)))]


def load_mquake_subset(path: str | Path) -> list[Case]:
    """Read the cases with two hops of which only the first is edited (213 in the source paper). Logs their number.

    Args:
        path: a JSON list of cases with their chains (``orig.new_triples`` and ``orig.edit_triples``).

    Returns:
        The selected cases in file order; a warning is logged if a 3,000-case file does not give 213.

    Raises:
        DataError: as ``load_mquake``, and if a case lacks the chains that the filter reads.
    """
    raws = read_json_list(Path(path))
    selected = [_make_case(raw, index, path) for index, raw in enumerate(raws) if is_in_subset(raw, index, path)]
    logger.info("%s: %d of %d cases have two hops with the first one edited", path, len(selected), len(raws))
    if len(raws) == _FULL_SIZE and len(selected) != SUBSET_SIZE:
        logger.warning("%s: expected the %d cases of the subset, found %d", path, SUBSET_SIZE, len(selected))
    return selected


def is_in_subset(raw: Any, index: int, path: str | Path) -> bool:
    """``is_two_hop_first_edited`` for a case of a file.

    Raises:
        DataError: the case lacks what the filter reads (with the file, its index and its id).
    """
    try:
        return is_two_hop_first_edited(raw)
    except (KeyError, IndexError, TypeError) as error:
        message = "the subset needs orig.new_triples, orig.edit_triples and requested_rewrite"
        raise DataError(f"{name_case(raw, index)}: {message} ({error!r})", path) from error


def is_two_hop_first_edited(raw: Mapping[str, Any]) -> bool:
    """Whether a raw case has two hops after the edit and exactly one edit, on the first of them.

    Raises:
        KeyError: the case does not record its chain.
    """
    chain, edited = raw["orig"]["new_triples"], raw["orig"]["edit_triples"]
    return len(chain) == 2 and len(raw["requested_rewrite"]) == 1 and bool(edited[0] == chain[0])


def read_json_list(path: Path) -> list[Any]:
    """The JSON list of a file.

    Raises:
        DataError: it cannot be read, or holds no such list (with the line of broken JSON).
    """
    try:
        raws = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}; give an MQuAKE file (one JSON list)", path) from error
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 text ({error.reason} at byte {error.start})", path) from error
    except json.JSONDecodeError as error:
        raise DataError(f"broken JSON: {error.msg} (column {error.colno})", path, error.lineno) from error
    if not isinstance(raws, list):
        raise DataError(f"expected one JSON list of cases, got {type(raws).__name__}", path)
    return raws


def name_case(raw: Any, index: int) -> str:
    """How errors speak of a case."""
    case_id = raw.get("case_id") if isinstance(raw, dict) else None
    return f"case {index}" if case_id is None else f"case {index} (case_id {case_id})"


def _make_case(raw: Any, index: int, path: str | Path) -> Case:
    with case_errors_named(raw, index, path):
        edits = tuple(_make_edit(rewrite) for rewrite in raw["requested_rewrite"])
        if not edits:
            raise DataError("'requested_rewrite' is empty")
        answers = collect_answers(raw["new_answer"], raw.get("new_answer_alias") or [])
        question = Question(raw["questions"][0], answers, raw.get("cloze_question"))
        case = Case(f"mquake-{raw['case_id']}", edits, question, _take_last_hop(raw), tags=_make_tags(raw, len(edits)))
        return replace(case, known=_take_known(raw), probes=_make_probes(raw, answers))


@contextmanager
def case_errors_named(raw: Any, index: int, path: str | Path) -> Iterator[None]:
    """Inside, any fault of a raw case is reported with the file, its index and its id.

    Raises:
        DataError: the case is not what it should be.
    """
    try:
        yield
    except KeyError as error:
        raise DataError(f"{name_case(raw, index)}: missing key {error}", path) from error
    except (DataError, RequestError) as error:
        raise DataError(f"{name_case(raw, index)}: {error}", path) from error
    except (AttributeError, IndexError, TypeError) as error:
        raise DataError(f"{name_case(raw, index)}: not in the MQuAKE format ({error})", path) from error


def _take_last_hop(raw: Mapping[str, Any]) -> Question | None:
    """The last hop as a question of its own, where the case records it and no edit is about it."""
    chain, hops = raw.get("orig", {}), raw.get("new_single_hops")
    if not hops or not chain.get("new_triples") or chain["new_triples"][-1] in chain["edit_triples"]:
        return None
    return Question(hops[-1]["question"], collect_answers(hops[-1]["answer"], hops[-1].get("answer_alias") or []))


def _make_probes(raw: Mapping[str, Any], answers: tuple[str, ...]) -> tuple[Probe, ...]:
    """The question in its other wordings, and each edited fact as a question, where the file has them."""
    again = [Probe(PARAPHRASE, Question(text, answers)) for text in raw["questions"][1:]]
    facts = [(r["question"], target_of(r)) for r in raw["requested_rewrite"] if r.get("question")]
    return (*again, *(Probe(FACT, Question(text, (target,))) for text, target in facts))


def _take_known(raw: Mapping[str, Any]) -> Question | None:
    """What the only edit replaces, as a question, where the case records it."""
    first = raw["requested_rewrite"][0]
    if len(raw["requested_rewrite"]) != 1 or not first.get("question") or not isinstance(first.get("target_true"), Mapping):
        return None
    return Question(first["question"], (str(first["target_true"]["str"]),))


def _make_edit(rewrite: Mapping[str, Any]) -> EditRequest:
    """An edit from its prompt with one place for the subject."""
    prompt, subject = rewrite["prompt"], str(rewrite["subject"]).strip()
    if prompt.count("{}") != 1:
        raise DataError(f"an edit's prompt must hold exactly one {{}} for the subject, got {prompt!r}")
    # Not str.format: other braces in a prompt are plain text.
    text = prompt.replace("{}", subject).strip()
    target = target_of(rewrite)
    # CaKE's re-wordings and learning prompts, where the file has them; a learning prompt's answer ends with a full stop.
    rephrased = _read_items(rewrite, "rephrase_prompt")
    learning = [(question, f"{answer}.") for question, answer in _read_items(rewrite, "learning_prompt")]
    rephrasings = tuple(question for question, answer in rephrased if answer.strip() == target.strip())
    return EditRequest(text, target, subject, (*rephrased, *learning), rephrasings)


def target_of(rewrite: Mapping[str, Any]) -> str:
    """An edit's new object; MQuAKE-Remastered's copy on the hub is flat."""
    return str(rewrite["target_new_str"] if "target_new_str" in rewrite else rewrite["target_new"]["str"])


def _read_items(rewrite: Mapping[str, Any], name: str) -> list[tuple[str, str]]:
    """CaKE's (question, answer) items; an empty half would fail or teach nothing hours later, so it is refused here."""
    items = [(item["question"], item["answer"]) for item in rewrite.get(name) or []]
    for question, answer in items:
        if not isinstance(question, str) or not question.strip() or answer is None or not str(answer).strip():
            raise DataError(
                f"every item of {name!r} needs a non-empty question and answer, got {question!r} and {answer!r} "
                f"(edit of {rewrite['subject']!r}); fill them in or remove the item"
            )
    return [(question, str(answer)) for question, answer in items]


def collect_answers(answer: Any, aliases: list[Any]) -> tuple[str, ...]:
    """The answer and its aliases as strings, each once; a blank alias would match any text."""
    texts = [str(answer), *(str(alias) for alias in aliases)]
    return tuple(dict.fromkeys(text for text in texts if text.strip()))


def _make_tags(raw: Mapping[str, Any], num_edits: int) -> dict[str, str]:
    """What results are broken down by."""
    tags = {"edits": str(num_edits)}
    chain = raw.get("orig", {}).get("new_triples")
    if chain:
        tags["hops"] = str(len(chain))
        tags["relation"] = str(chain[-1][1])
        tags["chain"] = " ".join(str(triple[1]) for triple in chain)
        tags["last hop"] = "edited" if chain[-1] in raw["orig"].get("edit_triples", ()) else "not edited"
    return tags
