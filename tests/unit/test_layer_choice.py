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
from propmeta_edit.errors import ConfigError, OriginError
from propmeta_edit.evaluation.measures import CaseOutcome
from propmeta_edit.evaluation.runner import Method
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.trainer import Stopped
from propmeta_edit.options import Names, WholeNumbers
from propmeta_edit.studies import runs, variants
from propmeta_edit.studies.layer_choice import choose_layer

SHARES = {0: 1, 1: 2}  # of every four cases, so many are answered rightly after an edit of the layer


class Scripted(Method):
    """Answers a layer's share of the cases rightly."""

    def __init__(self, hparams, asked):
        self.layer, self.asked = hparams.layers[0], asked

    def evaluate_many(self, cases):
        outcomes = []
        for case in cases:
            self.asked.append((self.layer, case.case_id))
            right = sum(layer == self.layer for layer, _ in self.asked) % 4 < SHARES[self.layer]
            text = case.question.answers[0] if right else "?"
            outcomes.append(CaseOutcome(text, None, ("?",) * len(case.edits), 0.1))
        return outcomes


@pytest.fixture
def asked(monkeypatch):
    found = []
    monkeypatch.setattr(variants, "_build_trained", lambda hparams, weights, max_new_tokens: Scripted(hparams, found))
    return found


def choose(config, layers, modules, first_tasks, folder):
    given = WholeNumbers(layers), str(folder), Names(modules), first_tasks
    assert choose_layer(config, *given, Names(["valid-id", "valid-ood"])) == 0


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def names_of(folder):
    return list(dict.fromkeys(row["method"] for row in rows_of(folder)))


@pytest.fixture
def config(tmp_path, tokenizer):
    base = tiny.save_model_folder(tmp_path / "base", tokenizer)
    data = str(tiny.write_records(tmp_path / "train.jsonl", tiny.world_records("train_data_id", 300)))
    return MetaTrainConfig(
        model=str(base), data=data, inner_lr=0.01, num_inner_steps=1, tasks_per_step=2, device="cpu", validation_cases=4
    )


def test_the_better_half_goes_on_and_what_is_done_stays_done(config, tmp_path, asked, capsys):
    """The verdicts are made up, the meta-training is not."""
    choose(config, [0, 1], ["attention", "mlp"], 2, tmp_path / "search")
    first = [f"layer {layer} {modules} after 2" for layer in (0, 1) for modules in ("attention", "mlp")]
    later = [f"layer 1 {modules} after 4" for modules in ("attention", "mlp")]
    assert names_of(tmp_path / "search") == [*first, *later, "layer 1 attention after 8"]
    assert "chosen: layers: [1], modules: attention; picture:" in capsys.readouterr().out
    rows = rows_of(tmp_path / "search")
    assert {row["dataset"] for row in rows} == {"valid-id", "valid-ood"} and len(rows) == len(asked) == 7 * 2 * 4
    choose(config, [0, 1], ["attention", "mlp"], 2, tmp_path / "search")
    assert rows_of(tmp_path / "search") == rows and len(asked) == len(rows), "a finished search does nothing"
    text = (tmp_path / "search" / "layers.md").read_text()
    assert "| 8 | 1 | attention | valid-ood | validation | 4† | 50.0 [" in text
    assert (tmp_path / "search" / "layers.png").read_bytes()[:4] == b"\x89PNG"


def states_of(folder):
    return [load_file(path) for path in sorted(folder.rglob("state.safetensors"))]


def test_where_no_candidate_answers_anything_nothing_is_decided(config, tmp_path, asked, monkeypatch, capsys):
    config = replace(config, validation_cases=3)
    monkeypatch.setitem(SHARES, 0, 0)
    monkeypatch.setitem(SHARES, 1, 0)
    given = WholeNumbers([0, 1]), str(tmp_path / "search"), Names(["mlp"]), 2
    assert choose_layer(config, *given, Names(["valid-id", "valid-ood"])) == 1
    said = capsys.readouterr().out
    number = len({row["case_id"] + row["dataset"] for row in rows_of(tmp_path / "search")})
    assert f"undecided: every candidate answers none of its n = {number} validation cases after 2 tasks" in said
    assert "chosen" not in said


def test_a_candidate_that_was_stopped_goes_on_where_it_was(config, tmp_path, asked, monkeypatch, caplog):
    """As a scheduler's SIGTERM stops it, after the first of its two outer steps."""

    @contextmanager
    def stopped():
        yield lambda: True

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="stopped after 2 of 4 tasks"):
        patch.setattr(runs, "stopped_by_signals", stopped)
        choose(config, [1], ["mlp"], 4, tmp_path / "search")
    with caplog.at_level("INFO"):
        choose(config, [1], ["mlp"], 4, tmp_path / "search")
    assert names_of(tmp_path / "search") == ["layer 1 mlp after 4"]
    choose(config, [1], ["mlp"], 4, tmp_path / "whole")
    assert "continuing after 2 tasks" in caplog.text
    [own], [whole] = (states_of(tmp_path / name) for name in ("search", "whole"))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in own.items())


