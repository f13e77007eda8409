"""MQuAKE files: edits, the first multi-hop question, and the 213-case subset."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from propmeta_edit.data.cre import is_unanswered
from propmeta_edit.data.fields import (
    ALIASES,
    ANSWER,
    ANSWER_OR_NONE,
    ANYTHING,
    BLANK,
    ID,
    TEXT,
    WHOLE,
    check,
    list_of,
    object_of,
    one_of,
    show_keys,
)
from propmeta_edit.data.reading import Record, read_records
from propmeta_edit.errors import DataError
from propmeta_edit.records import FACT, PARAPHRASE, Case, EditRequest, Probe, Question

SUBSET_SIZE = 213
_FULL_SIZE = 3000
_TARGET = object_of({"str": TEXT}, optional={"id": ANYTHING})
_ITEMS = list_of(object_of({"question": TEXT, "answer": TEXT}), least=0)
REWRITE = object_of(
    {"prompt": TEXT, "subject": TEXT},
    optional={
        "target_new": _TARGET,
        "target_new_str": TEXT,  # MQuAKE-Remastered's copy on the hub is flat
        "target_true": one_of(_TARGET, BLANK),
        "question": BLANK,
        "rephrase_prompt": _ITEMS,
        "learning_prompt": _ITEMS,
    },
)
HOP = object_of(
    {"question": TEXT, "answer": ANSWER_OR_NONE},
    optional={"answer_alias": ALIASES, "cloze": ANYTHING},
)
_TRIPLES = list_of(list_of(one_of(TEXT, WHOLE), least=3), least=0)
CHAIN = object_of(optional={"new_triples": _TRIPLES, "edit_triples": _TRIPLES})
_USED = {  # by any reader of these files, where they have it
    "cloze_question": TEXT,
    "new_answer_alias": ALIASES,
    "answer": ANYTHING,
    "answer_alias": ANYTHING,
    "answer_extended": ANYTHING,
    "single_hops": ANYTHING,
    "new_single_hops": list_of(HOP, least=0),
    "orig": CHAIN,
}
_REQUIRED = {
    "case_id": ID,
    "requested_rewrite": list_of(REWRITE),
    "questions": list_of(TEXT),
    "new_answer": ANSWER,
}
SHAPE = object_of(_REQUIRED, optional=_USED)
SUBSET_SHAPE = object_of({**_REQUIRED, "orig": object_of({"new_triples": _TRIPLES, "edit_triples": _TRIPLES})}, optional=_USED)

logger = logging.getLogger(__name__)


def load_mquake(path: str | Path) -> list[Case]:
    """Read a file of the MQuAKE family, CaKE's augmented copies and both shapes of MQuAKE-Remastered included.

    Args:
        path: a JSON list of cases, or JSON Lines.

    Returns:
        The cases in file order: all edits of the case, its first question with the new answer and that answer's aliases,
        ``cloze_question`` as the cloze where the file has one, and the tags ``hops``, ``edits`` and ``relation`` (the
        relation id of the last hop); ``hops`` and ``relation`` only where the case records its chain.

    Raises:
        DataError: the file cannot be read (with the line of broken JSON), or a case is broken (with its place, id and field).
    """
    return [_make_case(record) for record in read_records(path, SHAPE)]


def load_mquake_subset(path: str | Path) -> list[Case]:
    """Read the cases with two hops of which only the first is edited (213 in the source paper). Logs their number.

    Args:
        path: cases with their chains (``orig.new_triples`` and ``orig.edit_triples``).

    Returns:
        The selected cases in file order; a warning is logged if a 3,000-case file does not give 213.

    Raises:
        DataError: as ``load_mquake``, and if a case lacks the chains that the filter reads.
    """
    records = read_records(path, SUBSET_SHAPE)
    selected = [_make_case(record) for record in records if is_two_hop_first_edited(record.value)]
    logger.info("%s: %d of %d cases have two hops with the first one edited", path, len(selected), len(records))
    if len(records) == _FULL_SIZE and len(selected) != SUBSET_SIZE:
        logger.warning("%s: expected the %d cases of the subset, found %d", path, SUBSET_SIZE, len(selected))
    return selected


def count_subset(path: str | Path) -> int:
    """How many cases are in the subset; those that do not record their chain at all are not.

    Raises:
        DataError: as ``load_mquake``, and if a case records its chain, and not which of it is edited.
    """
    chained = [record for record in read_records(path, SHAPE) if _chain_of(record.value)[0]]
    for record in chained:
        with record.named():
            check(SUBSET_SHAPE, record.value)
    return sum(is_two_hop_first_edited(record.value) for record in chained)


def is_two_hop_first_edited(raw: Mapping[str, Any]) -> bool:
    """Whether a raw case has two hops after the edit and exactly one edit, on the first of them."""
    chain, edited = _chain_of(raw)
    return len(chain) == 2 and len(raw["requested_rewrite"]) == 1 and bool(edited) and bool(edited[0] == chain[0])


def _chain_of(raw: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """The triples of the chain after the edits, and the edited ones; empty where the case does not record them."""
    orig = raw.get("orig") or {}
    return orig.get("new_triples") or [], orig.get("edit_triples") or []


def _make_case(record: Record) -> Case:
    raw = record.value
    with record.named():
        edits = tuple(_make_edit(rewrite) for rewrite in raw["requested_rewrite"])
        answers = collect_answers(raw["new_answer"], raw.get("new_answer_alias"))
        question = Question(raw["questions"][0], answers, raw.get("cloze_question"))
        case = Case(f"mquake-{raw['case_id']}", edits, question, _take_last_hop(raw), tags=_make_tags(raw, len(edits)))
        return replace(case, known=_take_known(raw), probes=_make_probes(raw, answers))


def _take_last_hop(raw: Mapping[str, Any]) -> Question | None:
    """The last hop as a question of its own, where the case records it and no edit is about it."""
    (chain, edited), hops = _chain_of(raw), raw.get("new_single_hops")
    if not hops or not chain or not edited or chain[-1] in edited or is_unanswered(hops[-1]):
        return None
    return Question(hops[-1]["question"], collect_answers(hops[-1]["answer"], hops[-1].get("answer_alias")))


def _make_probes(raw: Mapping[str, Any], answers: tuple[str, ...]) -> tuple[Probe, ...]:
    """The question in its other wordings, and each edited fact as a question, where the file has them."""
    again = [Probe(PARAPHRASE, Question(text, answers)) for text in raw["questions"][1:]]
    facts = [(r["question"], target_of(r)) for r in raw["requested_rewrite"] if (r.get("question") or "").strip()]
    return (*again, *(Probe(FACT, Question(text, (target,))) for text, target in facts))


def _take_known(raw: Mapping[str, Any]) -> Question | None:
    """What the only edit replaces, as a question, where the case records it."""
    first = raw["requested_rewrite"][0]
    before = first.get("target_true")
    if len(raw["requested_rewrite"]) != 1 or not (first.get("question") or "").strip() or not isinstance(before, Mapping):
        return None
    return Question(first["question"], (before["str"],))


def _make_edit(rewrite: Mapping[str, Any]) -> EditRequest:
    """An edit from its prompt with one place for the subject."""
    prompt, subject = rewrite["prompt"], rewrite["subject"].strip()
    if prompt.count("{}") != 1:
        raise DataError(f"the 'prompt' of an edit must hold exactly one {{}} for the subject, got {prompt!r}")
    # Not str.format: other braces in a prompt are plain text.
    text = prompt.replace("{}", subject).strip()
    target = target_of(rewrite)
    # CaKE's re-wordings and learning prompts, where the file has them; a learning prompt's answer ends with a full stop.
    rephrased = _read_items(rewrite, "rephrase_prompt")
    learning = [(question, f"{answer}.") for question, answer in _read_items(rewrite, "learning_prompt")]
    rephrasings = tuple(question for question, answer in rephrased if answer.strip() == target.strip())
    return EditRequest(text, target, subject, (*rephrased, *learning), rephrasings)


def target_of(rewrite: Mapping[str, Any]) -> str:
    """An edit's new object, wherever it stands.

    Raises:
        DataError: nowhere.
    """
    if rewrite.get("target_new_str") is None and rewrite.get("target_new") is None:
        raise DataError(f"an edit needs 'target_new' with 'str', or 'target_new_str'; found {show_keys(rewrite)}")
    return str(rewrite.get("target_new_str") or rewrite["target_new"]["str"])


def _read_items(rewrite: Mapping[str, Any], name: str) -> list[tuple[str, str]]:
    """CaKE's (question, answer) items."""
    return [(item["question"], item["answer"]) for item in rewrite.get(name) or ()]


def collect_answers(answer: str | float, aliases: Sequence[str | float] | None) -> tuple[str, ...]:
    """The answer and its aliases as strings, each once; a blank alias would match any text."""
    return tuple(dict.fromkeys(text for text in map(str, (answer, *(aliases or ()))) if text.strip()))


def _make_tags(raw: Mapping[str, Any], num_edits: int) -> dict[str, str]:
    """What results are broken down by."""
    tags = {"edits": str(num_edits)}
    chain, edited = _chain_of(raw)
    if chain:
        tags["hops"] = str(len(chain))
        tags["relation"] = str(chain[-1][1])
        tags["chain"] = " ".join(str(triple[1]) for triple in chain)
        tags["last hop"] = "edited" if chain[-1] in edited else "not edited"
    return tags
