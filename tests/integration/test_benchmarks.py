"""The smaller studies and the speed benchmarks on tiny models: what they compute, what they write, what they refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import tiny
import torch
from torch.autograd import DeviceType

from propmeta_edit.baselines.second_moments import collect_second_moments
from propmeta_edit.cli import main, read_arguments
from propmeta_edit.edits.identity import hash_tensors
from propmeta_edit.errors import ConfigError
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.options import WholeNumbers
from propmeta_edit.records import Case, EditRequest, Question
from propmeta_edit.speed import asking as speed_asking
from propmeta_edit.speed import edits as speed_edit
from propmeta_edit.speed import meta_training as speed_meta
from propmeta_edit.speed import parts as speed_parts
from propmeta_edit.speed import run as run_speed
from propmeta_edit.studies import convergence, dependent, report, search
from propmeta_edit.studies.dependent import ChainOptions
from propmeta_edit.studies.runs import hash_of_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def base(tmp_path, tokenizer):
    return tiny.save_model_folder(tmp_path / "base", tokenizer)


def test_grid_of_settings():
    grid = search.read_grid(["layers=[3],[5]", "v_lr=0.1,5e-1", "loss=mean"])
    assert grid == {"layers": [[3], [5]], "v_lr": [0.1, 0.5], "loss": ["mean"]}
    names = search.name_combinations("ROME", {"layers": [[3], [5]], "v_lr": [0.1, 0.5]})
    assert list(names)[1] == "ROME layers=[3] v_lr=0.5" and names["ROME layers=[5] v_lr=0.1"] == {"layers": [5], "v_lr": 0.1}
    assert list(search.name_combinations("ROME", {})) == ["ROME"]
    for bad in ("layers", "layers=", "layers=[3"):
        with pytest.raises(ConfigError, match="write settings as NAME=VALUE"):
            search.read_grid([bad])


def test_search_runs_every_combination_on_validation_and_ranks_them(base, tmp_path, capsys):
    arguments = ["FT", "layers=[0],[1]", "--model", str(base), "lr=0.01", "--hparams", "smollm2-135m", "--limit", "2"]
    arguments += ["--device", "cpu", "--dtype", "float32", "--output", str(tmp_path / "search")]
    assert main(["search", *arguments]) == 0
    table = (tmp_path / "search" / "search.md").read_text()
    assert table in capsys.readouterr().out
    assert "valid-id: accuracy % (efficacy %, net)" in table and "valid-ood" in table
    assert table.count("| FT layers=[0] lr=0.01 |") == table.count("| FT layers=[1] lr=0.01 |") == 1
    rows = [json.loads(line) for line in (tmp_path / "search" / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    settings = json.loads((tmp_path / "search" / "settings.json").read_text())
    assert {name: entry["hparams_sha256"] for name, entry in settings.items()} == {
        row["method"]: row["hparams_sha256"] for row in rows
    }
    kept = settings["FT layers=[1] lr=0.01"]["settings"]
    assert (kept["layers"], kept["limit"], kept["seed"], kept["datasets"]) == ([1], 2, 0, ["valid-id", "valid-ood"])
    assert kept["model_name"] == str(base) and kept["model_sha256"] == rows[0]["model_sha256"]
    assert rows[0]["versions"]["torch"] == torch.__version__
    assert main(["search", *arguments[:1], "layers=", *arguments[2:]]) == 2
    assert main(["search", *arguments, "--by", "leak"]) == 2
    refusal = capsys.readouterr().err
    assert "leak" in refusal and "accuracy, net" in refusal
    assert main(["search", *arguments, "--by", "net"]) == 0
    assert "| mean net |" in (tmp_path / "search" / "search.md").read_text(), "the same rows, ranked by something else"


def test_ranking_puts_the_best_mean_first():
    rows = [
        {"method": name, "dataset": data, "accuracy": value, "efficacy": 1.0, "net": value / 2, "n": 4}
        for name, values in {"a": (0.2, 0.4), "b": (0.5, 0.3)}.items()
        for data, value in zip(("one", "two"), values, strict=True)
    ]
    lines = search.make_table(rows, ["one", "two"], ["b", "a"], {"a": 0.3, "b": 0.4}).splitlines()
    assert lines[2] == "| b | 50.0 (100, 25.0, n = 4) | 30.0 (100, 15.0, n = 4) | 40.0 |" and lines[3].startswith("| a |")
    lines = search.make_table([{**rows[0], "net": None}], ["one", "two"], ["a"], {}).splitlines()
    assert lines[2] == "| a | 20.0 (100, –, n = 4) | – | – |", "not asked everything yet, so nothing decides"


def test_moments_are_compared_by_definition():
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(6, 6, generator=generator, dtype=torch.double)
    moment, keys = factor @ factor.T, torch.randn(6, 2, generator=generator, dtype=torch.double)
    same = convergence.compare_moments(moment, moment, keys, 2.0, 1.0)
    assert same["moment"] == 0 and same["update"] == 0 and same["null_space"] == pytest.approx(0, abs=1e-6)
    update = convergence.compute_update(moment, keys, 2.0)
    torch.testing.assert_close((2.0 * moment + keys @ keys.T) @ update, keys)
    double = convergence.compare_moments(2 * moment, moment, keys, 2.0, 1.0)
    assert double["moment"] == pytest.approx(1.0) and double["update"] > 0.1
    first, second = torch.diag(torch.tensor([0.0, 0.0, 9.0])), torch.diag(torch.tensor([0.0, 9.0, 0.0]))
    null = convergence.compare_moments(first, second, torch.eye(3, dtype=torch.double), 2.0, 1.0)["null_space"]
    assert null == pytest.approx(0.5), "of two directions one is shared"


def test_growing_numbers_of_texts_are_read_once(tokenizer):
    model = tiny.make_model("llama", dtype=torch.float32)
    texts = [f"Ann Lee {n} lives in Peru and speaks Spanish." for n in range(8)]
    found = convergence.gather(model, tokenizer, texts, [1], [2, 8])
    for moments, count in zip(found, (2, 8), strict=True):
        direct = collect_second_moments(model, tokenizer, texts[:count], [1], max_length=256)
        assert (moments.num_texts, moments.num_tokens) == (count, direct.num_tokens)
        for name, value in direct.sums.items():
            torch.testing.assert_close(moments.sums[name], value, rtol=1e-5, atol=1e-6)


def test_convergence_writes_a_table_and_a_picture(base, tmp_path):
    corpus = tmp_path / "texts.txt"
    corpus.write_text("\n\n".join(f"Ann Lee {n} lives in Peru and speaks Spanish, Greek or French." for n in range(40)))
    arguments = ["--model", str(base), "--layers", "0,1", "--corpus", str(corpus), "--num-texts", "16", "--steps", "2"]
    assert main(["convergence", *arguments, "--threshold", "0.5", "--device", "cpu", "--output", str(tmp_path / "out")]) == 0
    table = pd.read_csv(tmp_path / "out" / "convergence.csv")
    assert sorted(set(table["texts"])) == [4, 8, 16] and len(table) == 6
    assert (tmp_path / "out" / "convergence.png").read_bytes()[:4] == b"\x89PNG"
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())["convergence"]["settings"]
    assert [settings[name] for name in ("layers", "num_texts", "threshold")] == [[0, 1], 16, 0.5] and "torch" in settings[
        "versions"
    ]


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
        run_speed.keep(measure(), lambda rows: {"what": "meta", "measured": len(rows)}, tmp_path)
    assert (tmp_path / "speed.csv").read_text() == "side,seconds a task\nengine,0.5\n"
    rows = [{"side": "engine", "seconds a task": 0.5}]
    assert json.loads((tmp_path / "speed.json").read_text()) == {"what": "meta", "measured": 1, "rows": rows}


def out_of_memory(*arguments, **values):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 65 GiB")


def test_a_side_that_does_not_fit_is_left_out_of_the_rounds():
    calls = []
    seconds = iter([9.0, 2.0, 3.0, 2.5])
    times = speed_parts.measure({"large": out_of_memory, "small": lambda: calls.append(1) or next(seconds)}, 3)
    assert times == {"small": (9.0, 2.5)} and len(calls) == 4
    assert times["small"].once(4) == 26.0, "means over four: what the first four calls took more"

    def wrong():
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        speed_parts.measure({"wrong": wrong}, 1)


def test_asking_is_timed_either_way_on_the_same_cases(base, tmp_path, monkeypatch):
    seconds = {speed_asking.GENERATE: [], speed_asking.OURS: []}
    for name, side in (("time_generate", speed_asking.GENERATE), ("time_examiner", speed_asking.OURS)):
        real = getattr(speed_asking, name)
        monkeypatch.setattr(
            speed_asking, name, lambda *given, real=real, side=side: seconds[side].append(real(*given)) or 1.0 + len(side)
        )
    arguments = ["ask", "--models", str(base), "--at-once", "1", "--number", "3", "--repeats", "1", "--device", "cpu"]
    assert main(["speed", *arguments, "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "speed.json").read_text())
    assert [(row["side"], row["cases"], row["seconds a case"]) for row in result["rows"]] == [
        ("generate", 3, 9.0),
        ("one loop", 3, 9.0),
    ]
    assert result["one_loop_vs_generate"] == 1.0 and all(taken and min(taken) > 0 for taken in seconds.values())


@pytest.fixture
def quick_edits(cases, monkeypatch):
    """Edits that take a second of EasyEdit's FT, half of one singly and a quarter side by side; four of them do not fit."""

    def side_by_side(model, tokenizer, setting, number):
        return out_of_memory() if setting.at_once > 2 else 0.25

    timers = {speed_edit.EASYEDIT: lambda *_: 1.0, speed_edit.SINGLE: lambda *_: 0.5, speed_edit.BATCHED: side_by_side}
    monkeypatch.setattr(speed_edit, "TIMERS", timers)
    monkeypatch.setattr(speed_edit, "peak_memory", lambda run, device: 0.0)
    monkeypatch.setattr(speed_edit, "measure_machine", lambda *_: {"bytes a second": 1e9, "operations a second": 1e12})


