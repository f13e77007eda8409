"""The MQuAKE loader on invented cases, those with four hops among them."""

from __future__ import annotations

import copy
import json
import logging
from collections import Counter

import pytest
import tiny

from propmeta_edit.data.mquake import is_two_hop_first_edited, load_mquake, load_mquake_subset

HOP_1, HOP_2, HOP_3 = ["Q9", "P27", "Q1"], ["Q1", "P37", "Q6"], ["Q6", "P99", "Q7"]
REWRITE_1 = {"prompt": "{} is a citizen of", "subject": "Ann Lee", "relation_id": "P27", "target_new": {"str": "Peru"}}
REWRITE_2 = {"prompt": "The tongue of {} {x} is", "subject": "Peru", "relation_id": "P37", "target_new": {"str": "Welsh"}}


def make_case(chain=(HOP_1, HOP_2), edited=(HOP_1,), rewrites=(REWRITE_1,), case_id=11):
    return {
        "case_id": case_id,
        "requested_rewrite": copy.deepcopy(list(rewrites)),
        "questions": ["What tongue is spoken in Ann Lee's country?", "other", "third"],
        "new_answer": "Spanish",
        "new_answer_alias": ["Castilian", "Spanish", 7, " "],
        "orig": {"new_triples": list(chain), "edit_triples": list(edited)},
    }


KEPT = make_case()
SECOND_HOP_EDITED = make_case(edited=(HOP_2,), rewrites=(REWRITE_2,))
BOTH_EDITED = make_case(edited=(HOP_1, HOP_2), rewrites=(REWRITE_1, REWRITE_2))
THREE_HOPS = make_case(chain=(HOP_1, HOP_2, HOP_3))


def write(path, cases):
    path.write_text(json.dumps(cases), encoding="utf-8")
    return path


def test_case_fields(tmp_path):
    raw = {**BOTH_EDITED, "cloze_question": "The tongue of Ann Lee's country is"}
    (case,) = load_mquake(write(tmp_path / "m.json", [raw]))
    assert case.case_id == "mquake-11"
    assert [(edit.prompt, edit.target_new, edit.subject) for edit in case.edits] == [
        ("Ann Lee is a citizen of", "Peru", "Ann Lee"),
        ("The tongue of Peru {x} is", "Welsh", "Peru"),
    ]
    assert case.question.text == "What tongue is spoken in Ann Lee's country?"
    assert case.question.answers == ("Spanish", "Castilian", "7")
    assert case.question.cloze == "The tongue of Ann Lee's country is"
    assert case.second_hop is None
    assert case.tags == {"hops": "2", "edits": "2", "relation": "P37", "chain": "P27 P37", "last hop": "edited"}


def test_a_subject_with_space_around_it_is_in_its_prompt_all_the_same(tmp_path):
    rewrite = {**REWRITE_1, "prompt": "The author of {}", "subject": "Misery "}
    (case,) = load_mquake(write(tmp_path / "m.json", [make_case(rewrites=(rewrite,))]))
    assert (case.edits[0].prompt, case.edits[0].subject) == ("The author of Misery", "Misery")


def test_the_last_hop_is_knowledge_unless_it_is_edited(tmp_path):
    hops = [{"question": "Where?", "answer": "Peru"}, {"question": "What tongue has Peru?", "answer": 7, "answer_alias": ["Welsh"]}]
    raws = [{**raw, "new_single_hops": hops} for raw in (KEPT, BOTH_EDITED)]
    first, second = load_mquake(write(tmp_path / "m.json", raws))
    assert first.second_hop.text == "What tongue has Peru?" and first.second_hop.answers == ("7", "Welsh")
    assert second.second_hop is None


def test_cloze_and_chain_are_optional(tmp_path):
    raw = make_case()
    del raw["orig"]
    (case,) = load_mquake(write(tmp_path / "m.json", [raw]))
    assert case.question.cloze is None
    assert case.tags == {"edits": "1"}


@pytest.mark.parametrize(("raw", "kept"), [(KEPT, True), (SECOND_HOP_EDITED, False), (BOTH_EDITED, False), (THREE_HOPS, False)])
def test_subset_filter(raw, kept):
    assert is_two_hop_first_edited(raw) is kept


def test_subset_keeps_order_and_logs_its_size(tmp_path, caplog):
    cases = [THREE_HOPS, make_case(case_id=5), SECOND_HOP_EDITED, BOTH_EDITED, make_case(case_id=3)]
    path = write(tmp_path / "m.json", cases)
    with caplog.at_level(logging.INFO, logger="propmeta_edit.data.mquake"):
        subset = load_mquake_subset(path)
    assert [case.case_id for case in subset] == ["mquake-5", "mquake-3"]
    assert "2 of 5 cases" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(("selected", "warns"), [(213, False), (212, True)])
def test_a_3000_case_file_with_another_count_warns(tmp_path, caplog, selected, warns):
    path = write(tmp_path / "m.json", [KEPT] * selected + [THREE_HOPS] * (3000 - selected))
    with caplog.at_level(logging.INFO, logger="propmeta_edit.data.mquake"):
        assert len(load_mquake_subset(path)) == selected
    assert any(record.levelno == logging.WARNING for record in caplog.records) is warns


def test_four_hop_cases(tmp_path):
    """All hops edited, answers without an alias and with one of two letters, prompts with the subject first and further on."""
    cases = load_mquake(tiny.write_mquake(tmp_path / "m.json", tiny.mquake_cases(14)))
    assert len(cases) == len({case.case_id for case in cases}) == 14
    assert (cases[0].case_id, cases[-1].case_id) == ("mquake-100", "mquake-113")
    assert {len(case.edits) for case in cases} == {4}
    assert sum(len(case.question.answers) == 1 for case in cases) == 5
    assert Counter(case.tags["relation"] for case in cases) == {"P36": 5, "P30": 5, "P37": 4}
    assert {(case.tags["hops"], case.tags["edits"]) for case in cases} == {("4", "4")}
    edits = [edit for case in cases for edit in case.edits]
    assert sum(edit.prompt.startswith(edit.subject) for edit in edits) == 14 * 2 + 5
    assert cases[0].edits[0].prompt == "The author of Book 0 is"
    assert cases[2].question.answers == ("Language of Ñewland 2", "ñe", "the Language")


def test_four_hop_cases_have_no_two_hop_case(tmp_path):
    assert load_mquake_subset(tiny.write_mquake(tmp_path / "m.json", tiny.mquake_cases(3))) == []


def test_remastered_copy_on_the_hub_is_flat(tmp_path):
    """MQuAKE-Remastered: nested as MQuAKE in its repository's files, flat in the copy on the hub, both with a ``split``."""
    flat = {key: value for key, value in REWRITE_1.items() if key != "target_new"} | {
        "target_new_str": "Peru",
        "target_new_id": "Q1",
    }
    split = {"split": {"3000": ["edited"]}}
    raws = [{**make_case(rewrites=(flat,)), **split}, {**KEPT, **split}]
    first, second = load_mquake(write(tmp_path / "m.json", raws))
    assert first.edits == second.edits and first.edits[0].target_new == "Peru"
    assert len(load_mquake_subset(write(tmp_path / "m.json", raws))) == 2
