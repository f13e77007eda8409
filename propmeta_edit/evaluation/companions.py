"""Cases made from other cases of their data set: what an edit must leave alone, and the control that writes something wrong."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from propmeta_edit.evaluation.scoring import contains_answer, contains_answer_at_word_boundary, normalise
from propmeta_edit.records import ELSEWHERE, OTHER, REAL, TOGETHER, Case, EditRequest, Probe, Question

COMMONEST, SEEN = "commonest answer", ("answer seen", "entity seen", "relation seen")  # tags
NUM_OTHERS, NUM_REAL = 4, 2  # questions about other subjects a case


def with_neighbours(cases: Sequence[Case]) -> list[Case]:
    """Each case with ``neighbour``, and ``other_fact`` where it has none of its own, from the next case of the list that suits.

    The neighbour is that case's question (same relation if there is one, else same entity type, else any) about its own subject;
    the other fact is its second hop. Neither shares the subject or the object of the edit. Where no case suits, both stay as they
    are.
    """
    result = []
    for index, case in enumerate(cases):
        others = [*cases[index + 1 :], *cases[:index]]
        alike = (other for key in ("relation", "entity_type") for other in others if _share(case, other, key))
        # Lazily: the first that suits comes early, and a data set can hold thousands of cases.
        chosen = next((other for other in itertools.chain(alike, others) if _is_unrelated(case, other)), None)
        if chosen is not None:
            case = replace(case, neighbour=chosen.question, other_fact=case.other_fact or chosen.second_hop)
        result.append(case)
    return result


def with_probes(cases: Sequence[Case], seed: int) -> list[Case]:
    """Each case of one edit with probes besides its own: of other subjects, drawn by ``seed``, whose cases ask in the same way.

    Up to ``NUM_OTHERS`` cases of the same relations whose answers, subject and object differ give their questions (``other``), the
    first of them its fact's prompt (``elsewhere``). Up to ``NUM_REAL`` questions about real subjects (``real``) are what other
    cases' edits replaced, or else their second hops. Cases of several edits keep what they have.
    """
    alike: dict[str, list[Case]] = {}
    for case in cases:
        alike.setdefault(_kind_of(case), []).append(case)
    return [
        case if len(case.edits) != 1 else replace(case, probes=(*case.probes, *_draw_probes(case, alike[_kind_of(case)], seed)))
        for case in cases
    ]


def _kind_of(case: Case) -> str:
    """The relations that its question follows."""
    return case.tags.get("chain", case.tags.get("relation", ""))


def _draw_probes(case: Case, alike: Sequence[Case], seed: int) -> list[Probe]:
    order = random.Random(f"{seed}:{case.case_id}").sample(alike, len(alike))
    others = (other for other in order if _is_another(case, other))
    chosen = list(itertools.islice(others, NUM_OTHERS))
    probes = [Probe(OTHER, other.question, case.question.answers) for other in chosen]
    probes += [
        Probe(ELSEWHERE, Question(other.edits[0].prompt, (other.edits[0].target_new,)), (case.edits[0].target_new,))
        for other in chosen[:1]
    ]
    real = {q.text: Probe(REAL, q) for other in order if (q := other.known or other.second_hop) and _is_real(case, other, q)}
    return [*probes, *list(real.values())[:NUM_REAL]]


def _is_another(case: Case, other: Case) -> bool:
    """Whether another case of one edit has another subject and object, and no answer within one of the case's, nor around it."""
    pairs = ((case, other), (other, case))
    is_alike = any(contains_answer_at_word_boundary(a, two.question.answers) for one, two in pairs for a in one.question.answers)
    return len(other.edits) == 1 and _is_unrelated(case, other) and not is_alike


def _is_real(case: Case, other: Case, question: Question) -> bool:
    """Whether a question about a real subject has nothing to do with the edit."""
    [edit] = case.edits
    names = [edit.target_new, *([edit.subject] if edit.subject else [])]
    is_own = any(contains_answer(question.text, (name,)) for name in names)
    return other is not case and not is_own and not any(contains_answer(a, case.question.answers) for a in question.answers)


def with_groups(cases: Sequence[Case], k: int, seed: int, number: int) -> list[Case]:
    """Groups of k facts of one kind as cases of k edits, up to ``number`` of them, drawn by ``seed``; each fact in one group.

    The facts have the same words but for subject and object, and the same question but for the subject; subjects, objects and
    answers differ. Each question is a ``together`` probe; the first one is the case's own.
    """
    kinds: dict[tuple[str, str], list[Case]] = {}
    for case in random.Random(seed).sample(list(cases), len(cases)):
        if len(case.edits) == 1 and case.edits[0].subject:
            edit = case.edits[0]
            kinds.setdefault((_kind_of(case), edit.prompt.replace(str(edit.subject), "{}")), []).append(case)
    groups: list[list[Case]] = []
    for left in kinds.values():
        while len(group := _take_group(left, k)) == k:
            groups.append(group)
            left[:] = [case for case in left if case not in group]
    chosen = random.Random(seed).sample(groups, len(groups))[:number]
    return [_as_one(group, n) for n, group in enumerate(chosen)]