def test_edits_that_do_not_fit_side_by_side_are_recorded(base, tmp_path, quick_edits, monkeypatch):
    monkeypatch.setattr(speed_parts, "free_unused", lambda: None)  # takes half a second beside all that the tests hold
    arguments = ["edit", "--models", str(base), "--at-once", "1,2,4", "--layers", "1", "--number", "4", "--repeats", "1"]
    assert main(["speed", *arguments, "--device", "cpu", "--dtype", "float32", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "speed.json").read_text())
    first = [(row["side"], row["at once"], row["seconds an edit"], row["note"]) for row in result["rows"][:6]]
    sides = [("EasyEdit FT", 1, 1.0, ""), ("single", 1, 0.5, "")]
    assert first == [*sides, ("batched", 4, None, "out of memory"), *sides, ("batched", 2, 0.25, "")]
    assert {row["steps"] for row in result["rows"]} == {5, 10, 20}, "it goes on after what does not fit"
    assert (result["single_vs_easyedit_ft"], result["batched_vs_easyedit_ft"], result["batched_at_once"]) == (2.0, 4.0, 2)
    assert "| out of memory |" in (tmp_path / "speed.md").read_text()
    settings = json.loads((tmp_path / "settings.json").read_text())["edit"]["settings"]
    assert (settings["at_once"], settings["repeats"], settings["dtype"]) == ([1, 2, 4], 1, "float32")


