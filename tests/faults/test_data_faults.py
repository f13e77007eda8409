"""Broken data files are refused with the path, the place and the reason."""

from __future__ import annotations

import copy
import json
import shutil

import pytest

from propmeta_edit.data import world
from propmeta_edit.data.cre import count_cre, load_cre, save_cre
from propmeta_edit.data.mquake import load_mquake, load_mquake_subset
from propmeta_edit.errors import DataError

FACT = {"prefix": "Ann Lee lives in", "target": "Peru"}
QUESTION = {
    "question_template": "Capital of {country}?", "alias_question": "Capital of Ann Lee's country?",
    "unalias_question": "Capital of Peru?", "entity_name": "Peru", "answer": "Lima", "fact_idx": 0,
}  # fmt: skip
RECORD = {"entity_type": "Country", "subject": "Ann Lee", "facts": [FACT], "questions": [QUESTION]}
CASE = {
    "case_id": 42,
    "requested_rewrite": [{"prompt": "{} lives in", "subject": "Ann Lee", "target_new": {"str": "Peru"}}],
    "questions": ["What is the capital of Ann Lee's country?"],
    "new_answer": "Lima",
    "new_answer_alias": [],
}
TEXT_RECORD = {
    "entity_type": "Country", "subject": "Ann Lee", "text": "Ann Lee lives in Peru. She left Chad. Peru is warm.",
    "questions": [QUESTION],
}  # fmt: skip


