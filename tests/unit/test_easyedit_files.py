"""EasyEdit's own files as cases, and what ``data check`` says of each format."""

from __future__ import annotations

import json
import re

import pytest
import tiny

from propmeta_edit.cli import main
from propmeta_edit.data.easyedit_files import load_easyedit_file
from propmeta_edit.errors import DataError
from propmeta_edit.recipes.data_check import describe_file, find_format
from propmeta_edit.recipes.data_sets import load_dataset

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


def test_probes_without_an_answer_give_way_to_the_next(tmp_path):
    blank = {"prompt": "What is missing?", "ground_truth": [[""]]}
    portability = {"Reasoning": [blank, *KNOWEDIT["portability"]["Reasoning"]]}
    locality = {"Forgetfulness": [blank], **KNOWEDIT["locality"]}
    only_blank = {
        **KNOWEDIT,
        "rephrase": "Ann Lee is from",
        "portability": {"Reasoning": [blank]},
        "locality": {"Forgetfulness": [blank]},
    }
    [first, second] = load_easyedit_file(
        write(tmp_path, [{**KNOWEDIT, "portability": portability, "locality": locality}, only_blank])
    )
    assert first.question.answers == ("Spanish", "Castilian") and first.other_fact.answers == ("blue",)
    assert second.question.text == "Ann Lee is from" and second.tags["probe"] == "rephrase" and second.other_fact is None


PROBE = {"prompt": "What does Ann Lee's country speak?", "ground_truth": "Spanish"}
SPANISH = ("What does Ann Lee's country speak?", ("Spanish",))


@pytest.mark.parametrize(
    ("portability", "probe"),
    [
        ({"Reasoning": [PROBE]}, "Reasoning"),
        ({"Reasoning": PROBE}, "Reasoning"),
        ({"Reasoning": [], "Logical_Generalization": [{**PROBE, "ground_truth": [["Spanish"]]}]}, "Logical_Generalization"),
        ({"Subject_Aliasing": [{**PROBE, "prompt": [PROBE["prompt"]], "ground_truth": ["Spanish", " "]}]}, "Subject_Aliasing"),
        ({"Reasoning": None, "two_hop": PROBE}, "two_hop"),
        ([PROBE], "portability"),
        ([[{**PROBE, "ground_truth": []}], [PROBE]], "portability"),
        ([{"prompt": "What is missing?", "ground_truth": [[]]}, None, PROBE], "portability"),
        ({"New Question": PROBE["prompt"], "New Answer": ["Spanish"], "Recalled Relation": "(Peru, speaks, Spanish)"}, "Reasoning"),
    ],
)
def test_portability_in_every_shape_that_files_have(tmp_path, portability, probe):
    [case] = load_easyedit_file(write(tmp_path, [{**KNOWEDIT, "portability": portability}]))
    assert (case.question.text, case.question.answers) == SPANISH and case.tags["probe"] == probe


@pytest.mark.parametrize("portability", [None, {}, [], {"Reasoning": []}, {"Reasoning": None}, [[]], {"New Question": ""}])
def test_without_portability_the_rephrased_prompt_is_asked(tmp_path, portability):
    [case] = load_easyedit_file(write(tmp_path, [{**KNOWEDIT, "rephrase_prompt": "Ann Lee is from", "portability": portability}]))
    assert (case.question.text, case.question.answers) == ("Ann Lee is from", ("Perú",)) and case.tags["probe"] == "rephrase"


@pytest.mark.parametrize(
    "locality",
    [
        {"Relation_Specificity": [{"prompt": "Ann Lee's eyes are", "ground_truth": [["blue"]]}]},
        {"Forgetfulness": [], "Relation_Specificity": {"prompt": "Ann Lee's eyes are", "ground_truth": "blue"}},
        [{"prompt": "Ann Lee's eyes are", "ground_truth": "blue"}],
        [{"loc": "nq question: Ann Lee's eyes are", "loc_ans": "blue"}],
    ],
)
def test_locality_in_every_shape_that_files_have(tmp_path, locality):
    [case] = load_easyedit_file(write(tmp_path, [{**KNOWEDIT, "locality": locality}]))
    assert (case.other_fact.text, case.other_fact.answers) == ("Ann Lee's eyes are", ("blue",))