@pytest.mark.parametrize(("absent", "gone"), [("float32", ["EasyEdit FT"]), ("bfloat16", ["single", "batched"])])
def test_a_model_that_does_not_fit_is_recorded(base, quick_edits, monkeypatch, absent, gone):
    load = speed_edit.Setting.load
    monkeypatch.setattr(speed_parts, "free_unused", lambda: None)
    monkeypatch.setattr(speed_edit.Setting, "load", lambda own: out_of_memory() if own.dtype == absent else load(own))
    rows = list(speed_edit.compare([speed_edit.Setting(str(base), "cpu", "bfloat16", 1, at_once=2)], 2, 1))
    seconds = {"EasyEdit FT": 1.0, "single": 0.5, "batched": 0.25}
    assert [(row["side"], row["seconds an edit"], row["note"]) for row in rows] == [
        (side, None, "out of memory") if side in gone else (side, own, "") for side, own in seconds.items()
    ]
    found = speed_edit.summarise(rows)
    assert found["single_vs_easyedit_ft"] is None and (found["single_vs_floor"] is None) == ("single" in gone)


def test_easyedits_model_is_gone_when_edits_run_side_by_side(base, quick_edits, monkeypatch):
    models, before, alive = [], [], []
    load = speed_edit.Setting.load

    def those_alive():
        return [dtype for dtype, model in models if model() is not None]

    def note_load(setting):
        before.append(those_alive())
        model, tokenizer = load(setting)
        model.refers_to_itself = [model]  # as a model with hooks may: it is gone only when it is looked for
        models.append((setting.dtype, weakref.ref(model)))
        return model, tokenizer

    def side_by_side(*arguments):
        alive.append(those_alive())
        return 0.25

    monkeypatch.setattr(speed_edit.Setting, "load", note_load)
    monkeypatch.setitem(speed_edit.TIMERS, speed_edit.BATCHED, side_by_side)
    settings = [speed_edit.Setting(str(base), "cpu", "bfloat16", 1, at_once=size) for size in (2, 1)]
    rows = list(speed_edit.compare(settings, 2, 1))
    assert [row["frozen dtype"] for row in rows] == ["float32", "bfloat16", "bfloat16"] * 2
    assert before == [[], ["bfloat16"]] * 2, "and each setting's when the next one's are loaded"
    assert len(models) == 4 and alive and all(dtypes == ["bfloat16"] for dtypes in alive)
    assert [row["times EasyEdit FT"] for row in rows] == [1.0, 2.0, 4.0] * 2
    assert [row["seconds to the CPU"] is not None for row in rows] == [False, False, True] * 2


