"""Validation splits held out of a training file, so that no choice has to be made on a test split."""

from __future__ import annotations

import random
from collections.abc import Sequence

from propmeta_edit.errors import DataError
from propmeta_edit.records import Case

_SHARE = 0.2  # of the entities, and of the relations, that validation alone sees


def hold_out_validation(cases: Sequence[Case], size: int | None, seed: int) -> tuple[list[Case], dict[str, list[Case]]]:
    """Split CRE training cases as the test splits are: in distribution, and with entities and relations unseen in training.

    A fifth of the entities and of the relations (by the tags ``entity_name`` and ``relation``) is held out. ``valid-ood`` has the
    cases in which both are held out; cases with only one of them are dropped; of the rest, ``size`` become ``valid-id`` (a tenth
    if None) and the others stay for training, save those about a subject of either split: a record with several questions, or a
    subject with several records, must not be edited in training and asked about in validation.

    Raises:
        DataError: too few entities or relations to leave anything in one of the three parts.
    """
    entities, relations = (_draw_held(cases, tag, seed) for tag in ("entity_name", "relation"))
    ood = [case for case in cases if case.tags["entity_name"] in entities and case.tags["relation"] in relations]
    rest = [case for case in cases if case.tags["entity_name"] not in entities and case.tags["relation"] not in relations]
    random.Random(f"{seed}:cases").shuffle(rest)
    size = len(rest) // 10 if size is None else size
    valid = rest[:size]
    subjects = {_subject_of(case) for case in [*valid, *ood]}
    train = [case for case in rest[size:] if _subject_of(case) not in subjects]
    if not (ood and train and valid):
        raise DataError(
            f"cannot hold validation out of {len(cases)} cases: {len(train)} would stay for training, {len(valid)} in and "
            f"{len(ood)} out of distribution; use fewer validation_cases, more data, or validate_every: null"
        )
    return train, {"valid-id": valid, "valid-ood": ood}


def _draw_held(cases: Sequence[Case], tag: str, seed: int) -> set[str]:
    """The values of a tag that are held out."""
    values = sorted({case.tags[tag] for case in cases})
    return set(random.Random(f"{seed}:{tag}").sample(values, round(_SHARE * len(values))))


def _subject_of(case: Case) -> str:
    fact = case.edits[0]
    return fact.subject or fact.prompt