WIKIBIO = {
    "text": "Ann Lee was a Peruvian writer. She",
    "concept": "Ann Lee",
    "labels": "was born in Lima.",
    "locality": {"Relation_Specificity": [{"prompt": "The gender of Ann Lee is", "ground_truth": [["female"]]}]},
}
QAEDIT = {
    "prompt": "Where was Ann Lee born?",
    "target": "Lima",
    "subject": "Ann Lee",
    "rephrase": "What is Ann Lee's place of birth?",
    "locality": [{"loc": "who wrote Emma", "loc_ans": "Austen"}],
}
MZSRE = {
    "en": {**ZSRE, "subject": "Ann", "portability": {"New Question": "In which country was Ann born?", "New Answer": "Peru"}},
    "de": {**ZSRE, "src": "Wo wurde Ann geboren?", "rephrase": "Was ist Anns Geburtsort?", "loc": "wer schrieb Emma"},
    "zh-cn": {
        **ZSRE,
        "src": "安在哪里出生？",
        "alt": "利马",
        "rephrase": "安的出生地是哪里？",
        "loc": "谁写了爱玛",
        "loc_ans": "奥斯汀",
    },
}


def test_wikibio_and_qaedit(tmp_path):
    bio, qa = load_easyedit_file(write(tmp_path, [WIKIBIO, QAEDIT]))
    assert (bio.edits[0].prompt, bio.edits[0].target_new, bio.edits[0].subject) == (WIKIBIO["text"], "was born in Lima.", "Ann Lee")
    assert bio.question.text == WIKIBIO["text"] and bio.other_fact.answers == ("female",)
    assert (qa.edits[0].target_new, qa.question.text, qa.other_fact.text) == ("Lima", QAEDIT["rephrase"], "who wrote Emma")
    assert find_format(write(tmp_path, [QAEDIT])) == "EasyEdit"


def test_a_record_in_several_languages_is_a_case_in_each(tmp_path):
    path = write(tmp_path, [MZSRE, {**MZSRE, "case_id": 7, "de": {**MZSRE["de"], "alt": ""}}])
    assert find_format(path) == "EasyEdit"
    cases = load_easyedit_file(path)
    ids = ["easyedit-0-en", "easyedit-0-de", "easyedit-0-zh-cn", "easyedit-1-en", "easyedit-1-zh-cn"]
    assert [case.case_id for case in cases] == ids and [case.tags["language"] for case in cases[:3]] == ["en", "de", "zh-cn"]
    english, german, chinese = cases[:3]
    assert english.question.text == "In which country was Ann born?" and german.question.text == "Was ist Anns Geburtsort?"
    assert [(probe.kind, probe.question.text, probe.question.answers) for probe in english.probes] == [
        ("fact", "Wo wurde Ann geboren?", ("Lima",)),
        ("fact", "安在哪里出生？", ("利马",)),
    ]
    assert [probe.question.text for probe in chinese.probes] == ["Where was Ann born?", "Wo wurde Ann geboren?"]
    assert len(cases[3].probes) == 1, "it lacks the new object in German"
    assert "by language    de: 1, en: 2, zh-cn: 2" in describe_file(path)


def test_a_place_for_the_subject_is_filled_in(tmp_path):
    [case] = load_easyedit_file(write(tmp_path, [{**COUNTERFACT, "prompt": "{} was born in"}]))
    assert case.edits[0].prompt == "Ann was born in"
    with pytest.raises(
        DataError, match=r"record 0: the prompt '\{\} was born in' has a place for a subject, and the record has no"
    ):
        load_easyedit_file(write(tmp_path, [{"prompt": "{} was born in", "target_new": "Lima"}]))


def test_its_own_locality_is_what_is_asked(tmp_path):
    others = [
        {**KNOWEDIT, "subject": f"Bob {n}", "prompt": f"The home of Bob {n} is", "target_new": f"Place {n}"} for n in range(3)
    ]
    data = load_dataset(str(write(tmp_path, others)), seed=0)
    assert all(case.neighbour is not None and case.other_fact.answers == ("blue",) for case in data.cases)