def test_twice_as_many_tasks_go_on_from_the_state_of_before(config, tmp_path, asked, caplog):
    with caplog.at_level("INFO"):
        choose(config, [0, 1], ["mlp"], 2, tmp_path / "search")
    assert caplog.text.count("continuing after 2 tasks") == 1
    [whole] = [path for path in tmp_path.rglob("tasks-000004.safetensors") if "layer-1" in str(path)]
    choose(config, [1], ["mlp"], 4, tmp_path / "whole")
    [other] = (tmp_path / "whole").rglob("tasks-000004.safetensors")
    assert all(torch.equal(tensor, load_file(other)[name]) for name, tensor in load_file(whole).items()), "as in one go"


def other_model(config, tmp_path, tokenizer):
    return {"model": str(tiny.save_model_folder(tmp_path / "other", tokenizer, seed=1))}


def same_folder_other_model(config, tmp_path, tokenizer):
    tiny.save_model_folder(tmp_path / "base", tokenizer, seed=1)
    return {}


def other_data(config, tmp_path, tokenizer):
    tiny.write_records(tmp_path / "train.jsonl", tiny.world_records("train_data_id", 300, skip=1000))
    return {}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda *_: {"inner_lr": 0.02},
            r"holds rows of layer 1 mlp after 4 made from something else \(inner_lr 0\.01, now 0\.02\)",
        ),
        (
            lambda *_: {"validation_cases": 3},
            r"holds rows of layer 1 mlp after 4 made from something else \(validation_cases 4, now 3\)",
        ),
        (other_model, r"holds rows of layer 1 mlp after 4 made from something else \(model '.*', now '.*'\)"),
        (same_folder_other_model, r"holds a run made from something else \(base_sha256 '\w+', now '\w+'\)"),
        (other_data, r"(data_sha256|tasks_sha256) '\w+', now '\w+'"),
    ],
)
def test_rows_of_another_search_are_refused(config, tmp_path, tokenizer, asked, change, named):
    """Also of a finished one, of which nothing is left to compute."""
    choose(config, [1], ["mlp"], 4, tmp_path / "search")
    before = rows_of(tmp_path / "search")
    other = replace(config, **change(config, tmp_path, tokenizer))
    runs.hash_of_model.cache_clear()
    runs._read_tasks.cache_clear()
    with pytest.raises(OriginError, match=named):
        choose(other, [1], ["mlp"], 4, tmp_path / "search")
    assert rows_of(tmp_path / "search") == before


def test_a_search_with_another_first_round_is_another_one(config, tmp_path, asked):
    choose(config, [1], ["mlp"], 4, tmp_path / "search")
    choose(config, [1], ["mlp"], 2, tmp_path / "search")
    assert names_of(tmp_path / "search") == ["layer 1 mlp after 4", "layer 1 mlp after 2"]
    assert len({row["model"] for row in rows_of(tmp_path / "search")}) == 2, "each made by its own run"


def test_more_candidates_and_fewer_tasks_at_once_are_the_same_search(config, tmp_path, asked):
    SHARES[2] = 0
    choose(config, [1], ["mlp"], 4, tmp_path / "search")
    choose(replace(config, tasks_at_once=1), [1, 2], ["mlp"], 4, tmp_path / "search")
    assert names_of(tmp_path / "search") == [f"layer {layer} mlp after {n}" for layer, n in ((1, 4), (2, 4), (1, 8))]
    assert len(asked) == 3 * 2 * 4, "layer 1 after 4 tasks is not asked again"


def test_failed_cases_decide_nothing(config, tmp_path, monkeypatch):
    class Broken(Method):
        def evaluate_many(self, cases):
            raise RuntimeError("no such luck")

    monkeypatch.setattr(variants, "_build_trained", lambda hparams, weights, max_new_tokens: Broken())
    with pytest.raises(ConfigError, match="nothing can be chosen: nothing is chosen, since cases failed"):
        choose(config, [0, 1], ["mlp"], 2, tmp_path / "search")


def test_the_command(config, tmp_path, capsys):
    options = ["--model", config.model, "--data", config.data, "--device", "cpu", "--validation_cases", "4"]
    options += ["--inner_lr", "0.01", "--num_inner_steps", "1"]
    assert main(["choose-layer", *options, "--candidates", "[0,1]", "--first-tasks", "2", "--output", str(tmp_path / "s")]) == 1
    printed = capsys.readouterr().out
    assert "undecided: every candidate answers none of its n = 8" in printed and len(names_of(tmp_path / "s")) == 2


def test_bad_searches(config, tmp_path):
    with pytest.raises(ConfigError, match="whole outer steps \\(2 tasks each\\)"):
        choose(config, [0], ["mlp"], 1, tmp_path)
    with pytest.raises(ConfigError, match="needs candidates"):
        choose(config, [], ["mlp"], 4, tmp_path)
    with pytest.raises(ConfigError, match="2 candidates need 800 tasks in the end, but the data has"):
        choose(config, [0, 1], ["mlp"], 400, tmp_path)
    with pytest.raises(ConfigError, match="--module-choices takes attention, mlp, attention\\+mlp, got heads"):
        choose(config, [0], ["heads"], 4, tmp_path)
