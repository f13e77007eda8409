"""CRE's files from folders, from what ``datasets`` writes, and from the hub, without a network."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import tiny

from propmeta_edit.cli import main
from propmeta_edit.data.cre import load_cre
from propmeta_edit.errors import DataError
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.recipes.data_sets import load_dataset, load_datasets
from propmeta_edit.recipes.meta_training import load_tasks
from propmeta_edit.recipes.sources import CRE_FILES, find_file, find_files

SIZES = (40, 5, 3, 4, 2, 6)  # of the files in CRE_FILES
TESTS = [("cre-id", 3), ("cre-ood", 4), ("cre-ood-entity", 2), ("cre-ood-relation", 6)]


@pytest.fixture(scope="module")
def records():
    """Records whose answers are all strings, as a column of a data set has one type."""
    world = {file: tiny.world_records(Path(file).stem, size) for file, size in zip(CRE_FILES, SIZES, strict=True)}
    for question in (question for file in world.values() for record in file for question in record["questions"]):
        question["answer"] = str(question["answer"])
    return world


@pytest.fixture(autouse=True)
def _private_datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def write_files(folder, records):
    folder.mkdir(parents=True)
    for name, some in records.items():
        tiny.write_records(folder / name, some)
    return folder


def as_splits(records):
    """A data set with the splits of CRE under names a hub might have."""
    named = {name.removesuffix(".jsonl").replace("-", "_"): some for name, some in records.items()}
    return datasets.DatasetDict({name: datasets.Dataset.from_list(some) for name, some in named.items()})


def write_parquet(folder, records):
    for name, split in as_splits(records).items():
        (folder / "data").mkdir(parents=True, exist_ok=True)
        split.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    configuration = "".join(f"  - split: {name}\n    path: data/{name}-*\n" for name in as_splits(records))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{configuration}---\n")
    return folder


def save_to_disk(folder, records):
    as_splits(records).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("write", [write_files, write_parquet, save_to_disk])
def test_all_six_files_of_a_folder_are_found(write, records, tmp_path):
    folder = str(write(tmp_path / "cre", records))
    assert [(data.name, len(data.cases)) for data in load_datasets(folder, seed=0)] == TESTS
    assert len(load_dataset(f"valid-id={folder}", seed=0).cases) == 5
    tasks, validation = load_tasks(MetaTrainConfig(model="tiny", data=folder, validate_every=10))
    assert len(tasks) == 40 and {name: len(cases) for name, cases in validation.items()} == {"valid-id": 5}
    plain = write_files(tmp_path / "plain", records)
    for name in CRE_FILES:
        assert load_cre(find_file(folder, name), question_choice="all") == load_cre(plain / name, question_choice="all")


def as_texts(records):
    """The same records with a text in place of their facts, the first of each file with a question more that has no answer."""
    texts = {}
    for name, some in records.items():
        texts[name] = [{key: value for key, value in record.items() if key != "facts"} for record in copy.deepcopy(some)]
        for text_record, record in zip(texts[name], some, strict=True):
            text_record["text"] = " ".join(f"{record['subject']} has to do with {fact['target']}." for fact in record["facts"])
        texts[name][0]["questions"].append({**texts[name][0]["questions"][0], "answer": "nan"})
    return texts


@pytest.mark.parametrize("write", [write_files, write_parquet, save_to_disk])
def test_every_form_may_have_texts_in_place_of_facts(write, records, tmp_path, capsys):
    texts = as_texts(records)
    folder = str(write(tmp_path / "cre", texts))
    assert [(data.name, len(data.cases)) for data in load_datasets(folder, seed=0)] == TESTS
    tasks, _ = load_tasks(MetaTrainConfig(model="tiny", data=folder))
    assert len(tasks) == 40 and all(task.target.prompt == f"{task.target.subject} has to do with" for task in tasks)
    plain = write_files(tmp_path / "plain", texts)
    for name in CRE_FILES:
        assert load_cre(find_file(folder, name), question_choice="all") == load_cre(plain / name, question_choice="all")
    assert main(["data", "check", folder]) == 0
    said = capsys.readouterr().out
    assert said.count(" made from its records' text\n") == 6 and " from the file" not in said
    assert said.count("1      questions left out: their answer is NaN") == 6


def test_a_data_set_of_the_hub_is_read_from_its_files_or_else_its_splits(records, tmp_path, monkeypatch, capsys):
    snapshot = write_files(tmp_path / "snapshot", records)
    asked = []

    def fetch(name, **options):
        asked.append((name, options))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    tasks, _ = load_tasks(MetaTrainConfig(model="tiny", data="hub:owner/cre"))
    assert len(tasks) == 40 and asked[0] == ("owner/cre", {"repo_type": "dataset", "allow_patterns": "*.jsonl"})
    assert main(["data", "check", "hub:owner/cre"]) == 0
    assert capsys.readouterr().out.count(": CRE, ") == 6
    for file in snapshot.iterdir():
        file.unlink()
    monkeypatch.setattr(datasets, "load_dataset", {"owner/cre": as_splits(records)}.__getitem__)
    assert [(data.name, len(data.cases)) for data in load_datasets("hub:owner/cre", seed=0)] == TESTS


def test_files_of_another_data_set_of_that_name_are_not_left_behind(records, tmp_path, monkeypatch):
    train_only = {"train_data_id.jsonl": records["train_data_id.jsonl"]}
    for place, some in (("first", records), ("second", train_only)):
        write_parquet(tmp_path / place / "cre", some)
    monkeypatch.chdir(tmp_path / "first")
    assert set(find_files("cre")) == set(CRE_FILES)
    monkeypatch.chdir(tmp_path / "second")
    assert set(find_files("cre")) == {"train_data_id.jsonl"}, "the same name, elsewhere"
    monkeypatch.chdir(tmp_path / "first")
    shutil.rmtree(tmp_path / "first" / "cre")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "another-cache")
    write_parquet(tmp_path / "first" / "cre", train_only)
    assert set(find_files("cre")) == {"train_data_id.jsonl"}, "the same place, with fewer splits"


def test_what_is_missing_is_said(records, tmp_path):
    tests_only = {name: some for name, some in records.items() if name.startswith("test")}
    folder = write_files(tmp_path / "tests", tests_only)
    with pytest.raises(DataError, match=r"train_data_id\.jsonl is not in it; of CRE's files it has test_data_id\.jsonl, test"):
        load_tasks(MetaTrainConfig(model="tiny", data=str(folder)))
    train_only = write_files(tmp_path / "train", {"train_data_id.jsonl": records["train_data_id.jsonl"]})
    with pytest.raises(DataError, match=r"none of CRE's test files is in it, only train_data_id\.jsonl"):
        load_datasets(str(train_only), seed=0)
    write_files(train_only / "again", {"train_data_id.jsonl": records["train_data_id.jsonl"]})
    with pytest.raises(DataError, match=r"train_data_id\.jsonl is in it several times"):
        find_files(str(train_only))
    for name, columns, message in (
        ("corpus", {"text": ["a"]}, r"none of its splits \(corpus\) is called like one; expected train, train_id"),
        (
            "train",
            {"text": ["a"], "subject": ["b"]},
            "split train has no column entity_type, questions, which .* has text, sub",
        ),
        (
            "train",
            {"entity_type": ["a"], "subject": ["b"], "questions": ["c"]},
            "split train has no column facts or text, which .* has entity_type, sub",
        ),
    ):
        other = tmp_path / f"other-{'-'.join(columns)}"
        datasets.DatasetDict({name: datasets.Dataset.from_dict(columns)}).save_to_disk(str(other))
        with pytest.raises(DataError, match=message):
            find_files(str(other))