def test_records_without_a_new_object_are_left_out_and_broken_ones_named(tmp_path):
    assert load_easyedit_file(write(tmp_path, [{**ZSRE, "alt": ""}])) == []
    for broken, message in (
        ({**COUNTERFACT, "target_new": " "}, r"record 1 \(case_id 7\): 'target_new' must not be empty"),
        ({**ZSRE, "alt": []}, "record 1: 'alt' must not be empty"),
        (5, "record 1: a record must be a JSON object, got 5"),
        ({"prompt": "Ann is"}, "record 1: missing key 'target_new or alt or labels or target'; found prompt"),
    ):
        with pytest.raises(DataError, match=message):
            load_easyedit_file(write(tmp_path, [COUNTERFACT, broken]))


def test_check_says_what_a_file_is(tmp_path, capsys):
    path = tiny.write_records(tmp_path / "train.jsonl", tiny.world_records("train_data_id", 6))
    assert main(["data", "check", str(path)]) == 0
    said = capsys.readouterr().out
    assert "CRE, 6 records, " in said and "by entity_type" in said and "Answer: The answer is" in said and "second hop" in said
    said = describe_file(write(tmp_path, tiny.mquake_cases(5)))
    assert "MQuAKE, 5 cases" in said and "by hops        4: 5" in said and "0 cases with two hops" in said
    said = describe_file(write(tmp_path, [KNOWEDIT, ZSRE]))
    assert "EasyEdit, 2 cases" in said and "non-ASCII" in said and "without a subject" in said and "' Perú'" in said


def test_check_knows_cakes_files_and_names_what_it_does_not_know(tmp_path, capsys):
    [case] = tiny.mquake_cases(1)
    case["requested_rewrite"][0]["learning_prompt"] = [{"question": "And so:", "answer": "B"}]
    path = write(tmp_path, [case])
    assert find_format(path) == "CaKE" and "1 texts for CaKE" in describe_file(path)
    assert main(["data", "check", str(write(tmp_path, [{"a": 1}]))]) == 2
    assert "none of the known formats: a record has the keys a" in capsys.readouterr().err
    assert main(["data", "check", str(tmp_path / "none.json")]) == 2


def test_check_counts_questions_apart_from_records_by_hops_and_edits(tmp_path):
    records = tiny.world_records("train_data_id", 6)
    number = sum(len(record["questions"]) for record in records)
    said = describe_file(tiny.write_records(tmp_path / "train.jsonl", records))
    assert number > 6 and f"CRE, 6 records, {number} questions" in said
    assert re.search(r"\nfacts         [0-9]+ from the file\n", said) and "left out" not in said
    assert f"by edits       1: {number}\n" in said and f"by hops        2: {number}\n" in said


def test_check_names_the_case_that_is_broken(tmp_path, capsys):
    [case] = tiny.mquake_cases(1)
    chainless = {**case, "orig": {"new_triples": case["orig"]["new_triples"]}}
    chainless.pop("new_single_hops", None)
    for records, message in (
        ([case, chainless], f"record 1 (case_id {case['case_id']}): missing key 'edit_triples' in 'orig'; found new_triples"),
        ([case, "text"], 'record 1: a record must be a JSON object, got "text"'),
        (
            [case, {**case, "requested_rewrite": 5}],
            f"record 1 (case_id {case['case_id']}): 'requested_rewrite' must be a list, got 5",
        ),
        ([], "it holds no record"),
    ):
        assert main(["data", "check", str(write(tmp_path, records))]) == 2
        assert message in capsys.readouterr().err


def test_a_folder_is_checked_file_by_file_and_its_broken_ones_fail_it(tmp_path, capsys):
    folder = tmp_path / "data"
    (folder / "inside").mkdir(parents=True)
    assert main(["data", "check", str(folder)]) == 2
    assert "it cannot be read as a data set" in capsys.readouterr().err
    write(folder, [KNOWEDIT])
    write(folder / "inside", [ZSRE, ZSRE], "zsre.json")
    (folder / "readme.txt").write_text("not data")
    assert main(["data", "check", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "data.json: EasyEdit, 1 cases" in said and "zsre.json: EasyEdit, 2 cases" in said and said.count("the first case:") == 2
    write(folder, [{"a": 1}], "other.json")
    assert main(["data", "check", str(folder)]) == 2
    captured = capsys.readouterr()
    assert "other.json: cannot be used" in captured.out and "zsre.json: EasyEdit" in captured.out
    assert "1 of its files cannot be used" in captured.err