def test_edits_side_by_side_are_timed_without_copying_them_to_the_cpu(base, cases, monkeypatch):
    setting = speed_edit.Setting(str(base), "cpu", "float32", 1, num_steps=1, at_once=2)
    model, tokenizer = setting.load()
    asked = []
    monkeypatch.setattr(speed_edit, "edit_many", lambda *_, **values: asked.append(values))
    assert speed_edit.time_batched(model, tokenizer, setting, 4) > 0
    assert asked == [{"keep_on_device": True}] * 2 and speed_edit.time_transfer(model, setting) > 0


def test_meta_training_that_does_not_fit_is_recorded(base, tmp_path, cases, monkeypatch):
    """A library that copies the model, several tasks at once, and a plan whose model cannot be loaded: each has its row."""
    step, load = speed_meta.Side._step, speed_meta.Side.load

    def fail(side, *arguments):
        return out_of_memory() if side.kind == speed_meta.HIGHER or side.config.tasks_per_step > 1 else step(side, *arguments)

    def load_some(side):
        return out_of_memory() if side.config.modules == "mlp" else load(side)

    monkeypatch.setattr(speed_meta.Side, "_step", fail)
    monkeypatch.setattr(speed_meta.Side, "load", load_some)
    monkeypatch.setattr(speed_parts, "free_unused", lambda: None)
    monkeypatch.setattr(speed_meta, "peak_memory", lambda run, device: 0.5)
    monkeypatch.setattr(speed_parts, "share_of_time", lambda run, device: {"share products": 1.0})
    arguments = ["meta", "--models", str(base), "--at-once", "1,2", "--layers", "1", "--number", "2", "--repeats", "1"]
    assert main(["speed", *arguments, "--device", "cpu", "--dtype", "float32", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "speed.json").read_text())
    rows = {(row["side"], row["modules"], row["tasks a step"]): row for row in result["rows"]}
    assert {key for key, row in rows.items() if row["note"] == ""} == {
        ("reference", "attention+mlp", 1), ("engine", "attention+mlp", 1), ("reference", "attention", 1)
    }  # fmt: skip
    assert all(row["seconds a task"] is None for row in rows.values() if row["note"])
    assert len(rows) == 10 and result["engine_vs_reference"] == result["engine_vs_reference_one_task"] > 0
    assert result["growth"] == [{"tasks": 2 * n, "seconds": None, "peak GiB added": None} for n in (1, 2, 4)]


