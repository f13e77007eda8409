"""Which split a data set is of, and validation splits that training never saw."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import tiny

from propmeta_edit.errors import ConfigError
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.recipes import data_sets, meta_training
from propmeta_edit.recipes.meta_training import load_tasks
from propmeta_edit.recipes.splits import hold_out, is_released, kind_of, load_splits, to_test


@pytest.mark.parametrize(
    ("item", "kind"),
    [
        ("valid-ood", "validation"),
        ("cre-ood", "test"),
        ("cre-ood=test_data_ood.jsonl", "test"),
        ("valid-ood=test_data_ood.jsonl", "test"),
        ("cre-ood=/data/valid/test_data_ood.jsonl", "test"),
        ("cre-ood=valid_data_ood.jsonl", "validation"),
        ("/data/valid-files/facts.jsonl", "test"),
        ("valid_data_id.jsonl", "validation"),
        ("train_data_id.jsonl", "training"),
        ("valid-id=facts.jsonl", "validation"),
        ("hub:somebody/train-and-test", "test"),
    ],
)
def test_the_file_tells_the_split_and_else_the_name(item, kind):
    assert kind_of(item) == kind


def test_only_whole_names_become_test_splits():
    assert [to_test(item) for item in ("valid-id", "valid-ood")] == ["world-id", "world-ood"]
    for item in ("valid-ood=my.jsonl", "/data/valid-ood/facts.jsonl", "valid-oodle", "mquake-subset=f.json"):
        assert to_test(item) == item


@pytest.fixture
def train(tmp_path, monkeypatch):
    """A training file, and a world of its own that must not be read in its place."""
    monkeypatch.setattr(data_sets, "ensure_world", lambda: tmp_path / "world")
    monkeypatch.setattr(meta_training, "ensure_world", lambda: tmp_path / "world")
    (tmp_path / "world").mkdir()
    tiny.write_records(tmp_path / "world" / "valid_data_ood.jsonl", tiny.world_records("valid_data_ood", 3))
    return tiny.write_records(tmp_path / "train_data_id.jsonl", tiny.world_records("train_data_id", 300, skip=1000))


def test_validation_is_held_out_of_a_training_file_and_training_sees_none_of_it(train):
    config = MetaTrainConfig("m", data=str(train), validation_cases=10)
    held = hold_out(config, ["valid-id", "valid-ood"])
    splits = load_splits(["valid-id", "valid-ood"], {"a": held, "b": replace(held, layers=[0])}, 0)
    assert [split.kind for split in splits] == ["validation"] * 2 and len(splits[0].data.cases) == 10
    tasks, _ = load_tasks(held)
    subjects = {task.target.subject for task in tasks}
    assert tasks and not subjects & {case.edits[0].subject for split in splits for case in split.data.cases}
    assert len(load_tasks(hold_out(config, ["cre-ood=test.jsonl"]))[0]) == 300, "nothing is held out for a test file"


def test_the_offline_world_keeps_its_own_validation_files(train):
    config = replace(MetaTrainConfig("m"), validate_every=7)
    assert hold_out(config, ["valid-ood"]) == replace(config, validate_every=None), "as runs of before are named"
    [split] = load_splits(["valid-ood"], {"m": hold_out(config, ["valid-ood"])}, 0)
    assert len(split.data.cases) == 3 and not split.is_released


def test_validation_that_a_folder_lacks_is_not_taken_from_the_offline_world(train, tmp_path):
    folder = tmp_path / "cre"
    folder.mkdir()
    shutil.copy(train, folder)
    tiny.write_records(folder / "valid_data_id.jsonl", tiny.world_records("valid_data_id", 3, skip=100))
    held = hold_out(MetaTrainConfig("m", data=str(folder)), ["valid-id", "valid-ood"])
    assert len(load_splits(["valid-id"], {"a": held}, 0)[0].data.cases) == 3
    with pytest.raises(
        ConfigError, match=r"has no valid-ood \(it has valid-id\), and the facts of the offline world's are not what"
    ):
        load_splits(["valid-id", "valid-ood"], {"a": held}, 0)


def test_what_would_mix_data_is_refused(train):
    on_file, on_world = MetaTrainConfig("m", data=str(train)), MetaTrainConfig("m")
    with pytest.raises(ConfigError, match=r"world-ood is a test split of the offline world, but a .*: cre-ood=test_data_ood.jsonl"):
        load_splits(["world-ood"], {"a": on_file}, 0)
    held = [hold_out(config, ["valid-ood"]) for config in (on_file, on_world, replace(on_file, seed=1))]
    for other in held[1:]:
        with pytest.raises(ConfigError, match="a and b have other validation cases"):
            load_splits(["valid-ood"], {"a": held[0], "b": other}, 0)
    with pytest.raises(ConfigError, match="each once, got valid-ood, valid-ood"):
        load_splits(["valid-ood", "valid-ood"], {"a": on_world}, 0)


def test_released_is_what_the_user_names(train):
    assert is_released(str(train)) and is_released("cre-id=x.jsonl") and is_released("hub:a/b") and is_released("cre-id")
    assert not is_released("world-id") and not is_released("valid-ood")