def changed(base, *path_and_value):
    *path, last, value = path_and_value
    result = copy.deepcopy(base)
    place = result
    for key in path:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return result


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (changed(RECORD, "facts", None), r"neither 'facts' nor 'text'; .*give it one .*\(it has entity_type, questions, subject\)"),
        (changed(TEXT_RECORD, "text", 5), "'text' must be a string, got 5"),
        (changed(TEXT_RECORD, "text", " "), "neither 'facts' nor 'text'"),
        (changed(TEXT_RECORD, "subject", ""), "'subject' must not be empty"),
        (
            changed(TEXT_RECORD, "questions", 0, "entity_name", None),
            r"missing key 'entity_name' in 'questions\[0\]'; found alias_question, answer",
        ),
        (changed(TEXT_RECORD, "questions", 0, "entity_name", "Oman"), "no sentence of 'text' names 'Oman'.*'Ann Lee lives in"),
        (changed(TEXT_RECORD, "questions", 0, "fact_idx", None), "sentences 0, 2 of 'text' name 'Peru', so 'fact_idx' must be one"),
        (changed(TEXT_RECORD, "questions", 0, "fact_idx", 1), "must be one of these, got 1"),
        (changed(TEXT_RECORD, "questions", 0, "fact_idx", [0]), r"'questions\[0\]\.fact_idx' must be a whole number, got \[0\]"),
        (changed(TEXT_RECORD, "questions", 0, "fact_idx", True), r"'questions\[0\]\.fact_idx' must be a whole number, got true"),
        (
            changed(TEXT_RECORD, "questions", 0, "fact_idx", 2),
            r"no fact about 'Ann Lee' can be made from the sentence 'Peru is warm\.': nothing in it before 'Peru'.* 'facts'",
        ),
        (changed(RECORD, "questions", None), "missing key 'questions'"),
        (changed(RECORD, "questions", []), "'questions' must not be an empty list"),
        (changed(RECORD, "questions", ["what?"]), r"'questions\[0\]' must be a JSON object, got \"what\?\""),
        (changed(RECORD, "facts", "Ann Lee lives in Peru."), "'facts' must be a list"),
        (changed(RECORD, "facts", ["Ann Lee lives in Peru."]), r"'facts\[0\]' must be a JSON object"),
        (changed(RECORD, "facts", 0, "prefix", None), r"missing key 'prefix' in 'facts\[0\]'; found target"),
        (changed(RECORD, "facts", 0, "prefix", " . "), "prompt must be a non-empty string"),
        (changed(RECORD, "facts", 0, "target", 5), r"'facts\[0\]\.target' must be a string, got 5"),
        (changed(RECORD, "questions", 0, "fact_idx", 1), r"'fact_idx' must be in 0\.\.0, got 1"),
        (changed(RECORD, "questions", 0, "fact_idx", -1), "got -1"),
        (changed(RECORD, "questions", 0, "fact_idx", "0"), r"fact_idx' must be a whole number, got \"0\""),
        (changed(RECORD, "questions", 0, "fact_idx", True), r"fact_idx' must be a whole number, got true"),
        (changed(RECORD, "questions", 0, "answer", ["Lima"]), r"'questions\[0\]\.answer' must be a string or a number"),
        (changed(RECORD, "questions", 0, "answer", ""), r"'questions\[0\]\.answer' must not be empty"),
        (changed(RECORD, "questions", 0, "alias_question", None), "missing key 'alias_question'"),
        ([RECORD], r"a record must be a JSON object, got \[\{"),
    ],
)
def test_broken_cre_record_names_its_line(tmp_path, record, message):
    path = tmp_path / "cre.jsonl"
    path.write_text("\n".join(["", json.dumps(RECORD), "", json.dumps(record)]), encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        load_cre(path)
    assert str(caught.value).startswith(f"{path}, line 4: ")
    assert (caught.value.path, caught.value.line) == (path, 4)


def test_counting_names_the_line_too(tmp_path):
    save_cre([TEXT_RECORD, changed(TEXT_RECORD, "text", "Nothing.")], tmp_path / "cre.jsonl")
    with pytest.raises(DataError, match=r"cre\.jsonl, line 2: no sentence"):
        count_cre(tmp_path / "cre.jsonl")


def test_broken_cre_json_names_its_line(tmp_path):
    path = tmp_path / "cre.jsonl"
    path.write_text(json.dumps(RECORD) + '\n{"subject": \n', encoding="utf-8")
    with pytest.raises(DataError, match="line 2: broken JSON"):
        load_cre(path)


@pytest.mark.parametrize("load", [load_cre, load_mquake, load_mquake_subset])
def test_unreadable_files(tmp_path, load):
    with pytest.raises(DataError, match=r"missing\.json: cannot be read: No such file"):
        load(tmp_path / "missing.json")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        load(tmp_path)
    latin = tmp_path / "latin.json"
    latin.write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(DataError, match=r"latin\.json: is not UTF-8 text .* at byte 7"):
        load(latin)


def test_save_over_a_folder(tmp_path):
    (tmp_path / "cre.jsonl").mkdir()
    with pytest.raises(DataError, match=r"cre\.jsonl: cannot be written: Is a directory"):
        save_cre([RECORD], tmp_path / "cre.jsonl")
    with pytest.raises(DataError, match="cannot be written: it holds half of a character"):
        save_cre([{**RECORD, "subject": "Ann \ud800"}], tmp_path / "half.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["cre.jsonl"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (changed(CASE, "requested_rewrite", 0, "prompt", "Ann Lee lives in"), "exactly one {}"),
        (changed(CASE, "requested_rewrite", 0, "prompt", "{} and {} live in"), "exactly one {}"),
        (changed(CASE, "requested_rewrite", []), "'requested_rewrite' must not be an empty list"),
        (changed(CASE, "requested_rewrite", 0, "target_new", None), "an edit needs 'target_new' with 'str', or 'target_new_str'"),
        (
            changed(CASE, "requested_rewrite", 0, "target_new", "Peru"),
            r"'requested_rewrite\[0\]\.target_new' must be a JSON object, got \"Peru\"",
        ),
        (changed(CASE, "questions", []), "'questions' must not be an empty list"),
        (changed(CASE, "questions", [" "]), r"'questions\[0\]' must not be empty"),
        (changed(CASE, "new_answer", None), "missing key 'new_answer'"),
    ],
)
def test_broken_mquake_case_names_itself(tmp_path, case, message):
    path = tmp_path / "m.json"
    path.write_text(json.dumps([CASE, case]), encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        load_mquake(path)
    assert str(caught.value).startswith(f"{path}: record 1 (case_id 42): ")


@pytest.mark.parametrize("name", ["rephrase_prompt", "learning_prompt"])
@pytest.mark.parametrize(
    "item", [{"question": " ", "answer": "Peru"}, {"question": "Q", "answer": ""}, {"question": "Q", "answer": None}]
)
def test_empty_texts_of_cake_are_refused_when_read(tmp_path, name, item):
    path = tmp_path / "cake.json"
    fine = {"question": "Ann Lee's home is", "answer": "Peru"}
    broken = changed(CASE, "requested_rewrite", 0, name, [fine, item])
    path.write_text(json.dumps([CASE, broken]), encoding="utf-8")
    place = rf"'requested_rewrite\[0\]\.{name}\[1\]\.(question|answer)'"
    with pytest.raises(DataError, match=rf"record 1 \(case_id 42\): {place} must (not be empty|be a string)"):
        load_mquake(path)


def test_mquake_file_of_another_shape(tmp_path):
    path = tmp_path / "m.json"
    path.write_text('[\n{"case_id": 1},\n{"case_id" 2}\n]', encoding="utf-8")
    with pytest.raises(DataError, match="line 3: broken JSON"):
        load_mquake(path)
    path.write_text('{"case_id": 1}', encoding="utf-8")
    with pytest.raises(DataError, match="line 1: missing key 'requested_rewrite'; found case_id"):
        load_mquake(path)
    path.write_text('["text"]', encoding="utf-8")
    with pytest.raises(DataError, match='record 0: a record must be a JSON object, got "text"'):
        load_mquake(path)


def test_subset_without_chains_is_refused_not_emptied(tmp_path):
    path = tmp_path / "m.json"
    path.write_text(json.dumps([CASE]), encoding="utf-8")
    with pytest.raises(DataError, match=r"record 0 \(case_id 42\): missing key 'orig'"):
        load_mquake_subset(path)


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A copy of the data files that come with the package, to be damaged."""
    folder = shutil.copytree(world.shipped_files(), tmp_path / "shipped")
    monkeypatch.setattr(world, "shipped_files", lambda: folder)
    return folder


@pytest.mark.parametrize("name", [world.ARCHIVE, world.CHECKSUMS])
def test_the_packages_own_data_is_missing(name, shipped, tmp_path):
    (shipped / name).unlink()
    with pytest.raises(DataError, match=r"world\.tar\.xz: the package's own data cannot be read \(.*No such file.*install it anew"):
        world.unpack_world(tmp_path)


@pytest.mark.parametrize("length", [0, 9, 100_000])
def test_the_packages_own_data_is_cut_short(length, shipped, tmp_path):
    content = (shipped / world.ARCHIVE).read_bytes()
    (shipped / world.ARCHIVE).write_bytes(content[:length])
    with pytest.raises(DataError, match=r"world\.tar\.xz: the package's own data cannot be read \(.*install it anew"):
        world.unpack_world(tmp_path)


def test_the_packages_own_data_is_not_what_it_should_be(shipped, tmp_path):
    checksums = (shipped / world.CHECKSUMS).read_text(encoding="utf-8")
    (tmp_path / "out").mkdir()
    for other in (checksums.replace("0", "1"), checksums + "0  more.json\n", checksums.split("\n", 1)[1]):
        (shipped / world.CHECKSUMS).write_text(other, encoding="utf-8")
        with pytest.raises(DataError, match=r"world\.tar\.xz: the package's own data is damaged: .* not those of world\.sha256"):
            world.unpack_world(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