def test_a_run_that_memory_ends_leaves_no_gradients(base, cases, monkeypatch):
    config = MetaTrainConfig(model=str(base), layers=[1], inner_lr=1e-3, outer_lr=1e-4, num_inner_steps=1)
    side = speed_meta.Side(speed_meta.REFERENCE, str(base), "cpu", config)
    model, tokenizer = side.load()
    monkeypatch.setattr(speed_meta.reference, "outer_step", out_of_memory)
    step = speed_meta._PLAIN_LOOPS[speed_meta.REFERENCE]

    def leave_gradients(model, tokenizer, parameters, *arguments):
        gradients, loss = step(model, tokenizer, parameters, *arguments)
        for parameter, gradient in zip(parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        return gradients, loss

    monkeypatch.setitem(speed_meta._PLAIN_LOOPS, speed_meta.REFERENCE, leave_gradients)
    with pytest.raises(torch.OutOfMemoryError):
        side.run(model, tokenizer, speed_meta.read_tasks(1))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_on_a_gpu_every_kernel_counts_once():
    """Events as the profiler gives them: operators with their kernels' time, and the kernels and annotations once more."""

    def event(key, on_device, device_type=DeviceType.CPU, is_user_annotation=False, on_cpu=1.0):
        return SimpleNamespace(
            key=key,
            self_device_time_total=on_device,
            self_cpu_time_total=on_cpu,
            device_type=device_type,
            is_user_annotation=is_user_annotation,
        )

    cuda = DeviceType.CUDA
    events = [
        event("aten::mm", 60.0),
        event("aten::_fused_adamw_", 30.0),
        event("aten::add", 10.0),
        event("Optimizer.step#AdamW.step", 30.0, is_user_annotation=True),
        event("sm90_xmma_gemm_f32", 60.0, cuda),
        event("multi_tensor_apply_kernel<fused adamw>", 30.0, cuda),
        event("vectorized_elementwise_kernel", 10.0, cuda),
        event("Optimizer.step#AdamW.step", 31.0, cuda, is_user_annotation=True),
    ]
    expected = {"share products": 0.6, "share optimiser": 0.3, "share other": 0.1}
    assert speed_parts.add_shares(events, on_cuda=True) == pytest.approx(expected)
    assert speed_parts.add_shares(events[:3], on_cuda=False) == pytest.approx(dict.fromkeys(expected, 1 / 3))


def test_as_many_tasks_are_measured_as_run_side_by_side(capsys):
    assert main(["speed", "edit", "--at-once", "1,8", "--number", "4"]) == 2
    assert "--number must be at least the largest of --at-once (1,8), got 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "option", "value", "message"),
    [
        ("dependent", "--counts", "x", "--counts: whole numbers are wanted, separated by commas, got 'x'"),
        ("dependent", "--counts", "0,1", "--counts must be 1 or more, got 0"),
        ("dependent", "--counts", "1,", "--counts: whole numbers are wanted, separated by commas, got ''"),
        ("dependent", "--counts", ",", "--counts: at least one value is wanted, got ','"),
        ("dependent", "--asked", "0", "--asked must be 1 or more, got 0"),
        ("dependent", "--batch-size", "0", "--batch-size must be 1 or more, got 0"),
        ("speed edit", "--at-once", "0", "--at-once must be 1 or more, got 0"),
        ("speed edit", "--at-once=-1", "", "--at-once must be 1 or more, got -1"),
        ("speed edit", "--at-once", "1,x", "--at-once: whole numbers are wanted, separated by commas, got 'x'"),
        ("speed edit", "--number", "0", "--number must be 1 or more, got 0"),
        ("speed edit", "--number", "1.5", "--number: Expected a int"),
        ("speed edit", "--repeats", "0", "--repeats must be 1 or more, got 0"),
    ],
)
def test_numbers_that_nothing_can_be_done_with_are_refused(verb, option, value, message, capsys):
    assert main([*verb.split(), option, *([value] if value else [])]) == 2
    assert message in capsys.readouterr().err


def test_a_layer_may_be_the_first(capsys):
    _, values = read_arguments(["speed", "edit", "--layers", "0, 3"])
    assert values["options"].layers == [0, 3]
    assert main(["speed", "edit", "--layers=-1"]) == 2
    assert "--layers must be 0 or more, got -1" in capsys.readouterr().err


def test_names_of_chains_are_those_there_are(capsys):
    _, values = read_arguments(["dependent", "--modes", "sequential, joint", "--methods", "FT ,MetaFT,FT", "--counts", "10,1,10"])
    options = values["options"]
    assert (options.modes, options.methods, options.counts) == (["sequential", "joint"], ["FT", "MetaFT"], [10, 1])
    for option, value, known in (("--modes", "Joint", "sequential, joint"), ("--methods", "FT,ROME", "MetaFT, FT, MetaFT-bound")):
        assert main(["dependent", option, value]) == 2
        assert f"{option} takes {known}, got {value.split(',')[-1]}" in capsys.readouterr().err


