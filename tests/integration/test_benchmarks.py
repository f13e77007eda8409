"""The smaller benchmark scripts on tiny models: what they compute, what they write, what they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import run_convergence
import run_dependent
import run_search
import run_speed
import speed_edit
import speed_parts
import tiny
import torch

from propmeta_edit.baselines.second_moments import collect_second_moments
from propmeta_edit.errors import ConfigError
from propmeta_edit.records import Case, EditRequest, Question

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def base(tmp_path, tokenizer):
    return tiny.save_model_folder(tmp_path / "base", tokenizer)


def test_grid_of_settings():
    grid = run_search.read_grid(["layers=[3],[5]", "v_lr=0.1,5e-1", "loss=mean"])
    assert grid == {"layers": [[3], [5]], "v_lr": [0.1, 0.5], "loss": ["mean"]}
    names = run_search.name_combinations("ROME", {"layers": [[3], [5]], "v_lr": [0.1, 0.5]})
    assert list(names)[1] == "ROME layers=[3] v_lr=0.5" and names["ROME layers=[5] v_lr=0.1"] == {"layers": [5], "v_lr": 0.1}
    assert list(run_search.name_combinations("ROME", {})) == ["ROME"]
    for bad in ("layers", "layers=", "layers=[3"):
        with pytest.raises(ConfigError, match="write settings as NAME=VALUE"):
            run_search.read_grid([bad])


def test_search_runs_every_combination_on_validation_and_ranks_them(base, tmp_path, capsys):
    arguments = ["FT", "layers=[0],[1]", "lr=0.01", "--model", str(base), "--hparams", "smollm2-135m", "--limit", "2"]
    arguments += ["--device", "cpu", "--dtype", "float32", "--output", str(tmp_path / "search")]
    assert run_search.main(arguments) == 0
    table = (tmp_path / "search" / "search.md").read_text()
    assert table in capsys.readouterr().out
    assert "valid-id: accuracy % (efficacy %)" in table and "valid-ood" in table
    assert table.count("| FT layers=[0] lr=0.01 |") == table.count("| FT layers=[1] lr=0.01 |") == 1
    assert len((tmp_path / "search" / "rows.jsonl").read_text().splitlines()) == 8
    assert run_search.main([*arguments[:1], "layers=", *arguments[3:]]) == 2


def test_ranking_puts_the_best_mean_first():
    rows = [
        {"method": name, "dataset": data, "accuracy": value, "efficacy": 1.0, "n": 4}
        for name, values in {"a": (0.2, 0.4), "b": (0.5, 0.3)}.items()
        for data, value in zip(("one", "two"), values, strict=True)
    ]
    lines = run_search.make_table(rows, ["one", "two"]).splitlines()
    assert lines[2] == "| b | 50.0 (100, n = 4) | 30.0 (100, n = 4) | 40.0 |" and lines[3].startswith("| a |")


def test_moments_are_compared_by_definition():
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(6, 6, generator=generator, dtype=torch.double)
    moment, keys = factor @ factor.T, torch.randn(6, 2, generator=generator, dtype=torch.double)
    same = run_convergence.compare_moments(moment, moment, keys, 2.0, 1.0)
    assert same["moment"] == 0 and same["update"] == 0 and same["null_space"] == pytest.approx(0, abs=1e-6)
    update = run_convergence.compute_update(moment, keys, 2.0)
    torch.testing.assert_close((2.0 * moment + keys @ keys.T) @ update, keys)
    double = run_convergence.compare_moments(2 * moment, moment, keys, 2.0, 1.0)
    assert double["moment"] == pytest.approx(1.0) and double["update"] > 0.1
    first, second = torch.diag(torch.tensor([0.0, 0.0, 9.0])), torch.diag(torch.tensor([0.0, 9.0, 0.0]))
    null = run_convergence.compare_moments(first, second, torch.eye(3, dtype=torch.double), 2.0, 1.0)["null_space"]
    assert null == pytest.approx(0.5), "of two directions one is shared"


def test_growing_numbers_of_texts_are_read_once(tokenizer):
    model = tiny.make_model("llama", dtype=torch.float32)
    texts = [f"Ann Lee {n} lives in Peru and speaks Spanish." for n in range(8)]
    found = run_convergence.gather(model, tokenizer, texts, [1], [2, 8])
    for moments, count in zip(found, (2, 8), strict=True):
        direct = collect_second_moments(model, tokenizer, texts[:count], [1], max_length=256)
        assert (moments.num_texts, moments.num_tokens) == (count, direct.num_tokens)
        for name, value in direct.sums.items():
            torch.testing.assert_close(moments.sums[name], value, rtol=1e-5, atol=1e-6)


def test_convergence_writes_a_table_and_a_picture(base, tmp_path):
    corpus = tmp_path / "texts.txt"
    corpus.write_text("\n\n".join(f"Ann Lee {n} lives in Peru and speaks Spanish, Greek or French." for n in range(40)))
    arguments = ["--model", str(base), "--layers", "0,1", "--corpus", str(corpus), "--num-texts", "16", "--steps", "2"]
    assert run_convergence.main([*arguments, "--threshold", "0.5", "--device", "cpu", "--output", str(tmp_path / "out")]) == 0
    table = pd.read_csv(tmp_path / "out" / "convergence.csv")
    assert sorted(set(table["texts"])) == [4, 8, 16] and len(table) == 6
    assert (tmp_path / "out" / "convergence.png").read_bytes()[:4] == b"\x89PNG"


@pytest.fixture
def cases(monkeypatch):
    found = []
    for n in range(12):
        edit = EditRequest(f"Ann Lee {n} lives in", "Peru")
        found.append(Case(str(n), (edit,), Question(f"What does Ann Lee {n} pay with?", ("sol",)), Question("Where?", ("Lima",))))
    monkeypatch.setattr(speed_parts, "read_cases", lambda number: found[:number])
    return found


def test_a_row_of_speed_is_on_disk_as_soon_as_it_is_measured(tmp_path):
    def measure():
        yield {"side": "engine", "seconds a task": 0.5}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_speed.keep(measure(), tmp_path)
    assert (tmp_path / "speed.csv").read_text() == "side,seconds a task\nengine,0.5\n"


def test_as_many_tasks_are_measured_as_run_side_by_side(capsys):
    with pytest.raises(SystemExit):
        run_speed.parse_arguments(["edit", "--at-once", "1,8", "--number", "4"])
    assert "--number must be at least the largest of --at-once (1,8), got 4" in capsys.readouterr().err


def test_speed_of_meta_training(base, tmp_path, cases):
    arguments = ["meta", "--models", str(base), "--at-once", "1,2", "--layers", "1", "--number", "2", "--repeats", "1"]
    assert run_speed.main([*arguments, "--device", "cpu", "--dtype", "float32", "--output", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert result["engine_vs_reference"] > 0 and result["engine_vs_reference_one_task"] > 0
    rows = result["rows"]
    sides = [("reference", 1), ("higher", 1), ("engine", 1), ("engine", 2)]
    assert [(row["side"], row["tasks a step"]) for row in rows[:4]] == sides
    assert all(row["share products"] + row["share optimiser"] + row["share other"] == pytest.approx(1) for row in rows)
    assert [row["tasks"] for row in result["growth"]] == [2, 4, 8]
    assert (tmp_path / "out" / "speed.md").read_text().count("\n| ") >= len(rows)


@pytest.mark.slow
@pytest.mark.easyedit
def test_speed_of_edits(tmp_path):
    """In a process of its own: EasyEdit's imports slow down whatever this one does afterwards."""
    arguments = ["edit", "--models", "tiny", "--at-once", "1,2", "--layers", "1", "--number", "2", "--repeats", "1"]
    arguments += ["--device", "cpu", "--output", str(tmp_path)]
    command = [sys.executable, str(ROOT / "benchmarks" / "run_speed.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "speed.json").read_text())
    assert result["single_vs_easyedit_ft"] > 0 and result["batched_vs_easyedit_ft"] > 0 and result["single_vs_floor"] > 0
    first = [(row["side"], row["at once"], row["steps"]) for row in result["rows"][:3]]
    assert first == [("EasyEdit FT", 1, 10), ("single", 1, 10), ("batched", 2, 10)]
    assert {row["steps"] for row in result["rows"]} == {5, 10, 20}


def test_floor_counts_bytes_and_operations(base, cases):
    setting = speed_edit.Setting(str(base), "cpu", "float32", 1, num_steps=2)
    model, tokenizer = setting.load()
    machine = {"bytes a second": 1.0, "operations a second": 1e30}
    floor = speed_edit.estimate_floor(model, tokenizer, setting, machine, 2)
    size = {name: p.numel() for name, p in model.named_parameters()}
    below = sum(n for name, n in size.items() if ".layers.0." in name)
    above = sum(n for name, n in size.items() if ".layers.1." in name or ".layers.2." in name or name == "model.norm.weight")
    trained = sum(n for name, n in size.items() if ".layers.1." in name and "norm" not in name)
    head = model.get_output_embeddings().weight.numel()
    assert floor["floor"] == floor["traffic seconds"] == 4 * below + 2 * (2 * 4 * above + 2 * 4 * head + 8 * 4 * trained)


def test_edits_that_stay(base, tmp_path, cases, monkeypatch):
    from propmeta_edit.evaluation.runner import DataSet

    monkeypatch.setattr(run_dependent, "load_dataset", lambda item, seed: DataSet("d", "x", cases))
    folder = tmp_path / "hparams"
    (folder / "FT").mkdir(parents=True)
    text = f"alg_name: MetaFT\nmodel_name: {base}\nlayers: [1]\nlr: 0.02\nnum_steps: 3\n"
    (folder / "FT" / "tiny.yaml").write_text(text)
    monkeypatch.setattr(run_dependent, "hparams_file", lambda method, name: folder / method / f"{name}.yaml")
    arguments = ["--hparams", "tiny", "--methods", "FT", "--counts", "1,4", "--device", "cpu", "--asked", "5"]
    assert run_dependent.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    table = pd.read_csv(tmp_path / "out" / "dependent.csv")
    assert list(zip(table["mode"], table["facts"], strict=True)) == [
        ("sequential", 1),
        ("sequential", 4),
        ("joint", 1),
        ("joint", 4),
    ]
    assert table["efficacy n"].tolist() == [1, 4, 1, 4] and table["locality n"].tolist() == [5] * 4
    assert (tmp_path / "out" / "dependent.png").read_bytes()[:4] == b"\x89PNG"

    with monkeypatch.context() as again:  # a second call finds every chain on disk
        again.setattr(run_dependent, "edit_and_ask", lambda *_: pytest.fail("a chain that is there ran again"))
        assert run_dependent.main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert pd.read_csv(tmp_path / "out" / "dependent.csv").equals(table)
    assert run_dependent.main([*arguments[:5], "50", "--output", str(tmp_path / "no")]) == 2
