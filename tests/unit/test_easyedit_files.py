"""EasyEdit's own files as cases, and what ``data check`` says of each format."""

from __future__ import annotations

import json

import pytest

from propmeta_edit.cli import main
from propmeta_edit.data.easyedit_files import load_easyedit_file
from propmeta_edit.data.mquake import bundled_mquake_path
from propmeta_edit.data.world import generate_world
from propmeta_edit.errors import DataError
from propmeta_edit.recipes.data_check import describe_file, find_format

KNOWEDIT = {
    "subject": "Ann Lee",
    "prompt": "The country of citizenship of Ann Lee is",
    "target_new": "Perú",
    "ground_truth": ["Chad"],
    "portability": {"Reasoning": [{"prompt": "What does Ann Lee's country speak?", "ground_truth": [["Spanish", "Castilian"]]}]},
    "locality": {"Relation_Specificity": [{"prompt": "Ann Lee's eyes are", "ground_truth": [["blue"]]}]},
}
ZSRE = {
    "src": "Where was Ann born?",
    "alt": "Lima",
    "answers": ["Rome"],
    "rephrase": "What is Ann's birthplace?",
    "loc": "nq question: who wrote Emma",
    "loc_ans": "Austen",
}
COUNTERFACT = {
    "case_id": 7,
    "prompt": "Ann was born in",
    "target_new": "Lima",
    "subject": "Ann",
    "rephrase_prompt": "Ann's home is",
    "locality_prompt": "Bob was born in",
    "locality_ground_truth": "Rome",
}


def write(folder, records, name="data.json"):
    path = folder / name
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def test_each_of_its_formats_becomes_a_case(tmp_path):
    knowedit, zsre, counterfact = load_easyedit_file(write(tmp_path, [KNOWEDIT, ZSRE, COUNTERFACT]))
    assert knowedit.edits[0].target_new == "Perú" and knowedit.edits[0].subject == "Ann Lee"
    assert knowedit.question.answers == ("Spanish", "Castilian") and knowedit.tags["probe"] == "Reasoning"
    assert knowedit.other_fact.answers == ("blue",)
    assert (
        zsre.edits[0].subject is None and zsre.question.text == "What is Ann's birthplace?" and zsre.question.answers == ("Lima",)
    )
    assert zsre.other_fact.text == "who wrote Emma"
    assert counterfact.case_id == "easyedit-7" and counterfact.other_fact.answers == ("Rome",)


def test_records_without_a_new_object_are_left_out_and_broken_ones_named(tmp_path):
    assert load_easyedit_file(write(tmp_path, [{**ZSRE, "alt": ""}])) == []
    for broken, message in (
        ({**COUNTERFACT, "target_new": " "}, "record 1: target_new"),
        ({**ZSRE, "alt": []}, "record 1: in none"),
        (5, "record 1"),
        ({"prompt": "Ann is"}, "record 1: missing key 'target_new or alt or labels'"),
    ):
        with pytest.raises(DataError, match=message):
            load_easyedit_file(write(tmp_path, [COUNTERFACT, broken]))


def test_check_says_what_a_file_is(tmp_path, capsys):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in generate_world(0, {"train": 6})["train"]), encoding="utf-8")
    assert main(["data", "check", str(path)]) == 0
    said = capsys.readouterr().out
    assert "CRE, 6 cases" in said and "by entity_type" in said and "Answer: The answer is" in said and "second hop" in said
    said = describe_file(bundled_mquake_path())
    assert "MQuAKE, 150 cases" in said and "by hops        4: 150" in said and "0 cases with two hops" in said
    said = describe_file(write(tmp_path, [KNOWEDIT, ZSRE]))
    assert "EasyEdit, 2 cases" in said and "non-ASCII" in said and "without a subject" in said and "' Perú'" in said


def test_check_knows_cakes_files_and_names_what_it_does_not_know(tmp_path, capsys):
    [case, *_] = json.loads(bundled_mquake_path().read_text(encoding="utf-8"))
    case["requested_rewrite"][0]["learning_prompt"] = [{"question": "And so:", "answer": "B"}]
    path = write(tmp_path, [case])
    assert find_format(path) == "CaKE" and "1 texts for CaKE" in describe_file(path)
    assert main(["data", "check", str(write(tmp_path, [{"a": 1}]))]) == 2
    assert "none of the known formats: a record has the keys a" in capsys.readouterr().err
    assert main(["data", "check", str(tmp_path / "none.json")]) == 2