def test_speed_of_meta_training(base, tmp_path, cases):
    arguments = ["meta", "--models", str(base), "--at-once", "1,2", "--layers", "1", "--number", "2", "--repeats", "1"]
    assert main(["speed", *arguments, "--device", "cpu", "--dtype", "float32", "--output", str(tmp_path / "out")]) == 0
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

    monkeypatch.setattr(dependent, "load_dataset", lambda item, seed: DataSet("d", "x", cases))
    folder = tmp_path / "hparams"
    (folder / "FT").mkdir(parents=True)
    text = f"alg_name: MetaFT\nmodel_name: {base}\nlayers: [1]\nlr: 0.02\nnum_steps: 3\n"
    (folder / "FT" / "tiny.yaml").write_text(text)
    monkeypatch.setattr(dependent, "hparams_file", lambda method, name: folder / method / f"{name}.yaml")
    arguments = ["--hparams", "tiny", "--methods", "FT", "--counts", "1,4", "--device", "cpu", "--asked", "5"]
    assert main(["dependent", *arguments, "--output", str(tmp_path / "out")]) == 0
    table = pd.read_csv(tmp_path / "out" / "dependent.csv")
    assert list(zip(table["mode"], table["facts"], strict=True)) == [
        ("sequential", 1),
        ("sequential", 4),
        ("joint", 1),
        ("joint", 4),
    ]
    assert table["efficacy n"].tolist() == [1, 4, 1, 4] and table["locality n"].tolist() == [5] * 4
    assert table["first ten n"].tolist() == [1, 4, 1, 4] and table["first ten"].equals(table["efficacy"]), "no more than ten"
    assert (tmp_path / "out" / "dependent.png").read_bytes()[:4] == b"\x89PNG"
    kept = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert set(kept) == {path.stem for path in (tmp_path / "out").glob("FT-*.csv")}
    sequential, joint = (entry["settings"] for entry in kept.values())
    assert (sequential["counts"], sequential["asked"], sequential["layers"]) == ([1, 4], 5, [1])
    assert "batch_size" not in sequential and joint["batch_size"] == 8, "one by one, as the YAML has it"
    assert sequential["model_sha256"] == hash_of_model(str(base)) and sequential["versions"]["torch"] == torch.__version__
    page = report.read_folder(tmp_path / "out")[0]
    assert "`counts: [1, 4]`" in page and "### dependent" in page and page.count("| FT | joint | 4 |") == 1

    with monkeypatch.context() as stopped:
        order = []
        stopped.setattr(dependent, "peak_memory", lambda run, device: order.append("asked for") or 0.0)
        stopped.setattr(dependent, "wait_for", lambda device: order.append("done"))
        stopped.setattr(dependent, "time", SimpleNamespace(perf_counter=lambda: order.append("clock") or 0.0))
        options = ChainOptions("tiny", counts=WholeNumbers((1,)), asked=5, device="cpu")
        [chain], asked = dependent.choose_cases(cases, options)
        dependent.edit_and_ask(dependent.load_editor("FT", options), "joint", chain, asked, options)
        assert order == ["clock", "asked for", "done", "clock"]

    with monkeypatch.context() as again:  # a second call finds every chain on disk
        again.setattr(dependent, "edit_and_ask", lambda *_: pytest.fail("a chain that is there ran again"))
        assert main(["dependent", *arguments, "--output", str(tmp_path / "out")]) == 0
    assert pd.read_csv(tmp_path / "out" / "dependent.csv").equals(table)
    assert main(["dependent", *arguments[:5], "50", "--output", str(tmp_path / "no")]) == 2


