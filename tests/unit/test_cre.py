"""The CRE loader on invented records."""

from __future__ import annotations

import copy
import json

import pytest

from propmeta_edit.data.cre import CreCounts, count_cre, load_cre, save_cre
from propmeta_edit.errors import ConfigError, DataError

RECORD = {
    "entity_type": "Country",
    "entity_names": ["Norway", "Kenya", "Greece"],
    "subject": "Brightleaf Tools Ltd.",
    "gender_type": "it",
    "subject_type": "company",
    "facts": [
        {"prefix": "Brightleaf Tools Ltd. was founded in", "target": "Norway"},
        {"prefix": " The branch list of Brightleaf Tools Ltd. includes . ", "target": " Kenya "},
        {"prefix": "Its head office is in", "target": "Greece"},
    ],
    "questions": [
        {
            "question_template": f"{relation} of {{country}}?",
            "alias_question": f"{relation} of the country number {index}?",
            "unalias_question": f"{relation} of {entity}?",
            "entity_name": entity,
            "answer": answer,
            "fact_idx": index,
        }
        for relation, entity, answer, index in (
            ("Currency", "Norway", "Norwegian krone", 0),
            ("Founding year", "Kenya", 1963, 1),
            ("Capital", "Greece", "Athens", 2),
        )
    ],
}


def make_records(count):
    records = []
    for number in range(count):
        record = copy.deepcopy(RECORD)
        record["subject"] = f"Firm {number}"
        record["facts"] = [{"prefix": f"Firm {number} fact {k}", "target": "x"} for k in range(3)]
        records.append(record)
    return records


def test_every_question_becomes_a_case_with_its_own_fact(tmp_path):
    path = tmp_path / "cre.jsonl"
    save_cre([RECORD], path)
    first, second, third = load_cre(path, question_choice="all")
    assert [case.case_id for case in (first, second, third)] == ["cre-000000#0", "cre-000000#1", "cre-000000#2"]
    assert (first.edits[0].prompt, first.edits[0].target_new) == ("Brightleaf Tools Ltd. was founded in", "Norway")
    assert first.edits[0].subject == "Brightleaf Tools Ltd."
    assert (first.question.text, first.question.answers) == ("Currency of the country number 0?", ("Norwegian krone",))
    assert (first.second_hop.text, first.second_hop.answers) == ("Currency of Norway?", ("Norwegian krone",))
    tags = {"entity_type": "Country", "relation": "Currency of {country}?", "entity_name": "Norway", "hops": "2", "edits": "1"}
    assert first.tags == tags
    assert (second.edits[0].prompt, second.edits[0].target_new) == (
        "The branch list of Brightleaf Tools Ltd. includes",
        "Kenya",
    )
    assert second.edits[0].subject == "Brightleaf Tools Ltd."
    assert second.question.answers == ("1963",)
    assert third.edits[0].subject is None


def test_a_facts_other_wording_is_read_where_there_is_one(tmp_path):
    record = copy.deepcopy(RECORD)
    wordings = (" It was in Norway that Brightleaf was founded, or . ", record["facts"][1]["prefix"], None)
    for fact, other in zip(record["facts"], wordings, strict=True):
        fact["paraphrase_prefix"] = other
    path = tmp_path / "cre.jsonl"
    save_cre([record, RECORD], path)
    found = [case.edits[0].rephrasings for case in load_cre(path, question_choice="all")]
    assert found == [("It was in Norway that Brightleaf was founded, or",), (), (), (), (), ()]
    record["facts"][0]["paraphrase_prefix"] = 5
    save_cre([record], path)
    with pytest.raises(DataError, match=r"line 1: 'facts\[0\]\.paraphrase_prefix' must be a string, got 5"):
        load_cre(path, question_choice="all")


def test_seeded_choice_takes_one_question_and_depends_on_seed_and_line_only(tmp_path):
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    records = make_records(40)
    save_cre(records, path)
    save_cre([*make_records(1) * 20, *records[20:]], other)
    chosen = [case.question.text for case in load_cre(path, seed=3)]
    assert len(chosen) == 40
    assert len(set(chosen)) == 3, "all questions get their turn"
    assert chosen == [case.question.text for case in load_cre(path, seed=3)]
    assert chosen != [case.question.text for case in load_cre(path, seed=4)]
    assert chosen[20:] == [case.question.text for case in load_cre(other, seed=3)][20:]


