"""Cases made from other cases of their data set: what an edit must leave alone, and the control that writes something wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

from propmeta_edit.evaluation.scoring import contains_answer
from propmeta_edit.records import Case, EditRequest


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