def test_the_table_of_chains_is_of_all_that_fit(base, tmp_path, cases, monkeypatch):
    """Each command adds its chains; those of other counts stay out, and so do those whose model is not here to tell."""
    models = {"FT": str(base), "MetaFT": str(base)}

    def chain(method, mode, cases, kept, options):
        row = {"method": method, "mode": mode, "seconds": 1.0, "peak GiB added": 0.0}
        shares = {f"{measure}{bound}": 0.5 for measure in dependent.MEASURES for bound in ("", " low", " high")}
        return [{**row, "facts": count, **shares} for count in options.counts]

    def asked(*more):
        assert main(["dependent", "--hparams", "tiny", "--device", "cpu", "--output", str(tmp_path), *more]) == 0
        table = pd.read_csv(tmp_path / "dependent.csv")
        return list(zip(table["method"], table["mode"], table["facts"], strict=True))

    monkeypatch.setattr(dependent, "edit_and_ask", chain)
    monkeypatch.setattr(dependent, "load_editor", lambda method, options: method)
    monkeypatch.setattr(dependent, "read_cases", lambda items, seed: cases)
    monkeypatch.setattr(dependent, "has_hparams", lambda method, name: True)
    monkeypatch.setattr(dependent, "hparams_file", lambda method, name: method)
    monkeypatch.setattr(dependent, "read_yaml", lambda method: {"model_name": models[method]})
    first, second = ("--methods", "FT", "--modes", "joint"), ("--methods", "MetaFT", "--modes", "sequential")
    assert asked(*first, "--counts", "2") == [("FT", "joint", 2)]
    both = [("MetaFT", "sequential", 2), ("FT", "joint", 2)]
    assert asked(*second, "--counts", "2") == asked(*first, "--counts", "2") == both
    assert asked(*first, "--counts", "3") == [("FT", "joint", 3)]
    assert asked(*first, "--counts", "2", "--asked", "7") == [("FT", "joint", 2)], "asked about others"
    models["MetaFT"] = str(tmp_path / "gone")
    assert asked(*first, "--counts", "2") == [("FT", "joint", 2)]


def test_several_chains_are_of_other_facts_and_go_on(base, tmp_path, cases, monkeypatch, capsys):
    """Means over chains; a stopped call goes on, more chains ask what fewer did, and each begins on the unedited model."""
    monkeypatch.setattr(dependent, "read_cases", lambda items, seed: cases)
    (tmp_path / "FT.yaml").write_text(f"alg_name: MetaFT\nmodel_name: {base}\nlayers: [1]\nlr: 0.02\nnum_steps: 3\n")
    monkeypatch.setattr(dependent, "hparams_file", lambda method, name: tmp_path / f"{method}.yaml")
    written, begun_on, run = [], [], dependent.edit_and_ask

    def chain(editor, mode, own, kept, options):
        written.append([case.case_id for case in own])
        begun_on.append(hash_tensors(dict(editor.model.named_parameters())))
        if len(written) == 2:
            raise KeyboardInterrupt
        return run(editor, mode, own, kept, options)

    def ask(chains, *more):
        arguments = ["--hparams", "tiny", "--methods", "FT", "--modes", "sequential", "--counts", "1,2", "--asked", "3"]
        return main(["dependent", *arguments, "--chains", str(chains), "--device", "cpu", "--output", str(tmp_path / "out"), *more])

    monkeypatch.setattr(dependent, "edit_and_ask", chain)
    assert ask(2) != 0, "stopped in the second"
    assert ask(2, "--plan") == 0 and "FT, sequential: 2 of 2 facts, 1 done; about 0 min" in capsys.readouterr().out
    assert ask(2) == ask(3) == 0
    assert written == [[case.case_id for case in cases[2 * n : 2 * n + 2]] for n in (0, 1, 1, 2)]
    assert len(set(begun_on)) == 1
    [file] = (tmp_path / "out").glob("FT-sequential-*.csv")
    rows, table = pd.read_csv(file), pd.read_csv(tmp_path / "out" / "dependent.csv")
    assert rows["chain"].tolist() == [0, 0, 1, 1, 2, 2] and table["chains"].tolist() == [3, 3]
    after_two = rows[rows["facts"] == 2]
    for name in dependent.ASKED:
        low, mean, high = (table[f"{name}{bound}"][1] for bound in (" low", "", " high"))
        assert low <= mean <= high and mean == pytest.approx(after_two[name].mean())
    assert ask(len(cases)) == 2 and "lower --chains, --counts or --asked" in capsys.readouterr().err
    assert ask(1, "--lr", "0.5") == 0 and len(written) == 5, "chains at another rate are others"
    rates = [made["settings"]["lr"] for made in json.loads((tmp_path / "out" / "settings.json").read_text()).values()]
    assert sorted(rates) == [0.02, 0.5]
