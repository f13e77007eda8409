"""The single-hop facts that the questions of CRE and MQuAKE files rest on, without any fact that is edited."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from propmeta_edit.data.cre import WRONG_PARAPHRASE, is_unanswered
from propmeta_edit.data.fields import ALIASES, ANSWER, ANSWER_OR_NONE, ANYTHING, BLANK, TEXT, list_of, object_of
from propmeta_edit.data.mquake import CHAIN, HOP, REWRITE, collect_answers, target_of
from propmeta_edit.data.reading import read_records
from propmeta_edit.errors import DataError
from propmeta_edit.records import Question

# Its authors pasted this relation's paraphrases from the religion relation: they ask for something else than their answers say.
NO_ANSWER = "with NaN for an answer"
EDITED, MULTI_HOP, OTHER_ANSWER = "edited", "asked as multi-hop questions", "with another answer already"

_CRE_QUESTION = object_of(
    {"question_template": TEXT, "unalias_question": TEXT, "answer": ANSWER_OR_NONE},
    optional={"alias_question": TEXT, "alias_question_paraphrase": BLANK, "unalias_question_paraphrase": TEXT},
)
_CRE = object_of({"questions": list_of(_CRE_QUESTION, least=0)})
_HOPS = list_of(HOP, least=0)
_MQUAKE = object_of(
    {
        "requested_rewrite": list_of(REWRITE),
        "questions": list_of(TEXT),
        "answer": ANSWER,
        "single_hops": _HOPS,
        "new_single_hops": _HOPS,
    },
    optional={"answer_alias": ALIASES, "answer_extended": ALIASES, "orig": CHAIN, "case_id": ANYTHING},
)


@dataclass(frozen=True)
class SingleHops:
    """What one file says of single hops.

    Args:
        path: the file.
        true: one-hop questions with their answers (the one to teach first, then its aliases), as they are before any edit; in file
            order, repetitions included.
        later: those that only chains after an edit need, the edited ones among them.
        edited: (question, new answer) of every edit, as ``key_of`` writes them: never to be taught.
        multi_hop: questions of several hops, as ``key_of`` writes them: never to be taught either.
        old_multi_hop: the first multi-hop question of each case with the answers it had before the edit (MQuAKE alone).
        skipped: how many questions were left out while reading, by reason.
    """

    path: Path
    true: Sequence[Question]
    later: Sequence[Question] = ()
    edited: frozenset[tuple[str, str]] = frozenset()
    multi_hop: frozenset[str] = frozenset()
    old_multi_hop: Sequence[Question] = ()
    skipped: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Facts:
    """What is taught, each question once.

    Args:
        questions: all of them, those of the first file first.
        by_file: for each file those that its questions rest on, with its own aliases; a question of several files is in each.
        left_out: for each file how many different questions are not taught, by reason.
    """

    questions: list[Question]
    by_file: list[list[Question]]
    left_out: list[dict[str, int]]


def key_of(text: str) -> str:
    """A text without what does not tell questions or answers apart: case, and how much space there is."""
    return " ".join(text.split()).casefold()


def choose_facts(files: Sequence[SingleHops]) -> Facts:
    """The facts to teach: what is true before the edits goes first, then what chains need after them.

    No (question, new answer) of any file's edits is among them, no multi-hop question, and no question with two answers: the first
    one found stays.
    """
    edited = frozenset[tuple[str, str]]().union(*(file.edited for file in files))
    multi_hop = frozenset[str]().union(*(file.multi_hop for file in files))
    chosen: dict[str, Question] = {}
    own: list[dict[str, Question]] = [{} for _ in files]
    left_out: list[dict[tuple[str, str], str]] = [{} for _ in files]
    for kind in ("true", "later"):
        for number, file in enumerate(files):
            for question in getattr(file, kind):
                key, answer = key_of(question.text), key_of(question.answers[0])
                reason = _reason_against(key, answer, edited, multi_hop, chosen)
                if reason:
                    left_out[number][key, answer] = reason
                    continue
                chosen.setdefault(key, question)
                own[number].setdefault(key, question)
    counts = [dict(Counter(reasons.values()) + Counter(file.skipped)) for reasons, file in zip(left_out, files, strict=True)]
    return Facts(list(chosen.values()), [list(questions.values()) for questions in own], counts)


def _reason_against(
    key: str, answer: str, edited: frozenset[tuple[str, str]], multi_hop: frozenset[str], chosen: Mapping[str, Question]
) -> str | None:
    """Why a question may not be taught with this answer; None if it may."""
    if (key, answer) in edited:
        return EDITED
    if key in multi_hop:
        return MULTI_HOP
    if key in chosen and key_of(chosen[key].answers[0]) != answer:
        return OTHER_ANSWER
    return None


def read_cre_single_hops(path: str | Path) -> SingleHops:
    """The one-hop question of every question of a CRE file, in both its wordings.

    The paraphrase of the ethnic group relation is left out, and so are questions whose answer is NaN: they have none. Files without
    ``facts`` serve as well.

    Raises:
        DataError: the file cannot be read, or a record is broken; it names the path, its place and the field.
    """
    true: list[Question] = []
    multi_hop: set[str] = set()
    skipped: Counter[str] = Counter()
    for record in read_records(path, _CRE):
        for question in record.value["questions"]:
            found = _read_cre_question(question)
            asked = (question.get(name) for name in ("alias_question", "alias_question_paraphrase"))
            multi_hop |= {key_of(text) for text in asked if text is not None}
            true += found
            skipped[NO_ANSWER] += not found
    return SingleHops(Path(path), true, multi_hop=frozenset(multi_hop), skipped=skipped)


def _read_cre_question(question: Mapping[str, Any]) -> list[Question]:
    """The one-hop wordings of a question of a record; none where it has no answer."""
    again = question.get("unalias_question_paraphrase")
    is_same = again is not None and WRONG_PARAPHRASE not in question["question_template"].casefold()
    texts = [question["unalias_question"], *([again] if is_same else [])]
    return [] if is_unanswered(question) else [Question(text, (str(question["answer"]),)) for text in texts]


def read_mquake_single_hops(path: str | Path) -> SingleHops:
    """The single hops of every case of a file of the MQuAKE family, before and after its edits, and what its edits are.

    Raises:
        DataError: the file cannot be read, or a case is broken or does not tell which of its hops are edited; it names the path,
            the case's place and its id.
    """
    true: list[Question] = []
    later: list[Question] = []
    edited: set[tuple[str, str]] = set()
    multi_hop: set[str] = set()
    old: list[Question] = []
    skipped: Counter[str] = Counter()
    for record in read_records(path, _MQUAKE):
        raw = record.value
        with record.named():
            before, after = (_read_hops(raw[name], skipped) for name in ("single_hops", "new_single_hops"))
            true += before
            later += after
            edited |= _read_edited(raw)
            multi_hop |= {key_of(text) for text in raw["questions"]}
            answers = collect_answers(raw["answer"], [*(raw.get("answer_alias") or ()), *(raw.get("answer_extended") or ())])
            old.append(Question(raw["questions"][0], answers))
    return SingleHops(Path(path), true, later, frozenset(edited), frozenset(multi_hop), old, skipped)


def _read_hops(hops: Iterable[Mapping[str, Any]], skipped: Counter[str]) -> list[Question]:
    """Hops as questions, those whose answer is NaN counted instead."""
    found = []
    for hop in hops:
        if is_unanswered(hop):
            skipped[NO_ANSWER] += 1
        else:
            found.append(Question(hop["question"], collect_answers(hop["answer"], hop.get("answer_alias"))))
    return found


def _read_edited(raw: Mapping[str, Any]) -> set[tuple[str, str]]:
    """(question, new answer) of each edit of a case, by its own question and by its place in the chain after the edits.

    Raises:
        DataError: an edit has no question, and the case does not record its chain.
    """
    rewrites, hops, chain = raw["requested_rewrite"], raw["new_single_hops"], raw.get("orig") or {}
    has_chain = chain.get("edit_triples") is not None and len(chain.get("new_triples") or ()) == len(hops)
    if not has_chain and not all(rewrite.get("question") for rewrite in rewrites):
        raise DataError(
            "it does not tell which of its hops are edited, and those must not be taught: every edit needs a 'question', or the "
            "case 'orig' with 'edit_triples' and a triple of 'new_triples' for each of its 'new_single_hops'"
        )
    edited = {(rewrite["question"], target_of(rewrite)) for rewrite in rewrites if rewrite.get("question")}
    if has_chain:
        triples = zip(chain["new_triples"], hops, strict=True)
        edited |= {(hop["question"], str(hop["answer"])) for triple, hop in triples if triple in chain["edit_triples"]}
    return {(key_of(question), key_of(answer)) for question, answer in edited}
