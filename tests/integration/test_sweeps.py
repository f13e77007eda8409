"""Table 1 and Figures 2 to 4 on tiny models: the variants, resuming, pictures, plans, and what is read."""

from __future__ import annotations

import json

import pytest
import run_figure2
import run_figure3
import run_figure4
import run_table1
import sweep_parts
import tiny
import torch
from safetensors.torch import load_file

from propmeta_edit.data.world import generate_world
from propmeta_edit.recipes import comparison, meta_training

SPLITS = {
    "train": "train_data_id",
    "valid-id": "valid_data_id",
    "valid-ood": "valid_data_ood",
    "test-id": "test_data_id",
    "test-ood": "test_data_ood",
}


@pytest.fixture
def place(tmp_path, tokenizer, monkeypatch):
    """A tiny model with settings, and a small world."""
    tiny.save_model_folder(tmp_path / "base", tokenizer)
    world = generate_world(0, {"train": 8, **dict.fromkeys(list(SPLITS)[1:], 3)})
    (tmp_path / "world").mkdir()
    for split, name in SPLITS.items():
        tiny.write_records(tmp_path / "world" / f"{name}.jsonl", world[split])
    for module in (comparison, meta_training):
        monkeypatch.setattr(module, "ensure_world", lambda: tmp_path / "world")
    yaml = tmp_path / "tiny.yaml"
    yaml.write_text(
        f"model: {tmp_path / 'base'}\nlayers: [1]\ninner_lr: 0.01\nouter_lr: 0.01\nnum_inner_steps: 2\nnum_tasks: 4\n"
        "dtype: float32\n"
    )
    monkeypatch.setattr(sweep_parts, "hparams_file", lambda method, name: yaml)
    return tmp_path


def arguments(place, *more):
    return ["--models", "tiny", "--device", "cpu", "--limit", "2", "--output", str(place / "out"), *more]


def is_png(path):
    return path.read_bytes()[:4] == b"\x89PNG"


def test_table1_has_every_choice_of_modules_with_and_without(place, capsys):
    assert run_table1.main(arguments(place)) == 0
    text = (place / "out" / "table1.md").read_text()
    assert text in capsys.readouterr().out and text.count("| validation |") == 12
    for modules in ("attention", "mlp", "attention+mlp"):
        assert f"| tiny {modules} | valid-id |" in text and f"| tiny {modules} without | valid-ood |" in text
    cards = [json.loads(p.read_text()) for p in (place / "out" / "checkpoints").glob("*/metaft.json")]
    assert len(cards) == 3 and {card["settings"]["layers"] for card in cards} == {"all"}


def test_figure2_goes_through_layers_and_continues(place):
    run = arguments(place, "--layers", "0,2", "--module-choices", "mlp,attention")
    assert run_figure2.main(run) == 0
    folders = {p: p.stat().st_mtime_ns for p in (place / "out" / "checkpoints").iterdir()}
    rows = (place / "out" / "rows.jsonl").read_text()
    assert len(folders) == 4 and len(rows.splitlines()) == 4 * 2 + 2 * 2, "and the best of each choice of modules on the test split"
    assert run_figure2.main(run) == 0
    assert {p: p.stat().st_mtime_ns for p in folders} == folders and (place / "out" / "rows.jsonl").read_text() == rows
    assert is_png(place / "out" / "figure2.png") and "<svg" in (place / "out" / "figure2.svg").read_text()
    assert "| tiny mlp | 0 | valid-ood | validation | 2 |" in (place / "out" / "figure2.md").read_text()


def test_figure3_is_made_of_the_checkpoints_of_one_run(place):
    assert run_figure3.main(arguments(place, "--every", "2")) == 0
    [checkpoint] = (place / "out" / "checkpoints").iterdir()
    last = load_file(checkpoint / "training" / "checkpoints" / "tasks-000004.safetensors")
    whole = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(value, whole[name]) for name, value in last.items())
    text = (place / "out" / "figure3.md").read_text()
    assert [text.count(f"| tiny | {n} |") for n in (0, 2, 4)] == [2, 2, 2] and is_png(place / "out" / "figure3.png")
    rows = [json.loads(line) for line in (place / "out" / "rows.jsonl").read_text().splitlines()]
    assert len({row["hparams_sha256"] for row in rows}) == 3, "states of one run are told apart"


def test_figure3_needs_checkpoints_where_its_points_are(place, capsys):
    assert run_figure3.main(arguments(place, "--every", "3")) == 2
    assert "--every must divide --num-tasks, got 3 and 4" in capsys.readouterr().err


def test_figure4_takes_layers_by_depth(place):
    assert run_figure4.main(arguments(place, "--depths", "0,0.4,0.99")) == 0
    text = (place / "out" / "figure4.md").read_text()
    assert [f"| tiny | {layer} |" in text for layer in range(3)] == [True, True, True] and is_png(place / "out" / "figure4.png")


def test_a_plan_starts_nothing(place, capsys):
    assert run_figure2.main(arguments(place, "--layers", "0,1", "--module-choices", "mlp", "--plan", "--seconds-a-task", "30")) == 0
    printed = capsys.readouterr().out
    assert printed.count("about 2 min") == 2 and "about 4 min of meta-training are left" in printed
    assert not (place / "out" / "checkpoints").exists()
