"""Settings that are gone: what earlier versions wrote is read, and a file that asks for one is told why it cannot have it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from propmeta_edit.cli import read_arguments
from propmeta_edit.config import build_config, read_yaml
from propmeta_edit.errors import ConfigError
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.run import TrainingRun
from propmeta_edit.models import artefacts
from propmeta_edit.recipes.real import _has_same_tasks

CARDS = sorted((Path(artefacts.__file__).parent / "files").glob("*/card.json"))
CONFIG = MetaTrainConfig("tiny", layers=[0], facts_per_task=[2, 3])


def write_yaml(folder, text):
    path = folder / "train.yaml"
    path.write_text(f"model: tiny\nlayers: [0]\nfacts_per_task: [2, 3]\n{text}")
    return path


def test_a_yaml_may_name_it_while_it_is_off(tmp_path):
    path = write_yaml(tmp_path, "compile: false\n")
    assert build_config(MetaTrainConfig, read_yaml(path), str(path)) == CONFIG
    _, values = read_arguments(["meta-train", "--config", str(path), "--seed", "4", "--output", "out"])
    assert values["config"] == MetaTrainConfig("tiny", layers=[0], facts_per_task=[2, 3], seed=4)


def test_a_yaml_that_switches_it_on_is_told_why_it_is_gone(tmp_path):
    path = write_yaml(tmp_path, "compile: true\n")
    for read in (
        lambda: build_config(MetaTrainConfig, read_yaml(path), str(path)),
        lambda: read_arguments(["meta-train", "--config", str(path), "--output", "out"]),
    ):
        with pytest.raises(ConfigError, match=r"train\.yaml: compile is True, but the setting is gone: .*; leave it out"):
            read()


def test_other_verbs_do_not_know_it(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("compile: false\n")
    with pytest.raises(ConfigError, match="compile"):
        read_arguments(["table2", "--config", str(path)])


def test_shipped_cards_that_name_it_are_read():
    named = {path: found for path in CARDS if "compile" in (found := json.loads(path.read_text()).get("settings", {}))}
    assert len(named) == 2
    for path, found in named.items():
        assert build_config(MetaTrainConfig, found, str(path)).layers == found["layers"]


def test_a_card_of_before_is_compared_by_what_is_left(monkeypatch):
    monkeypatch.setattr("propmeta_edit.recipes.real.load_tasks", lambda config: ([], {}))
    monkeypatch.setattr("propmeta_edit.recipes.real.hash_of_tasks", lambda tasks: "t")
    card = {"settings": {**vars(CONFIG), "compile": False}, "tasks_sha256": "t"}
    assert _has_same_tasks(card, CONFIG)
    assert not _has_same_tasks({**card, "settings": {**card["settings"], "seed": 1}}, CONFIG)


def test_a_run_of_before_goes_on(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({**CONFIG.decisive, "tasks_at_once": None, "compile": False}))
    run = TrainingRun(tmp_path, CONFIG.decisive, CONFIG.rounding)
    assert run._rounded_otherwise == []
    run.claim()
    assert "compile" not in json.loads((tmp_path / "settings.json").read_text())
