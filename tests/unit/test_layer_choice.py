"""Successive halving over layers: who goes on, what is not done twice, and that the test splits stay unread."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors.torch import load_file

from propmeta_edit.cli import main
from propmeta_edit.errors import ConfigError
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.trainer import Stopped
from propmeta_edit.recipes import layer_choice
from propmeta_edit.recipes.layer_choice import choose_layer

ACCURACIES = {0: 0.2, 1: 0.5}


@pytest.fixture
def config(tmp_path, tokenizer):
    base = tiny.save_model_folder(tmp_path / "base", tokenizer)
    data = str(tiny.write_records(tmp_path / "train.jsonl", tiny.world_records("train_data_id", 40)))
    return MetaTrainConfig(
        model=str(base), data=data, inner_lr=0.01, num_inner_steps=1, tasks_per_step=2, device="cpu", validation_cases=4
    )


def test_the_better_half_goes_on_and_what_is_done_stays_done(config, tmp_path, monkeypatch):
    """The scores are made up, the meta-training is not."""
    asked = []

    def compute(model, tokenizer, own, validation):
        asked.append((own.layers[0], own.num_tasks))
        return {"valid-id": ACCURACIES[own.layers[0]], "valid-ood": ACCURACIES[own.layers[0]]}

    monkeypatch.setattr(layer_choice, "compute_edited_accuracy", compute)
    scores = choose_layer(config, [0, 1], ["attention", "mlp"], 2, tmp_path / "search")
    assert [(s.layer, s.num_tasks) for s in scores] == [(0, 2), (0, 2), (1, 2), (1, 2), (1, 4), (1, 4), (1, 8)]
    assert scores[-1].accuracy == 0.5
    assert len(asked) == 7
    assert choose_layer(config, [0, 1], ["attention", "mlp"], 2, tmp_path / "search") == scores
    assert len(asked) == 7, "a finished search does nothing"
    assert json.loads((tmp_path / "search" / "results.json").read_text())[0]["num_tasks"] == 2
    assert (tmp_path / "search" / "layers.png").read_bytes()[:4] == b"\x89PNG"


def test_a_candidate_that_was_stopped_goes_on_where_it_was(config, tmp_path, monkeypatch, caplog):
    """As a scheduler's SIGTERM stops it, after the first of its two outer steps."""
    monkeypatch.setattr(layer_choice, "compute_edited_accuracy", lambda *args: {"valid-id": 0.5})

    @contextmanager
    def stopped():
        yield lambda: True

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="stopped after 2 of 4 tasks"):
        patch.setattr(layer_choice, "stopped_by_sigterm", stopped)
        choose_layer(config, [1], ["mlp"], 4, tmp_path / "search")
    with caplog.at_level("INFO"):
        assert choose_layer(config, [1], ["mlp"], 4, tmp_path / "search")[-1].num_tasks == 4
    choose_layer(config, [1], ["mlp"], 4, tmp_path / "whole")
    assert "continuing after 2 tasks" in caplog.text
    states = [load_file(tmp_path / name / "layer-01-mlp" / "state.safetensors") for name in ("search", "whole")]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def other_model(config, tmp_path, tokenizer):
    return {"model": str(tiny.save_model_folder(tmp_path / "other", tokenizer, seed=1))}


def same_folder_other_model(config, tmp_path, tokenizer):
    tiny.save_model_folder(tmp_path / "base", tokenizer, seed=1)
    return {}


def other_data(config, tmp_path, tokenizer):
    tiny.write_records(tmp_path / "train.jsonl", tiny.world_records("train_data_id", 60))
    return {}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda *_: {"inner_lr": 0.02}, r"inner_lr: 0\.01, now 0\.02"),
        (lambda *_: {"validation_cases": 3}, r"validation_cases: 4, now 3; .*validation_sha256"),
        (other_model, r"\(model: .*base_sha256"),
        (same_folder_other_model, r"settings \(base_sha256: '\w+', now '\w+'\)"),
        (other_data, r"settings \(tasks_sha256: .*; validation_sha256: "),
    ],
)
def test_scores_of_another_search_are_refused(config, tmp_path, tokenizer, monkeypatch, change, named):
    """Also of a finished one, of which nothing is left to compute."""
    monkeypatch.setattr(layer_choice, "compute_edited_accuracy", lambda *args: {"valid-id": 0.5})
    choose_layer(config, [1], ["mlp"], 4, tmp_path / "search")
    with pytest.raises(ConfigError, match=named):
        choose_layer(replace(config, **change(config, tmp_path, tokenizer)), [1], ["mlp"], 4, tmp_path / "search")
    assert json.loads((tmp_path / "search" / "results.json").read_text())[0]["accuracy"] == 0.5


def test_a_search_with_another_first_round_is_another_one(config, tmp_path, monkeypatch):
    monkeypatch.setattr(layer_choice, "compute_edited_accuracy", lambda *args: {"valid-id": 0.5})
    choose_layer(config, [1], ["mlp"], 4, tmp_path / "search")
    with pytest.raises(ConfigError, match="first_tasks: 4, now 2"):
        choose_layer(config, [1], ["mlp"], 2, tmp_path / "search")


def test_more_candidates_and_fewer_tasks_at_once_are_the_same_search(config, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(layer_choice, "compute_edited_accuracy", lambda *args: asked.append(1) or {"valid-id": 0.5})
    choose_layer(config, [1], ["mlp"], 4, tmp_path / "search")
    choose_layer(replace(config, tasks_at_once=1), [1, 2], ["mlp"], 4, tmp_path / "search")
    assert len(asked) == 1 + 2, "layer 2 after 4 tasks, and the first of the two after 8"


def test_the_command(config, tmp_path, capsys):
    options = ["--model", config.model, "--data", config.data, "--device", "cpu", "--validation_cases", "4"]
    options += ["--inner_lr", "0.01", "--num_inner_steps", "1"]
    assert main(["choose-layer", *options, "--candidates", "[0,1]", "--first-tasks", "2", "--output", str(tmp_path / "s")]) == 0
    printed = capsys.readouterr().out
    assert "chosen: layers: [" in printed and printed.count(" tasks  layer ") == 3


def test_bad_searches(config, tmp_path):
    with pytest.raises(ConfigError, match="at least one outer step \\(2 tasks\\)"):
        choose_layer(config, [0], ["mlp"], 1, tmp_path)
    with pytest.raises(ConfigError, match="needs candidates"):
        choose_layer(config, [], ["mlp"], 4, tmp_path)
