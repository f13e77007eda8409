"""Neighbours, other facts and wrong facts: taken from cases that have nothing to do with the edit."""

from __future__ import annotations

import pytest
import tiny

from propmeta_edit.data.cre import load_cre
from propmeta_edit.evaluation.companions import with_neighbours, with_text_origins, with_wrong_facts
from propmeta_edit.evaluation.scoring import contains_answer
from propmeta_edit.records import Case, EditRequest, Question


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return load_cre(tiny.write_records(tmp_path_factory.mktemp("world") / "test.jsonl", tiny.world_records("test_data_id", 120)))


def test_neighbours_are_about_other_subjects_and_objects(cases):
    same_relation = 0
    by_question = {case.question: case for case in cases}
    for case, original in zip(with_neighbours(cases), cases, strict=True):
        other = by_question[case.neighbour]
        assert case.edits[0].subject not in case.neighbour.text and other.edits[0].target_new != case.edits[0].target_new
        assert case.other_fact == other.second_hop
        assert (case.edits, case.question, case.second_hop) == (original.edits, original.question, original.second_hop)
        same_relation += case.tags["relation"] == other.tags["relation"]
    assert same_relation > 0.9 * len(cases)


def test_wrong_facts_keep_the_question_and_cannot_lead_to_its_answer(cases):
    wrong = with_wrong_facts(cases)
    originals = {case.case_id: case for case in cases}
    assert len(wrong) > 0.95 * len(cases)
    for case in wrong:
        original = originals[case.case_id]
        assert case.question == original.question and case.edits[0].prompt == original.edits[0].prompt
        assert case.edits[0].target_new != original.edits[0].target_new
        source = next(c for c in cases if c.edits[0].target_new == case.edits[0].target_new)
        assert source.tags["entity_type"] == original.tags["entity_type"]


def test_a_case_alone_has_no_companion():
    case = Case("a", (EditRequest("Ann lives in", "Peru"),), Question("What does Ann pay with?", ("sol",)))
    assert with_neighbours([case]) == [case] and with_wrong_facts([case]) == []
    same_answer = Case("b", (EditRequest("Bob lives in", "Peru"),), Question("What does Bob pay with?", ("Sol",)))
    assert with_wrong_facts([case, same_answer]) == [] and contains_answer("Sol", ("sol",))


def test_every_case_says_where_its_texts_are_from():
    own, other = EditRequest("Ann lives in", "Peru", rephrasings=("Ann's home is",)), EditRequest("Bob lives in", "Oslo")
    question = Question("Where?", ("Lima",))
    cases = [Case("a", (own,), question, tags={"hops": "2"}), Case("b", (other,), question), Case("c", (own, other), question)]
    marked = with_text_origins(cases, lambda edit: frozenset({"data" if edit.rephrasings else "templates"}))
    assert [case.tags["augmentation"] for case in marked] == ["data", "templates", "data and templates"]
    assert marked[0].tags["hops"] == "2" and "augmentation" not in cases[0].tags