def _take_group(cases: Sequence[Case], k: int) -> list[Case]:
    group: list[Case] = []
    for case in cases:
        if len(group) < k and all(_is_another(case, other) and case.edits[0].subject != other.edits[0].subject for other in group):
            group.append(case)
    return group


def _as_one(group: Sequence[Case], number: int) -> Case:
    probes = []
    for case in group:
        against = tuple(answer for other in group if other is not case for answer in other.question.answers)
        probes.append(Probe(TOGETHER, case.question, against))
    edits = tuple(case.edits[0] for case in group)
    first = replace(group[0].question, cloze=None)
    return Case(f"{len(group)}-{number}", edits, first, probes=tuple(probes), tags=group[0].tags)


def with_wrong_facts(cases: Sequence[Case]) -> list[Case]:
    """Each case with the objects of another case's edits, while the question and its right answers stay.

    The object comes from the next case of the list whose edits are as many, whose entity type is the same and whose answers
    differ; a case without such another one is left out.
    """
    result = []
    for index, case in enumerate(cases):
        for other in [*cases[index + 1 :], *cases[:index]]:
            if (
                len(other.edits) == len(case.edits)
                and _share(case, other, "entity_type")
                and not _answers_overlap(case, other)
                and all(a.target_new != b.target_new for a, b in zip(case.edits, other.edits, strict=True))
            ):
                edits = [replace(a, target_new=b.target_new) for a, b in zip(case.edits, other.edits, strict=True)]
                result.append(replace(case, edits=tuple(edits)))
                break
    return result


def with_commonest_answer(cases: Sequence[Case]) -> list[Case]:
    """Each case with the tag ``COMMONEST``: the first answer that most cases of its relations have, the first of several."""
    answers: dict[str, Counter[str]] = {}
    for case in cases:
        answers.setdefault(_kind_of(case), Counter())[case.question.answers[0]] += 1
    return [replace(case, tags={**case.tags, COMMONEST: answers[_kind_of(case)].most_common(1)[0][0]}) for case in cases]


def with_seen(cases: Sequence[Case], training: Sequence[Case]) -> list[Case]:
    """Each case that names its entity with the tags ``SEEN``: whether its answer, entity and relation occur in a training file.

    MQuAKE's cases name none: their relations have other names than CRE's, of which training files are.
    """
    of: dict[str, Callable[[Case], str | None]] = {
        "answer seen": lambda case: normalise(case.question.answers[0]),
        "entity seen": lambda case: case.tags.get("entity_name"),
        "relation seen": lambda case: case.tags.get("relation"),
    }
    known = {tag: {take(case) for case in training} for tag, take in of.items()}
    return [
        replace(case, tags={**case.tags, **{tag: "yes" if take(case) in known[tag] else "no" for tag, take in of.items()}})
        if "entity_name" in case.tags
        else case
        for case in cases
    ]


def choose_stratified(cases: Sequence[Case], number: int, seed: int, tags: Sequence[str]) -> list[Case]:
    """About ``number`` cases drawn by ``seed``, in file order: every combination of ``tags`` has the share it has among all.

    Each combination gives at least one.
    """
    strata: dict[tuple[str, ...], list[Case]] = {}
    for case in cases:
        strata.setdefault(tuple(case.tags.get(tag, "") for tag in tags), []).append(case)
    order, chosen = random.Random(seed), set[str]()
    for _, some in sorted(strata.items()):
        share = min(len(some), max(1, round(number * len(some) / len(cases))))
        chosen |= {case.case_id for case in order.sample(some, share)}
    return [case for case in cases if case.case_id in chosen]


def with_text_origins(cases: Sequence[Case], origin_of: Callable[[EditRequest], frozenset[str]]) -> list[Case]:
    """Each case with the tag ``augmentation``: where the texts trained on besides its facts are from.

    Args:
        origin_of: of one fact's texts: ``data``, ``templates``, or both; a case of several facts gets the union.
    """
    origins = [frozenset[str]().union(*(origin_of(edit) for edit in case.edits)) for case in cases]
    return [
        replace(case, tags={**case.tags, "augmentation": " and ".join(sorted(origin))})
        for case, origin in zip(cases, origins, strict=True)
    ]


def _is_unrelated(case: Case, other: Case) -> bool:
    objects = {edit.target_new for edit in case.edits}
    subjects = {edit.subject for edit in case.edits if edit.subject}
    named = " ".join([other.question.text, *(edit.prompt for edit in other.edits)])
    return not objects & {edit.target_new for edit in other.edits} and not any(subject in named for subject in subjects)


def _share(case: Case, other: Case, key: str) -> bool:
    return case.tags.get(key) == other.tags.get(key)


def _answers_overlap(case: Case, other: Case) -> bool:
    return any(contains_answer(a, other.question.answers) for a in case.question.answers) or any(
        contains_answer(b, case.question.answers) for b in other.question.answers
    )
