"""Validation held out of training cases: nothing of valid-ood is in training."""

from __future__ import annotations

import pytest
import tiny

from propmeta_edit.data.cre import load_cre
from propmeta_edit.data.holdout import hold_out_validation
from propmeta_edit.errors import DataError


def write_training_file(folder):
    return tiny.write_records(folder / "train.jsonl", tiny.world_records("train_data_id", 400))


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return load_cre(write_training_file(tmp_path_factory.mktemp("world")))


def test_entities_and_relations_of_valid_ood_are_unseen_in_training(cases):
    train, validation = hold_out_validation(cases, 30, seed=1)
    assert len(validation["valid-id"]) == 30 and len(validation["valid-ood"]) >= 5 and len(train) > 150
    parts = [train, *validation.values()]
    assert len({case.case_id for part in parts for case in part}) == sum(map(len, parts))
    for tag in ("entity_name", "relation"):
        seen = {case.tags[tag] for case in [*train, *validation["valid-id"]]}
        assert not seen & {case.tags[tag] for case in validation["valid-ood"]}
    assert hold_out_validation(cases, 30, seed=1) == (train, validation) != hold_out_validation(cases, 30, seed=2)
    assert len(hold_out_validation(cases, None, seed=1)[1]["valid-id"]) == (len(train) + 30) // 10


def test_a_record_with_several_questions_is_on_one_side(tmp_path):
    cases = load_cre(write_training_file(tmp_path), question_choice="all")
    train, validation = hold_out_validation(cases, 48, seed=0)
    asked = {case.edits[0].subject for split in validation.values() for case in split}
    assert len(cases) > 600 and len(train) > 200 and not asked & {case.edits[0].subject for case in train}


def test_too_little_data_is_refused(cases):
    with pytest.raises(DataError, match="use fewer validation_cases, more data, or validate_every: null"):
        hold_out_validation(cases[:12], 100, seed=0)