def test_empty_lines_are_skipped_and_unicode_separators_kept(tmp_path):
    record = copy.deepcopy(RECORD)
    record["facts"] = [{**fact, "target": "A\u2028B"} for fact in record["facts"]]
    path = tmp_path / "cre.jsonl"
    line = json.dumps(record, ensure_ascii=False)
    path.write_text(f"\n{line}\n\n  \n{line}\n", encoding="utf-8")
    cases = load_cre(path)
    assert [case.case_id for case in cases] == ["cre-000000", "cre-000001"]
    assert cases[0].edits[0].target_new == "A\u2028B"


def test_save_keeps_letters_readable_and_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "cre.jsonl"
    path.write_text("old", encoding="utf-8")
    save_cre([{"name": "São Paulo"}, {"name": "x"}], path)
    assert path.read_text(encoding="utf-8") == '{"name": "São Paulo"}\n{"name": "x"}\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ["cre.jsonl"]


def test_failed_save_keeps_the_old_file(tmp_path):
    path = tmp_path / "cre.jsonl"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(TypeError):
        save_cre([{"name": object()}], path)
    assert path.read_text(encoding="utf-8") == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["cre.jsonl"]


def test_unknown_question_choice_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="seeded, all, got 'first'"):
        load_cre(tmp_path / "cre.jsonl", question_choice="first")


def without_facts(record, text):
    return {**{key: value for key, value in record.items() if key != "facts"}, "text": text}


TEXT_RECORD = without_facts(
    RECORD,
    "Brightleaf Tools Ltd. was founded in Norway. The company runs workshops in Kenya and hires there. "
    "Eventually, it opened an office in Greece.",
)


def test_a_record_without_facts_gets_them_from_its_text(tmp_path):
    path = tmp_path / "cre.jsonl"
    save_cre([TEXT_RECORD, {**TEXT_RECORD, "facts": None}, {**TEXT_RECORD, "facts": []}, RECORD], path)
    cases = load_cre(path, question_choice="all")
    name = "Brightleaf Tools Ltd."
    assert [(case.edits[0].prompt, case.edits[0].target_new) for case in cases[:3]] == [
        (f"{name} was founded in", "Norway"),
        (f"{name} runs workshops in", "Kenya"),
        (f"{name} opened an office in", "Greece"),
    ]
    assert all(case.edits[0].subject == name for case in cases[:9])
    assert [case.edits for case in cases[:3]] == [case.edits for case in cases[3:6]] == [case.edits for case in cases[6:9]]
    told, made = cases[9], cases[0]
    assert (made.question, made.second_hop, made.tags) == (told.question, told.second_hop, told.tags)
    assert len(load_cre(path)) == 4
    assert count_cre(path) == CreCounts(num_records=4, from_file=3, from_text=9, num_unanswered=0)


@pytest.mark.parametrize("record", [RECORD, TEXT_RECORD])
@pytest.mark.parametrize("missing", [float("nan"), "nan", " NaN ", None])
def test_no_question_is_made_of_a_missing_answer(tmp_path, record, missing):
    path = tmp_path / "cre.jsonl"
    gap, void = copy.deepcopy(record), copy.deepcopy(record)
    gap["questions"][1]["answer"] = missing
    for question in void["questions"]:
        question["answer"] = missing
    save_cre([gap, void, record], path)
    ids = [case.case_id for case in load_cre(path, question_choice="all")]
    assert ids == ["cre-000000#0", "cre-000000#2", "cre-000002#0", "cre-000002#1", "cre-000002#2"]
    asked = {load_cre(path, seed=seed)[0].question.answers[0] for seed in range(20)}
    assert asked == {"Norwegian krone", "Athens"} and [case.case_id for case in load_cre(path)] == ["cre-000000", "cre-000002"]
    counts = count_cre(path)
    assert (counts.num_records, counts.from_file + counts.from_text, counts.num_unanswered) == (3, 5, 4)


def test_answers_that_only_look_missing_are_kept(tmp_path):
    path = tmp_path / "cre.jsonl"
    record = copy.deepcopy(RECORD)
    for question, answer in zip(record["questions"], ("Nan", "naan", 0), strict=True):
        question["answer"] = answer
    save_cre([record], path)
    assert [case.question.answers for case in load_cre(path, question_choice="all")] == [("Nan",), ("naan",), ("0",)]
    assert count_cre(path) == CreCounts(num_records=1, from_file=3, from_text=0, num_unanswered=0)
