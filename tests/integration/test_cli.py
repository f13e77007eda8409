"""The commands as a user types them, on tiny models: exit codes, messages, files."""

from __future__ import annotations

import inspect
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import tiny
import torch
import transformers
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import propmeta_edit
from propmeta_edit import cli
from propmeta_edit.cli import VERBS, main, make_parser, read_arguments
from propmeta_edit.edits.edit import Edit, edit_from_weights
from propmeta_edit.errors import ConfigError, DataError
from propmeta_edit.finetune import learning
from propmeta_edit.finetune.input_moments import InputMoments, write_input_moments
from propmeta_edit.metatrain import trainer
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.models.loading import load_model
from propmeta_edit.recipes import data_sets, edit_facts
from propmeta_edit.recipes.edit_facts import name_columns, read_hparams, read_requests
from propmeta_edit.recipes.statistics import OPENINGS, SAMPLED_SHARE, ensure_statistics, make_statistics, sample_corpus
from propmeta_edit.records import EditRequest
from propmeta_edit.studies import ability as studies_ability
from propmeta_edit.studies import runs, variants
from propmeta_edit.studies.methods import METHODS
from propmeta_edit.studies.variants import Bench
from propmeta_edit.text.prompts import first_line

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def base(tmp_path, tokenizer):
    """A tiny model folder and a small CRE train file."""
    tiny.write_records(tmp_path / "train.jsonl", tiny.world_records("train_data_id", 6))
    return tiny.save_model_folder(tmp_path / "base", tokenizer)


def meta_train(base, tmp_path, *more):
    data = ["--model", str(base), "--data", str(tmp_path / "train.jsonl"), "--output", str(tmp_path / "out")]
    rates = ["--layers", "[1]", "--inner_lr", "0.01", "--num_inner_steps", "2", "--outer_lr", "0.01", "--device", "cpu"]
    return main(["meta-train", *data, *rates, *more])


def test_meta_train_writes_an_ordinary_model_folder(base, tmp_path):
    assert meta_train(base, tmp_path) == 0
    out = tmp_path / "out"
    card = json.loads((out / "metaft.json").read_text())
    assert card["num_tasks"] == 6 and card["settings"]["inner_lr"] == 0.01 and card["base_model"] == str(base)
    assert len(json.loads((out / "progress.json").read_text())["losses"]) == 6
    assert (out / "training" / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    assert "training 7 tensors" in (out / "training" / "log.txt").read_text()
    assert not (tmp_path / "out.training").exists() and not list(out.rglob("state*"))
    assert f"# {base}, meta-tuned" in (out / "README.md").read_text()
    before, after = (load_model(str(folder))[0] for folder in (base, out))
    trained = set(select_parameters(before, [1]))
    assert set(card["trained_tensors"]) == trained
    for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(a, b) == (name not in trained), name


def test_half_precision_training_stores_the_base_as_it_was(base, tmp_path):
    """The frozen rest is rounded while training only; every frozen tensor on disk has the base's bits."""
    assert meta_train(base, tmp_path, "--dtype", "bfloat16") == 0
    before, after = (load_model(str(folder))[0] for folder in (base, tmp_path / "out"))
    trained = set(select_parameters(before, [1]))
    for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(a, b) == (name not in trained), name


def test_same_seed_same_bits(base, tmp_path):
    hashes = []
    for name in ("a", "b"):
        assert meta_train(base, tmp_path, "--output", str(tmp_path / name)) == 0
        hashes.append(json.loads((tmp_path / name / "metaft.json").read_text())["model_sha256"])
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "smollm9"], "unknown model 'smollm9'"),
        (["--layers", "[7]"], "layer 7 is outside the model: it has layers 0 to 2"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--num_tasks", "100"], "num_tasks is 100, but the data has 6 tasks"),
        (["--modules", "norms"], "modules must be one of attention, mlp, attention+mlp, got 'norms'"),
        (["--template", "chat"], "template must be one of qa, bare, got 'chat'"),
        (["--inner_lr", "-1"], "must be 0 or more, got -1"),
        (["--device", "abacus"], "got 'abacus'"),
        (["--tracker", "abacus"], "tracker must be one of"),
        (["--inner-step", "newton"], "newton"),
    ],
)
def test_what_the_user_can_mend_exits_with_2_and_leaves_nothing(base, tmp_path, capsys, arguments, message):
    assert meta_train(base, tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
    assert meta_train(base, tmp_path) == 0, "the corrected command"


@pytest.mark.parametrize("name", ["tasks_per_step", "tasks_at_once", "save_every", "validate_every", "checkpoint_every"])
def test_counts_must_be_one_or_more(base, tmp_path, capsys, name):
    assert meta_train(base, tmp_path, f"--{name}", "0") == 2
    assert f"{name} must be 1 or more" in capsys.readouterr().err


def test_a_dry_run_says_what_it_would_cost_and_writes_nothing(base, tmp_path, capsys):
    assert meta_train(base, tmp_path, "--dry-run", "--tasks_per_step", "2") == 0
    text = capsys.readouterr().out
    assert "6, 2 a step, 2 at once, K = 2" in text and "GiB with all optimiser states" in text and "s a task" in text
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.training").exists()


def test_facts_that_are_not_learnt_are_told_before_during_and_after(base, tmp_path, capsys, caplog):
    assert meta_train(base, tmp_path, "--dry-run", "--inner-lr", "1e-6") == 0
    said = capsys.readouterr().out
    assert "learning   of 3 tasks: target loss" in said and "choose-rate finds a rate" in said
    assert meta_train(base, tmp_path, "--inner-lr", "1e-6") == 0
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 2 and "of the first 6 tasks: target loss" in told[0] and "over the last 6 tasks" in told[1]
    assert all("raise the inner rate" in text for text in told)
    assert "raise the inner rate" in (tmp_path / "out" / "training" / "log.txt").read_text()
    caplog.clear()
    assert main(["edit", "Ann Lee lives in", "Peru", "--model", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert "target loss" in capsys.readouterr().out
    assert "this edit was not learnt (Ann Lee lives in -> Peru: target loss" in caplog.text


@pytest.fixture
def easily_content(monkeypatch):
    """A random model of 16 dimensions cannot come near to certainty."""
    monkeypatch.setattr(learning, "NOT_LEARNT", 5.0)


def test_a_run_whose_facts_are_learnt_says_so_and_no_more(base, tmp_path, capsys, caplog, easily_content):
    steps = ["--inner-lr", "0.1", "--num-inner-steps", "10", "--outer-lr", "1e-6"]
    assert meta_train(base, tmp_path, "--dry-run", *steps) == 0
    said = capsys.readouterr().out
    assert "at the last of 10 steps" in said and "choose-rate" not in said
    assert meta_train(base, tmp_path, *steps) == 0
    assert "of the first 6 tasks: target loss" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_choose_rate_finds_the_lowest_rate_that_writes_every_fact(base, tmp_path, capsys, easily_content):
    options = ["--model", str(base), "--data", str(tmp_path / "train.jsonl"), "--layers", "[1]", "--device", "cpu"]
    assert main(["choose-rate", *options, "--rates", "0.1,1e-6,0.2", "--num-facts", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shares = {tuple(line.split()[:2]) for line in lines[1:4]}
    assert shares == {("1e-06", "0"), ("0.1", "3"), ("0.2", "3")} and lines[1].startswith("1e-06")
    assert lines[4].startswith("chosen: 0.1; go on with: propmeta-edit meta-train ... --inner-lr 0.1")
    assert main(["choose-rate", *options, "--rates", "1e-6", "--num-facts", "3"]) == 1
    assert "no rate writes every fact: try higher ones (--rates " in capsys.readouterr().out
    assert main(["choose-rate", *options, "--num-inner-steps", "1"]) == 2
    assert "num_inner_steps of 2 or more, got 1" in capsys.readouterr().err


def test_ones_own_model_in_four_commands_and_on_to_a_report(tmp_path, tokenizer, capsys, monkeypatch):
    """The commands as they stand on their page, on a model and files of those names; each says the next one."""
    monkeypatch.chdir(tmp_path)
    tiny.save_model_folder(tmp_path / "my" / "llama", tokenizer)
    tiny.write_records(tmp_path / "train.jsonl", tiny.world_records("train_data_id", 6))
    tiny.write_records(tmp_path / "test.jsonl", tiny.world_records("test_data_ood", 6))
    blocks = (ROOT / "docs" / "own_model.md").read_text(encoding="utf-8").split("```bash")[1:3]
    lines = [line for block in blocks for line in block.split("```")[0].replace("\\\n", "").strip().splitlines()]
    check, dry_run, run, edit, plan, table, report = (shlex.split(line, comments=True)[1:] for line in lines)
    assert main(check) == 0 and "CRE, 6 records" in capsys.readouterr().out
    assert main([*dry_run, "--dtype", "bfloat16"]) == 0 and not (tmp_path / "llama-metaft").exists()
    said = capsys.readouterr().out
    assert "bfloat16" in said and "layers [0]" in said and "target loss" in said
    assert main([*run, "--dtype", "bfloat16"]) == 0
    assert 'propmeta-edit edit "Ann Lee lives in" "Peru" --model llama-metaft' in capsys.readouterr().out
    assert main(edit) == 0
    assert 'propmeta-edit ask "..." --edit ann-lee' in capsys.readouterr().out
    assert main(plan) == 0 and not (tmp_path / "results" / "table2" / "rows.jsonl").exists()
    assert main(table) == 0
    assert "propmeta-edit report results/table2" in capsys.readouterr().out
    assert main(report) == 0
    assert "‡" in (tmp_path / "results" / "table2" / "table.md").read_text(encoding="utf-8"), "a random model writes no fact"
    assert list((tmp_path / "results").rglob("*.html"))


def test_validation_and_checkpoints_on_a_schedule(base, tmp_path):
    tiny.write_records(tmp_path / "train.jsonl", tiny.world_records("train_data_id", 300))
    schedule = ["--num_tasks", "6", "--validate_every", "2", "--validation_cases", "4", "--checkpoint_every", "3"]
    assert meta_train(base, tmp_path, *schedule) == 0
    progress = json.loads((tmp_path / "out" / "progress.json").read_text())
    assert [entry["num_tasks"] for entry in progress["validation"]] == [0, 2, 4, 6]
    splits, further = ("valid-id", "valid-ood"), (" leak", " net")  # these where any two cases of a split ask alike
    names = {"num_tasks", *splits, *(split + one for split in splits for one in further)}
    assert all({"num_tasks", *splits} <= set(entry) <= names for entry in progress["validation"])
    assert any("valid-id net" in entry or "valid-ood net" in entry for entry in progress["validation"])
    assert "after 4 tasks: valid-id" in (tmp_path / "out" / "training" / "log.txt").read_text()
    kept = sorted((tmp_path / "out" / "training" / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["tasks-000003.safetensors", "tasks-000006.safetensors"]
    tensors, final = load_file(kept[1]), load_model(str(tmp_path / "out"))[0]
    assert all(torch.equal(dict(final.named_parameters())[name], value) for name, value in tensors.items())


def test_an_unfinished_run_with_other_settings_is_not_continued(base, tmp_path, capsys):
    (tmp_path / "out.training").mkdir()
    (tmp_path / "out.training" / "settings.json").write_text(json.dumps({"outer_lr": 0.5}))
    assert meta_train(base, tmp_path) == 2
    assert "outer_lr 0.5, now 0.01" in capsys.readouterr().err


def test_a_broken_line_is_named(base, tmp_path, capsys):
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join([*lines[:3], lines[3][:-20], *lines[4:]]))
    assert meta_train(base, tmp_path) == 2
    assert "train.jsonl, line 4" in capsys.readouterr().err


def test_output_has_a_default(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = ["--model", str(base), "--data", str(tmp_path / "train.jsonl"), "--num_tasks", "1"]
    assert main(["meta-train", *data, "--layers", "[1]", "--device", "cpu"]) == 0
    assert (tmp_path / "checkpoints" / "base-metaft" / "metaft.json").is_file()
    assert "wrote checkpoints/base-metaft" in capsys.readouterr().out


def test_existing_output_is_not_touched(base, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert meta_train(base, tmp_path) == 2
    assert "exists; choose another --output" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def make_adapter(base, tmp_path):
    config = LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    folder = tmp_path / "adapter"
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / file, folder / file)
    return folder


def make_base_with_adapter(base, tmp_path):
    """What transformers loads as both at once."""
    folder = make_adapter(base, tmp_path)
    shutil.copytree(base, folder, dirs_exist_ok=True)
    return folder


def make_quantised(base, tmp_path, file="config.json"):
    config = json.loads((base / "config.json").read_text())
    values = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    content = {**config, "quantization_config": values} if file == "config.json" else values
    (base / file).write_text(json.dumps(content))
    return base


QUANTISED = {
    "bitsandbytes": ("config.json", "is quantised (quantization_config in config.json)"),
    "gptq": ("quantize_config.json", "is quantised (quantize_config.json)"),
    "awq": ("quant_config.json", "is quantised (quant_config.json)"),
}


@pytest.mark.parametrize("verb", ["meta-train", "edit", "export", "statistics"])
@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_folders_are_refused(base, tmp_path, capsys, kind, verb):
    file, message = QUANTISED[kind]
    folder, output = make_quantised(base, tmp_path, file), str(tmp_path / "out")
    commands = {
        "meta-train": ["--model", str(folder), "--data", str(tmp_path / "train.jsonl"), "--output", output],
        "edit": ["Ann lives in", "Peru", "--model", str(folder), "--save", output],
        "export": [str(folder), "--output", output],
        "statistics": [str(folder), "--layers", "[1]", "--corpus", "sampled", "--output", output],
    }
    assert main([verb, *commands[verb]]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and said.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.training").exists()


@pytest.mark.parametrize("make", [make_adapter, make_base_with_adapter])
def test_meta_training_of_an_adapter_is_refused_before_anything_is_written(base, tmp_path, capsys, make):
    folder = make(base, tmp_path)
    assert meta_train(folder, tmp_path) == 2
    said = capsys.readouterr().err.strip()
    assert "merge_and_unload" in said and said.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.training").exists()


@pytest.mark.parametrize("make", [make_adapter, make_base_with_adapter])
def test_an_adapters_folder_is_loaded_as_the_model_that_it_makes(base, tmp_path, make):
    loaded, _ = load_model(str(make(base, tmp_path)), layers=[1])
    plain, _ = load_model(str(base), layers=[1])
    merged = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload()
    expected = dict(merged.named_parameters())
    assert {name for name, _ in loaded.named_parameters()} == set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in loaded.named_parameters())
    loaded.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").is_file() and not (tmp_path / "merged" / "adapter_config.json").exists()


@pytest.mark.parametrize("damage", ["the base's", "rounded", "missing"])
def test_what_was_saved_is_read_back(base, tmp_path, capsys, monkeypatch, damage):
    save = transformers.PreTrainedModel.save_pretrained

    def saves_another(model, folder, **kwargs):
        save(model, folder, **kwargs)
        tensors = load_file(Path(folder) / "model.safetensors")
        name = "model.layers.1.mlp.up_proj.weight"
        if damage == "missing":
            del tensors[name]
        else:
            stored = load_file(base / "model.safetensors")[name]
            tensors[name] = stored if damage == "the base's" else tensors[name].bfloat16()
        save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", saves_another)
    assert meta_train(base, tmp_path) == 2
    said = capsys.readouterr().err
    assert ("are not in the safetensors files" if damage == "missing" else "is not the tensor that was trained") in said
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert meta_train(base, tmp_path) == 0, "what was trained is still there"


def test_full_disk_leaves_nothing(base, tmp_path, capsys, monkeypatch):
    def no_space(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", no_space)
    assert meta_train(base, tmp_path) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out.partial*"))


def test_a_loss_that_is_not_finite_names_the_task(base, tmp_path, capsys):
    assert meta_train(base, tmp_path, "--inner_lr", "1e30") == 2
    error = capsys.readouterr().err
    assert "task cre-" in error and "lower inner_lr" in error


def teach(base, tmp_path, *more):
    data = [
        "--data",
        f"{tmp_path / 'train.jsonl'},{tmp_path / 'mquake.json'}",
        "--output",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    return main(["teach", str(base), *data, "--num-epochs", "1", "--rank", "4", *more])


@pytest.fixture
def mquake(tmp_path):
    """Three MQuAKE cases, as a file beside the others."""
    return tiny.write_mquake(tmp_path / "mquake.json", tiny.mquake_cases(3))


def test_teach_writes_a_model_that_is_a_base_everywhere(base, mquake, tmp_path, capsys):
    assert teach(base, tmp_path) == 0
    said, card = capsys.readouterr().out, json.loads((tmp_path / "out" / "teaching.json").read_text())
    assert "mquake.json: MQuAKE" in said and "| mquake.json | old multi-hop (not taught) | 3 |" in said and "wrote" in said
    assert card["made_from"]["settings"]["rank"] == 4 and card["made_from"]["settings"]["learning_rate"] == 2e-3
    assert teach(base, tmp_path) == 0, "finished: nothing is done again"
    assert teach(base, tmp_path, "--rank", "8") == 2
    assert "out: holds a taught model made from something else" in capsys.readouterr().err
    assert meta_train(tmp_path / "out", tmp_path, "--output", str(tmp_path / "tuned")) == 0
    assert json.loads((tmp_path / "tuned" / "metaft.json").read_text())["base_model"] == str(tmp_path / "out")


def test_a_dry_run_of_teaching_says_what_it_takes_and_writes_nothing(base, mquake, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    assert teach(base, tmp_path, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "different questions, 1 epochs" in said and "min here, from a few timed steps" in said
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["--num-epochs", "0"], "--num-epochs must be 1 or more, got 0"),
        (["--questions-per-source", "0"], "--questions-per-source must be 1 or more, got 0"),
        (["--device", "abacus"], "got 'abacus'"),
    ],
)
def test_teaching_that_the_user_can_mend_exits_with_2_and_leaves_nothing(base, mquake, tmp_path, capsys, arguments, message):
    before = sorted(tmp_path.iterdir())
    assert teach(base, tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err and sorted(tmp_path.iterdir()) == before


def test_unknown_artefact_and_unknown_verb(capsys):
    assert main(["prepare", "smollm9"]) == 2
    assert "built here are smollm2-135m, smollm2-135m-metaft" in capsys.readouterr().err
    assert main(["frobnicate"]) == 2
    assert "unknown verb 'frobnicate'; there are prepare, edit, ask" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "is_quiet"), [("--quiet", True), (None, False)])
def test_quiet_leaves_warnings_and_results(base, tmp_path, option, is_quiet):
    data = ["--model", str(base), "--data", str(tmp_path / "train.jsonl"), "--output", str(tmp_path / "out"), "--layers", "[1]"]
    command = [sys.executable, "-m", "propmeta_edit.cli", "meta-train", *data, "--device", "cpu", "--num-tasks", "2"]
    done = subprocess.run([*command, *([option] if option else [])], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0 and "wrote" in done.stdout and "\r" not in done.stderr
    assert ("training 7 tensors" in done.stderr) != is_quiet and ("meta-training: 100%" in done.stderr) != is_quiet
    assert "the inner loop does not write its facts" in done.stderr


def test_ctrl_c_saves_and_says_how_to_go_on(base, tmp_path, capsys, monkeypatch):
    step = trainer.apply_outer_step

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        step(*args, **kwargs)

    monkeypatch.setattr(trainer, "apply_outer_step", interrupted)
    assert meta_train(base, tmp_path) == 2
    assert "stopped after 1 of 6 tasks; everything is saved, and the same command continues" in capsys.readouterr().err
    monkeypatch.setattr(trainer, "apply_outer_step", step)
    assert meta_train(base, tmp_path) == 0
    assert len(json.loads((tmp_path / "out" / "progress.json").read_text())["losses"]) == 6


def test_ctrl_c_elsewhere_is_no_traceback(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "read_arguments", interrupted)
    assert main(["prepare"]) == 130
    assert "the same command goes on from what was saved" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_verbs_and_options(shell, capsys):
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("meta-train", "choose-rate", "--num-inner-steps", "check"))


def test_half_a_verb_is_answered_with_the_verbs_that_begin_so(capsys):
    assert main(["speed"]) == 2
    assert capsys.readouterr().err == "error: unknown verb 'speed'; there are speed edit, speed meta, speed ask\n"
    assert main(["data", "chek", "x"]) == 2
    assert "unknown verb 'data chek'; there are data check; did you mean data check?" in capsys.readouterr().err


def test_files_that_cannot_be_written_whole(base, tmp_path):
    """The real writer, stopped by a limit on file sizes as a full disk would stop it."""
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
    limited += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "from propmeta_edit.cli import main; sys.exit(main(sys.argv[1:]))"
    data = ["--model", str(base), "--data", str(tmp_path / "train.jsonl"), "--output", str(tmp_path / "out"), "--num_tasks", "1"]
    command = [sys.executable, "-c", limited, "meta-train", *data, "--layers", "[1]", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 2 and "cannot write" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out.partial*"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("model: x\n  lr: [\n", "line 2: broken YAML"), ("- a\n", "must hold a mapping"), (None, "no such settings file")],
)
def test_a_broken_config_is_named_with_its_line(tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "c.yaml").write_text(text)
    assert main(["meta-train", "--config", str(tmp_path / "c.yaml"), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and "c.yaml" in error


@pytest.mark.parametrize("verb", [[], *(name.split() for name in VERBS)], ids=" ".join)
def test_help_teaches(verb, capsys):
    assert main([*verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert len(text) > 200
    if verb == ["meta-train"]:
        assert "Eq. 2" in text and "--num_inner_steps" in text


@pytest.mark.parametrize("verb", VERBS.values(), ids=list(VERBS))
def test_what_a_verb_is_for_is_read_from_its_source_as_its_function_has_it(verb):
    assert verb.read_docstring() == inspect.getdoc(verb.load())


@pytest.mark.parametrize("name", VERBS)
def test_every_option_says_what_it_is(name):
    function = VERBS[name].load()
    parser = make_parser(name, function, VERBS[name].positional)
    undocumented = [action.dest for action in parser._actions if not action.help]
    assert not undocumented and (inspect.getdoc(function) or "").split("\n")[0].endswith(".")


def test_without_arguments_there_is_help(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in VERBS)


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"propmeta-edit {propmeta_edit.__version__}\n"


def test_settings_are_printed_and_read_back(tmp_path, capsys):
    given = ["--output", str(tmp_path), "--methods", "FT,MetaFT", "--limits", "FT=3", "--plan"]
    assert main(["table2", *given, "--print_config"]) == 0
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    _, values = read_arguments(["table2", "--config", str(tmp_path / "c.yaml")])
    assert values == read_arguments(["table2", *given])[1]
    assert (values["methods"], values["limits"], values["options"].plan) == (["FT", "MetaFT"], ["FT=3"], True)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (["--num-tasks", "3", "--shard"], {"num_tasks": 3, "shard": True}),
        (["--num_tasks=3", "--shard=true"], {"num_tasks": 3, "shard": True}),
        (["--shard", "false", "--num_tasks", "3"], {"num_tasks": 3, "shard": False}),
    ],
)
def test_dashes_and_switches(written, meant):
    config = read_arguments(["meta-train", "--model", "m", *written])[1]["config"]
    assert {name: getattr(config, name) for name in meant} == meant


def test_ray_has_an_address_or_none():
    for given, meant in (([], False), (["--ray"], True), (["--ray", "auto"], "auto"), (["--ray", "--plan"], True)):
        assert read_arguments(["table2", *given])[1]["options"].ray == meant


def test_lists_with_commas_or_as_yaml_has_them():
    for written in ("a,b=c", "[a, b=c]", " a , b=c,a"):
        assert read_arguments(["table2", "--datasets", written])[1]["datasets"] == ["a", "b=c"]
    assert read_arguments(["table2", "--datasets", '["a,b.json"]'])[1]["datasets"] == ["a,b.json"]
    for written in ("2,5", "[2, 5]"):
        assert read_arguments(["figure2", "--layers", written])[1]["layers"] == [2, 5]


@pytest.fixture
def run_table2(tmp_path, monkeypatch, capsys):
    """The command in an empty folder; (exit code, what it said on stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        variants._HELD.clear()
        runs.hash_of_model.cache_clear()
        return main(["table2", *arguments]), capsys.readouterr().err

    return run


def test_the_benchmark_of_a_clone_is_the_command(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "run_table2.py"), "--methods", "GRACE"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2 and "unknown methods GRACE" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "smollm9", "--methods", "unedited"], "unknown model 'smollm9'"),
        (
            ["--methods", "GRACE"],
            "unknown methods GRACE; choose from unedited, in-context, FT, ROME, MEMIT, AlphaEdit, CaKE, MetaFT",
        ),
        (["--datasets", "cre-xyz"], "unknown data set 'cre-xyz'"),
        (["--datasets", "mquake-subset"], "does not come with the package"),
        (["--datasets", "mquake-4hop"], "write mquake-4hop=mquake_cf_4hop.json with the file you downloaded, or set PROPMETA_DATA"),
        (["--limit", "0"], "--limit must be 1 or more"),
        (["--limits", "ROME"], "--limits takes NAME=VALUE, separated by commas, got 'ROME'"),
        (["--limits", "ROME=0"], "--limits takes NAME=NUMBER of 1 or more, separated by commas, got 'ROME=0'"),
        (["--limits", "GRACE=1"], "--limits takes unedited, in-context, FT"),
        (["--methods", ","], "--methods: at least one value is wanted, got ','"),
        (["--edits-at-once", "0"], "--edits-at-once must be 1 or more"),
        (["--ray", "--gpus-per-worker", "1", "--device", "cpu"], "--gpus-per-worker 1: workers compute on what this machine"),
    ],
)
def test_table2_refuses_with_2(run_table2, arguments, message):
    code, error = run_table2(*arguments)
    assert code == 2 and message in error and "Traceback" not in error


def test_a_folder_stands_for_all_of_cres_test_files_in_it(tmp_path):
    for name, count in (("test_data_id", 2), ("test_data_ood", 3)):
        tiny.write_records(tmp_path / f"{name}.jsonl", tiny.world_records(name, count))
    found = data_sets.load_datasets(str(tmp_path), seed=0)
    assert [(data.name, len(data.cases)) for data in found] == [("cre-id", 2), ("cre-ood", 3)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="none of CRE's files"):
        data_sets.load_datasets(str(tmp_path / "empty"), seed=0)


def test_rows_on_rewordings_say_where_these_are_from(run_table2, base, tmp_path):
    """The offline world has other wordings of its facts; without them the texts are from templates, and the row says so."""
    records = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    for fact in records[0]["facts"]:
        del fact["paraphrase_prefix"]
    tiny.write_records(tmp_path / "mixed.jsonl", records)
    assert meta_train(base, tmp_path) == 0
    arguments = ["--model", str(base), "--metaft-model", str(tmp_path / "out"), "--device", "cpu", "--output", "results"]
    code, error = run_table2(*arguments, "--methods", "unedited,FT-paraphrases", "--datasets", str(tmp_path / "mixed.jsonl"))
    assert code == 0, error
    rows = [json.loads(line) for line in (tmp_path / "results" / "rows.jsonl").read_text().splitlines()]
    origins = {(row["method"], row["case_id"]): row["tags"].get("augmentation") for row in rows}
    expected = {("FT-paraphrases", f"cre-{n:06d}"): "templates" if n == 0 else "data" for n in range(6)}
    assert origins == {**expected, **{("unedited", case_id): None for _, case_id in expected}}
    assert not any(row["error"] for row in rows)


def test_missing_easyedit_is_said_before_anything_runs(run_table2, tmp_path, monkeypatch):
    monkeypatch.setenv("EASYEDIT_HOME", str(tmp_path))
    code, error = run_table2("--methods", "ROME")
    assert code == 2 and "there is no package easyeditor/ in it" in error


def test_table2_on_a_tiny_model_end_to_end(run_table2, base, mquake, tmp_path):
    """Unedited, in context, FT and MetaFT rows; then a larger limit continues; the weights' hash is the same in every row."""
    assert meta_train(base, tmp_path) == 0
    arguments = ["--model", str(base), "--metaft-model", str(tmp_path / "out"), "--device", "cpu"]
    datasets = f"cre-id={tmp_path / 'train.jsonl'},mquake-4hop={mquake}"
    arguments += ["--methods", "unedited,in-context,FT,MetaFT", "--datasets", datasets]
    for limit, expected in (("2", 16), ("3", 24)):
        code, error = run_table2(*arguments, "--limit", limit, "--output", "results")
        assert code == 0, error
        rows = [json.loads(line) for line in (tmp_path / "results" / "rows.jsonl").read_text().splitlines()]
        assert len(rows) == expected and len({row["model_sha256"] for row in rows}) == 2
        assert not any(row["error"] for row in rows)
    settings = json.loads((tmp_path / "results" / "settings.json").read_text())
    hashes = {row["method"]: row["hparams_sha256"] for row in rows}
    assert {method: entry["hparams_sha256"] for method, entry in settings.items()} == hashes
    assert settings["MetaFT"]["settings"]["lr"] > 0 and settings["unedited"]["settings"]["dtype"]
    assert "| question | expected | FT | unedited |" in (tmp_path / "results" / "comparisons.md").read_text()
    assert not (tmp_path / "results" / "published.md").exists(), "the paper has no number of this model"
    other = tmp_path / "other-base"
    tiny.save_model_folder(other, tiny.make_tokenizer(), seed=1)
    code, error = run_table2(*["--model", str(other), *arguments[2:]], "--output", "other")
    assert code == 2 and "was meta-trained from other weights" in error
    table = json.loads((tmp_path / "results" / "table.json").read_text())
    assert {(entry["method"], entry["dataset"], entry["n"]) for entry in table} == {
        (method, data, 3) for method in ("unedited", "in-context", "FT", "MetaFT") for data in ("cre-id", "mquake-4hop")
    }


def test_table2_tells_propagation_from_leak_and_facts_apart(run_table2, base, tmp_path):
    """Leak and net in the table, groups of facts with their data set, rows without a model, and splits by what training held."""
    assert meta_train(base, tmp_path) == 0
    data = tiny.write_records(tmp_path / "test_data_ood.jsonl", tiny.world_records("test_data_ood", 40))
    arguments = ["--model", str(base), "--metaft-model", str(tmp_path / "out"), "--device", "cpu", "--limit", "12"]
    arguments += ["--datasets", f"cre-ood={data}", "--methods", "unedited,FT,newest-object,commonest-answer"]
    code, error = run_table2(*arguments, "--told-apart", "2,20", "--training-data", str(tmp_path / "train.jsonl"), "--output", "r")
    assert code == 0, error
    rows = [json.loads(line) for line in (tmp_path / "r" / "rows.jsonl").read_text().splitlines()]
    assert not any(row["error"] for row in rows)
    assert {row["dataset"] for row in rows} == {"cre-ood", "cre-ood, 2 told apart"}, "no twenty of one kind differ"
    assert all({"answer seen", "entity seen", "relation seen"} <= row["tags"].keys() for row in rows)
    table = {entry["method"]: entry for entry in json.loads((tmp_path / "r" / "table.json").read_text())}
    assert list(table) == ["unedited", "FT", "newest-object", "commonest-answer"]
    ft, newest = table["FT"], table["newest-object"]
    assert ft["leak_n"] > 0 and ft["net"] == pytest.approx(ft["own"] - ft["leak"]) and ft["told_apart_2_n"] > 0
    assert table["unedited"]["leak"] is None and table["unedited"]["told_apart_2"] is not None
    assert newest["efficacy"] == 1 and newest["target_elsewhere"] == 1 and newest["own"] == newest["leak"]
    pictures = [(tmp_path / "r" / f"{name}.png").read_bytes() for name in ("plane", "leak", "told_apart")]
    assert all(picture[:4] == b"\x89PNG" for picture in pictures)
    comparisons = (tmp_path / "r" / "comparisons.md").read_text()
    assert "## Accuracy % by answer seen" in comparisons and "| told_apart_2 |" in comparisons
    with_groups = [section for section in comparisons.split("## ") if "cre-ood, 2 told apart" in section]
    assert all(section.startswith("Over groups, against ") for section in with_groups), "not where verdicts of cases are compared"
    code, error = run_table2(*arguments, "--told-apart", "1", "--output", "r")
    assert code == 2 and "--told-apart must be 2 or more, got 1" in error


def test_table2_weighs_counterfacts_objects_by_probability(run_table2, base, tmp_path):
    """ROME's three shares in rows and tables, beside a data set that has none."""
    assert meta_train(base, tmp_path) == 0
    (tmp_path / "cf.json").write_text(json.dumps([tiny.counterfact_record(n, f"City{n}") for n in range(3)]), encoding="utf-8")
    arguments = ["--model", str(base), "--metaft-model", str(tmp_path / "out"), "--device", "cpu", "--output", "r", "--limit", "3"]
    arguments += ["--methods", "unedited,in-context,FT,newest-object", "--datasets", f"cf.json,cre-id={tmp_path / 'train.jsonl'}"]
    code, error = run_table2(*arguments)
    assert code == 0, error
    rows = [json.loads(line) for line in (tmp_path / "r" / "rows.jsonl").read_text().splitlines()]
    assert not any(row["error"] for row in rows)
    weighed = {(row["method"], row["dataset"]): sum("nats" in probe for probe in row["probes"]) for row in rows}
    assert weighed == {
        (method, data): 6 if data == "cf" and method != "newest-object" else 0
        for method in ("unedited", "in-context", "FT", "newest-object")
        for data in ("cf", "cre-id")
    }
    for entry in json.loads((tmp_path / "r" / "table.json").read_text()):
        numbers = (entry["es_n"], entry["ps_n"], entry["ns_n"])
        assert numbers == ((3, 6, 9) if weighed[entry["method"], entry["dataset"]] else (0, 0, 0))
        assert (entry["es"] is None) == (entry["ns"] is None) == (entry["ps_ci95"] is None) == (numbers == (0, 0, 0))
    assert "| ES % | PS % | NS % |" in (tmp_path / "r" / "table.md").read_text()


def test_table2_on_a_folder_of_the_papers_own_data(run_table2, base, tmp_path, capsys):
    """The four sets by their published names, MQuAKE-CF-3k in its strata, and the training file beside them for the splits."""
    folder = tmp_path / "data"
    (folder / "cre").mkdir(parents=True)
    (folder / "mquake").mkdir()
    for stem in ("train_data_id", "test_data_id", "test_data_ood"):
        tiny.write_records(folder / "cre" / f"{stem}.jsonl", tiny.world_records(stem, 5))
    chains = [([f"Person {n}", "Oldland", "Oldtown"], [f"Person {n}", f"Land {n}", f"Town {n}"]) for n in range(20)]
    cases = [tiny.mquake_case(n, ("P27", "P36"), *chain, edited=[0] if n % 2 else [0, 1]) for n, chain in enumerate(chains)]
    tiny.write_mquake(folder / "mquake" / "MQuAKE-CF-3k.json", cases)
    arguments = ["--model", str(base), "--device", "cpu", "--data-folder", str(folder), "--methods", "newest-object"]
    code, error = run_table2(*arguments, "--mquake-cases", "6", "--limit", "50", "--output", "r")
    assert code == 0, error
    rows = [json.loads(line) for line in (tmp_path / "r" / "rows.jsonl").read_text().splitlines()]
    counted = Counter(row["dataset"] for row in rows)
    assert counted["cre-ood"] == counted["cre-id"] == 5 and counted["mquake-3k"] == 6 and counted["mquake-subset"] == 10
    assert Counter(row["tags"]["last hop"] for row in rows if row["dataset"] == "mquake-3k") == {"edited": 3, "not edited": 3}
    assert {row["tags"].get("answer seen") for row in rows if row["dataset"] == "cre-id"} <= {"yes", "no"}
    code, error = run_table2(*arguments, "--datasets", "mquake-subset", "--limit", "2", "--output", "one")
    one = [json.loads(line) for line in (tmp_path / "one" / "rows.jsonl").read_text().splitlines()]
    assert code == 0 and [row["dataset"] for row in one] == ["mquake-subset"] * 2
    assert run_table2(*arguments, "--datasets", "world-id", "--output", "s")[0] == 2
    (folder / "cre" / "test_data_ood.jsonl").unlink()
    code, error = run_table2(*arguments, "--output", "s")
    assert code == 2 and "test_data_ood.jsonl is looked for here and one level down" in error


@pytest.mark.parametrize("part", ["prefix", "alias_question"])
def test_meta_training_refuses_what_the_model_has_no_positions_for(base, tmp_path, capsys, part):
    """A target or a question of any task, before the first step, by its record."""
    records = tiny.world_records("train_data_id", 6)
    for place in (*records[4]["facts"], *records[4]["questions"]):
        if part in place:
            place[part] = place[part].replace(records[4]["subject"], records[4]["subject"] + " of" * tiny.POSITIONS)
    tiny.write_records(tmp_path / "train.jsonl", records)
    assert meta_train(base, tmp_path) == 2
    error = capsys.readouterr().err
    assert "error: task cre-000004" in error and f"the model has {tiny.POSITIONS} positions" in error, error
    assert not (tmp_path / "out").exists()


def test_texts_are_held_against_the_model_before_anything_runs(run_table2, base, tmp_path, capsys):
    """A question that the model has no positions for ends the study with its case named; what few tokens cannot hold is counted."""
    records = tiny.world_records("test_data_ood", 6)
    data = tiny.write_records(tmp_path / "test_data_ood.jsonl", records)
    arguments = ["--model", str(base), "--device", "cpu", "--datasets", f"cre-ood={data}", "--methods", "unedited", "--output", "r"]
    capsys.readouterr()
    assert main(["table2", *arguments, "--plan", "--max-new-tokens", "1"]) == 0
    assert "cre-ood: 1 tokens cannot hold the answer of 6 and the object of 6 of 6 cases" in capsys.readouterr().out
    assert run_table2(*arguments, "--max-new-tokens", "1")[0] == 0
    [row, *_] = [json.loads(line) for line in (tmp_path / "r" / "rows.jsonl").read_text().splitlines()]
    assert row["protocol"].startswith("qa-greedy-1-") and row["answer_too_long"] and row["fact_too_long"]
    code, error = run_table2(*arguments)
    assert code == 2 and "made from something else (protocol 'qa-greedy-1-" in error, "another protocol is another output"
    long = [{**records[0], "subject": "x" * tiny.POSITIONS}]
    for name in ("questions", "facts"):
        long[0][name] = [
            {
                key: value.replace(records[0]["subject"], long[0]["subject"]) if isinstance(value, str) else value
                for key, value in o.items()
            }
            for o in records[0][name]
        ]
    bad = tiny.write_records(tmp_path / "long.jsonl", [*records, *long])
    code, error = run_table2(*arguments[:4], "--datasets", f"cre-ood={bad}", "--methods", "unedited", "--output", "s")
    assert code == 2 and "case cre-000006: " in error and f"the model has {tiny.POSITIONS} positions" in error
    assert not (tmp_path / "s" / "rows.jsonl").exists()


def test_rows_edit_as_the_checkpoint_was_trained_and_variants_of_ft_as_ft(base, tmp_path, caplog):
    """A YAML has no say against a checkpoint's card, and FT's variants without a YAML do not become MetaFT's row."""
    assert meta_train(base, tmp_path) == 0
    setup = Bench(str(base), "", "cpu", "float32", checkpoints={"metaft": str(tmp_path / "out")})
    trained = {"layers": [1], "lr": 0.01, "num_steps": 2}

    def settings_of(name, hparams_name, keys=("layers", "lr", "num_steps")):
        found = variants.read_settings(METHODS[name], replace(setup, hparams=hparams_name))
        return {key: found[key] for key in keys}

    assert all(settings_of(name, "llama3-8b") == trained for name in ("MetaFT", "K0-FT", "FT-as-MetaFT"))
    assert "was meta-trained with layers [1], not [9]; lr 0.01, not 2e-05; num_steps 2, not 10: it is edited so" in caplog.text
    assert settings_of("FT", "llama3-8b") == {"layers": [9], "lr": 2e-5, "num_steps": 10}
    assert settings_of("FT-all-layers", "llama3-8b") == {"layers": "all", "lr": 2e-5, "num_steps": 10}
    assert settings_of("FT-paraphrases", "llama3-8b", ("layers", "batch_size")) == {"layers": [9], "batch_size": 4}
    assert settings_of("FT", "no-such-yaml") == trained
    assert settings_of("FT-all-layers", "no-such-yaml") == {**trained, "layers": "all"}
    assert settings_of("FT-all-layers", "smollm2-135m", ("lr",)) == {"lr": 5e-5}, "it has a YAML of its own"
    own = variants.read_settings(METHODS["FT-as-MetaFT"], Bench(str(base), "llama3-8b", "cpu", "float32"))
    assert own["layers"] == [9], "no checkpoint is at hand"


def test_one_model_is_in_memory_at_a_time(base, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    alive = weakref.WeakSet()
    load = variants.load_model

    def load_alone(*arguments, **options):
        assert not len(alive), "the former model is still there"
        loaded = load(*arguments, **options)
        alive.add(loaded[0])
        return loaded

    monkeypatch.setattr(variants, "load_model", load_alone)
    variants._HELD.clear()
    for model in (base, base, other):
        variants._load_shared(str(model), None, Bench(str(model), "tiny", "cpu", "float32"), "float32")
        assert len(alive) == 1
    variants._HELD.clear()


def test_rows_that_do_not_belong_together_are_refused_before_anything_runs(run_table2, base, mquake, tmp_path):
    assert meta_train(base, tmp_path) == 0
    data = shutil.copy(tmp_path / "train.jsonl", tmp_path / "other.jsonl")
    with open(data, "a", encoding="utf-8") as file:
        file.write("\n")
    arguments = ["--model", str(base), "--metaft-model", str(tmp_path / "out"), "--device", "cpu", "--limit", "1"]
    assert run_table2(*arguments, "--methods", "unedited", "--datasets", f"cre-id={tmp_path / 'train.jsonl'}")[0] == 0
    before = (tmp_path / "results" / "table2" / "rows.jsonl").read_bytes()
    for more, message in (
        (["--seed", "1", "--datasets", f"mquake-4hop={mquake}"], "were run with different seeds"),
        (["--datasets", f"cre-id={data}"], "rows of cre-id come from different files"),
    ):
        code, error = run_table2(*arguments, "--methods", "in-context", *more)
        assert code == 2 and message in error and "another --output" in error
    assert (tmp_path / "results" / "table2" / "rows.jsonl").read_bytes() == before
    code, error = run_table2(*arguments, "--methods", "in-context", "--retry-failed", "--datasets", f"mquake-4hop={mquake}")
    assert code == 0 and "0 cases that failed run again" in error


def test_the_papers_numbers_stand_beside_its_own_model_on_files_alone(run_table2, base, tmp_path):
    tiny.write_records(tmp_path / "test.jsonl", tiny.world_records("test_data_ood", 1))
    arguments = ["--model", str(base), "--hparams", "llama3-8b", "--device", "cpu", "--methods", "unedited", "--limit", "1"]
    for datasets, is_there in (("cre-ood=test.jsonl", True), ("world-mquake-3hop", False)):
        assert run_table2(*arguments, "--datasets", datasets, "--output", datasets)[0] == 0
        assert (tmp_path / datasets / "published.md").exists() is is_there
        assert ("published.md: what the paper reports" in (tmp_path / datasets / "table.md").read_text()) is is_there
    text = (tmp_path / "cre-ood=test.jsonl" / "published.md").read_text()
    assert "| CaKE | – | 52.4 | 23.9 | 45.8 |" in text and "Cited from the paper's Table 2, not run here" in text


def test_a_plan_says_what_is_left_and_starts_nothing(run_table2, base, tmp_path, capsys):
    assert meta_train(base, tmp_path) == 0
    arguments = ["--model", str(base), "--metaft-model", str(tmp_path / "out"), "--device", "cpu", "--output", "results"]
    arguments += ["--datasets", f"cre-id={tmp_path / 'train.jsonl'}", "--limit", "4"]
    assert run_table2(*arguments, "--methods", "FT")[0] == 0
    comparison_plan = main(["table2", *arguments, "--methods", "FT,MetaFT,MEMIT,K0-FT", "--plan"])
    said = capsys.readouterr().out
    lines = {line.split()[0]: line for line in said.splitlines() if line}
    missing = [line for line in said.splitlines() if line.startswith("cannot run yet: ")]
    assert comparison_plan == 1 and len(missing) == 2, said
    assert "no settings for MEMIT on 'base'" in missing[0] and "--hparams-dir FOLDER" in missing[0]
    assert "base-k0, which K0-FT needs; name one with --checkpoints k0=FOLDER, or make it with: propmeta-edit meta-" in missing[1]
    assert "0 of 4" in lines["FT"] and lines["FT"].endswith("none")
    assert "4 of 4" in lines["MetaFT"] and lines["MetaFT"].endswith("0 min (a guess)") and "(to fetch)" in lines["K0-FT"]
    assert "No row was started." in said
    rows = (tmp_path / "results" / "rows.jsonl").read_text().splitlines()
    assert len(rows) == 4 and all(json.loads(row)["seconds"] > 0 for row in rows)


def test_statistics_are_written_where_easyedit_looks(base, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("Ann Lee was founded in Peru.\n\nThe answer is euro.\n\nLima")
    arguments = ["statistics", str(base), "--layers", "[0,1]", "--corpus", str(tmp_path / "texts.txt"), "--device", "cpu"]
    where = ["--output", str(tmp_path / "stats"), "--dataset", "wiki"]
    assert main([*arguments, *where, "--num-texts", "3"]) == 0
    folder = tmp_path / "stats" / "base" / "wiki_stats"
    assert sorted(file.name for file in folder.iterdir()) == [
        "model.layers.0.mlp.down_proj_float32_mom2_3.json",
        "model.layers.0.mlp.down_proj_float32_mom2_3.npz",
        "model.layers.1.mlp.down_proj_float32_mom2_3.json",
        "model.layers.1.mlp.down_proj_float32_mom2_3.npz",
    ]
    made_from = json.loads((folder / "model.layers.0.mlp.down_proj_float32_mom2_3.json").read_text())
    assert made_from["num_texts"] == 3 and made_from["num_tokens"] > 9 and made_from["dtype"] in ("float32", "bfloat16")
    assert main([*arguments, *where, "--num-texts", "4"]) == 2
    assert "holds 3 texts, but 4 are needed" in capsys.readouterr().err


def test_a_later_run_labels_its_own_files_alone(base, tmp_path):
    """Other layers from other texts, then one layer anew: each file's card is of the run that made the file."""
    stats = tmp_path / "stats"
    settings = {"stats_dir": str(stats), "layers": [0, 1], "mom2_dataset": "wiki", "mom2_n_samples": 2}
    for name, layers in (("a", [0]), ("b", [1]), ("b", [0])):
        corpus = tmp_path / f"{name}.txt"
        corpus.write_text(f"Ann Lee was founded in Peru, says {name}.\n\nThe answer is {name}.")
        make_statistics(str(base), layers, str(corpus), stats, num_texts=2, dataset="wiki", device="cpu", dtype="float32")
        cards = {path.stem: json.loads(path.read_text()) for path in (stats / "base" / "wiki_stats").glob("*.json")}
        assert {Path(card["corpus"]).stem for key, card in cards.items() if f".{layers[0]}." in key} == {name}
        if name == "a":
            first = cards
    both = [cards[key]["seconds"] for key in sorted(cards)]
    assert len(both) == 2 and ensure_statistics(str(base), settings, "cpu").seconds["statistics"] == pytest.approx(sum(both))
    assert cards.keys() > first.keys() and cards["model.layers.0.mlp.down_proj_float32_mom2_2"] != next(iter(first.values()))


def test_files_from_elsewhere_serve_as_they_are(base, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("Ann Lee was founded in Peru.\n\nThe answer is euro.")
    stats = tmp_path / "stats"
    files = make_statistics(str(base), [0, 1], str(texts), stats, num_texts=2, dataset="wiki", device="cpu", dtype="float32")
    for file in files:
        file.with_suffix(".json").unlink()
    before = [file.read_bytes() for file in files]
    settings = {"stats_dir": str(stats), "layers": [0, 1], "mom2_dataset": "wiki", "mom2_n_samples": 2}
    assert ensure_statistics(str(base), settings, "cpu").seconds == {}, "no card says what they took"
    assert [file.read_bytes() for file in files] == before


def test_a_sampled_corpus_holds_the_models_own_text_and_the_worlds(base):
    model, tokenizer = load_model(str(base))
    texts = sample_corpus(model, tokenizer, 20, seed=0)
    assert len(texts) == 20 and texts == sample_corpus(model, tokenizer, 20, seed=0)
    from_model = [text for text in texts if text.startswith(OPENINGS) and "Answer" not in text]
    assert len(from_model) >= SAMPLED_SHARE * 20
    assert any(text.startswith("Question: ") for text in texts)


def test_compact_export_and_back_gives_the_same_bits(base, tmp_path, capsys):
    assert meta_train(base, tmp_path) == 0
    out, compact, again = tmp_path / "out", tmp_path / "compact", tmp_path / "again"
    assert main(["export", str(out), "--compact", "--output", str(compact)]) == 0
    assert sorted(p.name for p in compact.iterdir()) == ["README.md", "metaft.json", "progress.json", "trained.safetensors"]
    trained = load_file(compact / "trained.safetensors")
    assert set(trained) == set(json.loads((out / "metaft.json").read_text())["trained_tensors"])
    assert main(["expand", str(compact), "--output", str(again)]) == 0
    assert (out / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert json.loads((out / "metaft.json").read_text()) == json.loads((again / "metaft.json").read_text())
    assert load_model(str(again))[0].dtype == torch.float32
    capsys.readouterr()
    other = tiny.save_model_folder(tmp_path / "other", load_model(str(base))[1], seed=5)
    assert main(["expand", str(compact), "--output", str(tmp_path / "wrong"), "--base", str(other)]) == 2
    assert "was meta-trained from other weights" in capsys.readouterr().err
    assert main(["expand", str(base), "--output", str(tmp_path / "wrong")]) == 2
    assert "is not a meta-tuned checkpoint" in capsys.readouterr().err
    (compact / "trained.safetensors").write_bytes(b"half")
    assert main(["expand", str(compact), "--output", str(tmp_path / "wrong")]) == 2
    assert "is missing or damaged" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


@pytest.fixture
def own_hparams(base, tmp_path):
    """Settings of an edit on the tiny model."""
    path = tmp_path / "own.yaml"
    path.write_text(f"alg_name: MetaFT\nmodel_name: {base}\ndevice: cpu\nlayers: [1]\nlr: 0.02\nnum_steps: 5\n")
    return str(path)


def test_edit_shows_before_and_after_and_a_saved_edit_can_be_asked(own_hparams, tmp_path, capsys):
    folder = tmp_path / "edit"
    fact = ["edit", "Ann Lee lives in", "Peru", "--hparams", own_hparams, "--save", str(folder)]
    asked = ["--related", "What does Ann Lee pay with?", "--related", "Where?"]
    assert main([*fact, *asked]) == 0
    printed = capsys.readouterr().out
    assert "edit: Ann Lee lives in -> Peru" in printed and "before" in printed and "after" in printed
    assert printed.index("-- fact") < printed.index("-- related") < printed.index("-- unrelated")
    assert sorted(p.name for p in folder.iterdir()) == ["edit_config.json", "edit_model.safetensors"]
    assert main([*fact[:-1], str(tmp_path / "again"), *asked, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["answers"]
    changed = [line for line in printed.splitlines() if line.startswith("* ")]
    assert changed[-1] == "* another answer than before"
    assert len(changed) - 1 == sum(len({first_line(text) for text in row["answers"].values()}) > 1 for row in rows) > 0
    assert rows[0]["kind"] == "fact" and rows[0]["answers"]["before"] != rows[0]["answers"]["after"]
    assert main(["ask", "Where?", "Who lives there?", "--edit", str(folder), "--device", "cpu", "--json"]) == 0
    asked = json.loads(capsys.readouterr().out)["answers"]
    assert [row["prompt"][:16] for row in asked] == ["Question: Where?", "Question: Who li"] and "edit" in asked[0]["answers"]
    shutil.copytree(folder, tmp_path / "other" / "edit")
    both = ["--edit", str(folder), "--edit", str(tmp_path / "other" / "edit")]
    assert main(["ask", *both, "Where?", "--device", "cpu", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)["answers"]
    assert list(row["answers"]) == ["unedited", f"{tmp_path.name}/edit", "other/edit"]


def test_an_edit_of_low_rank_is_saved_small_and_names_the_edited_model(base, tmp_path, capsys):
    """As factors: asked from the command line, as exactly as it was saved, and a whole model wherever a model is named."""
    model, _ = load_model(str(base))
    names = [name.removesuffix(".weight") for name in select_parameters(model, [1])]
    write_input_moments(InputMoments({name: torch.eye(model.get_submodule(name).in_features) for name in names}), base)
    how = f"model_name: {base}\ndevice: cpu\nlayers: [1]\nlr: 0.05\nnum_steps: 5\ninner_step: whitened\npositions: subject\n"
    (tmp_path / "own.yaml").write_text(f"alg_name: MetaFT\n{how}")
    fact = ["edit", "Ann Lee lives in", "Peru", "--subject", "Ann Lee", "--hparams", str(tmp_path / "own.yaml")]
    assert main([*fact, "--save", str(tmp_path / "exact")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"saved in \S+ \(\d+ kB\); ask it", printed) and "is lost" not in printed
    assert main([*fact, "--save", str(tmp_path / "small"), "--tolerance", "0.3"]) == 0
    assert re.search(r"saved in \S+ \(\d+ kB; [1-3]?\d\.\d % of the change is lost\); ask it", capsys.readouterr().out)
    both = ["--edit", str(tmp_path / "exact"), "--edit", str(tmp_path / "small")]
    assert main(["ask", "Where?", *both, "--device", "cpu", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)["answers"]
    assert list(row["answers"]) == ["unedited", "exact", "small"]
    for folder in ("exact", "small"):
        edit, (whole, _) = Edit.load(tmp_path / folder), load_model(str(tmp_path / folder))
        assert edit.factors and any(not torch.equal(whole.get_parameter(n), model.get_parameter(n)) for n in edit.weights)
        with edit.applied(model):
            assert all(torch.equal(whole.get_parameter(n), p) for n, p in model.named_parameters())


def test_columns_have_names_that_tell_edits_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert name_columns([Path("a"), Path("x/b")]) == ["unedited", "a", "b"]
    assert name_columns([Path()]) == ["unedited", tmp_path.name]
    assert name_columns([Path("x/unedited")]) == ["unedited", "x/unedited"]
    with pytest.raises(ConfigError, match="one edit is given twice: a, a"):
        name_columns([Path("a"), Path("a")])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_edits_of_any_tensors_and_dtype_can_be_asked(base, tmp_path, capsys, dtype):
    """A method of one's own may move norms as well, and run in half precision."""
    model, _ = load_model(str(base), dtype=dtype, layers=[])
    names = ["model.layers.1.input_layernorm.weight", "model.layers.1.mlp.down_proj.weight"]
    original = {name: model.get_parameter(name).detach().clone() for name in names}
    with torch.no_grad():
        for name in names:
            model.get_parameter(name).mul_(3)
    edit_from_weights(model, original, [EditRequest("Ann", "Peru")], method="FT", base_model=str(base)).save(tmp_path / dtype)
    assert main(["ask", "--edit", str(tmp_path / dtype), "Where?", "--device", "cpu", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)["answers"]
    assert row["answers"]["unedited"] != row["answers"][dtype]


def test_an_edit_of_an_adapter_can_be_asked(base, own_hparams, tmp_path, monkeypatch, capsys):
    """Its folder holds no tensors of the base; so nothing of it is loaded in half precision beside fp32 layers."""
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    tiny.make_tokenizer().save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(edit_facts, "resolve_dtype", lambda dtype, device: "bfloat16")  # as on a machine that has it in hardware
    fact = [
        "edit",
        "Ann Lee lives in",
        "Peru",
        "--hparams",
        own_hparams,
        "--model",
        str(tmp_path / "adapter"),
        "--unrelated",
        "Who?",
    ]
    assert main([*fact, "--save", str(tmp_path / "edit"), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["answers"][-1]["answers"]
    assert main(["ask", "Who?", "--edit", str(tmp_path / "edit"), "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"][0]["answers"] == {"unedited": made["before"], "edit": made["after"]}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_that_is_not_utf_8_gets_question_marks(tmp_path, encoding):
    record = {**tiny.knowedit_record(), "target_new": "東京", "portability": None}
    (tmp_path / "data.json").write_text(json.dumps([record, {**record, "\ud800": 1}]), encoding="utf-8")
    command = [
        sys.executable,
        "-c",
        "import sys; from propmeta_edit.cli import main; sys.exit(main())",
        "data",
        "check",
        "data.json",
    ]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment, timeout=120)
    said = done.stdout.decode(encoding)
    assert done.returncode == 0 and done.stderr == b"", done.stderr.decode(encoding)
    assert "' ??'" in said and "data.json: EasyEdit, 2 cases" in said
    (tmp_path / "日本.json").write_text("5", encoding="utf-8")
    done = subprocess.run([*command[:-1], "日本.json"], capture_output=True, cwd=tmp_path, env=environment, timeout=120)
    assert done.returncode == 2 and done.stderr.decode(encoding).startswith("error: ??.json, line 1: a record must be")


def test_json_is_whole_on_any_terminal(own_hparams, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert main(["edit", "Ann Lee lives in", "Perú", "--hparams", own_hparams, "--json"]) == 0
    sys.stdout.flush()
    assert json.loads(sys.stdout.buffer.getvalue())["requests"][0]["target_new"] == "Perú"


def test_a_question_that_is_no_text_is_refused(own_hparams, capsys):
    assert main(["edit", "Ann Lee lives in", "Peru", "--hparams", own_hparams, "--related", "Who \udcff?"]) == 2
    assert "a question must be text in the terminal's encoding" in capsys.readouterr().err
    assert main(["edit", "Ann Lee \udcff lives in", "Peru", "--hparams", own_hparams]) == 2
    assert "prompt holds \\udcff, half of a character" in capsys.readouterr().err


def test_edits_of_several_dtypes_are_asked_apart(base, own_hparams, tmp_path, capsys):
    assert main(["edit", "Ann Lee lives in", "Peru", "--hparams", own_hparams, "--save", str(tmp_path / "one")]) == 0
    edit = Edit.load(tmp_path / "one")
    replace(edit, weights={name: value.bfloat16() for name, value in edit.weights.items()}).save(tmp_path / "two")
    assert main(["ask", "--edit", str(tmp_path / "one"), "--edit", str(tmp_path / "two"), "Where?", "--device", "cpu"]) == 2
    assert "these edits hold tensors in bfloat16 and float32; ask under those of one dtype at a time" in capsys.readouterr().err


def test_answers_are_printed_even_if_the_edit_cannot_be_saved(own_hparams, tmp_path, monkeypatch, capsys):
    def fail(edit, folder, **how):
        raise OSError("No space left on device")

    monkeypatch.setattr(Edit, "save", fail)
    fact = ["edit", "Ann Lee lives in", "Peru", "--hparams", own_hparams, "--save", str(tmp_path / "edit")]
    assert main(fact) == 2
    printed = capsys.readouterr()
    assert "Ann Lee lives in -> Peru" in printed.out and "No space left on device" in printed.err and "saved" not in printed.out


def test_the_device_is_the_yamls_unless_one_is_given(own_hparams, tmp_path):
    file = tmp_path / "cuda.yaml"
    file.write_text(Path(own_hparams).read_text().replace("device: cpu", "device: cuda:7"))
    with pytest.raises(ConfigError, match="cuda:7"):
        read_hparams(None, str(file), None)
    assert read_hparams(None, str(file), "cpu").device == "cpu"


def test_a_model_is_edited_as_it_was_meta_trained(base, tmp_path, capsys):
    assert meta_train(base, tmp_path) == 0
    capsys.readouterr()
    fact = ["edit", "Ann Lee lives in", "Peru", "--device", "cpu", "--json", "--model"]
    assert main([*fact, str(tmp_path / "out")]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert (settings["layers"], settings["inner_lr"], settings["num_inner_steps"]) == ([1], 0.01, 2)
    assert main([*fact, str(base)]) == 2
    assert "it has no metaft.json, which meta-training writes, and there is no hparams/MetaFT/base.yaml; make it a checkpoint" in (
        capsys.readouterr().err
    )
    shutil.copytree(base, tmp_path / "llama3.2-1b")
    of_its_name = read_hparams(str(tmp_path / "llama3.2-1b"), None, "cpu")
    assert (of_its_name.layers, of_its_name.lr, str(of_its_name.model_name)) == ([5], 2e-5, str(tmp_path / "llama3.2-1b"))
    card = json.loads((tmp_path / "out" / "metaft.json").read_text())
    del card["settings"]["inner_lr"]
    (tmp_path / "out" / "metaft.json").write_text(json.dumps(card))
    assert main([*fact, str(tmp_path / "out")]) == 2
    assert "does not say with which 'inner_lr'" in capsys.readouterr().err


def test_edit_from_a_file_of_requests(own_hparams, tmp_path, capsys):
    file = tmp_path / "requests.jsonl"
    file.write_text(
        '{"prompt": "Ann Lee lives in", "target_new": "Peru"}\n{"prompt": "Bob Day works at", "target_new": "Le\u2028go"}\n'
    )
    assert main(["edit", "--requests", str(file), "--hparams", own_hparams, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    pretty = json.dumps({"prompt": "Ann Lee lives in", "target_new": "Peru"}, indent=1)
    (tmp_path / "windows.json").write_text("\ufeff" + pretty, encoding="utf-8")
    assert read_requests(tmp_path / "windows.json") == [EditRequest("Ann Lee lives in", "Peru")]
    for content, message in (
        ("", ": it holds no record; expected a JSON list"),
        ("5", ", line 1: a record must be a JSON object, got 5"),
        ('{"prompt": "Ann"}', ", line 1: missing key 'target_new'; found prompt"),
        ('[{"prompt": "Ann", "target_new": null}]', ": record 0: 'target_new' must be a string or a JSON object, got null"),
        ('{"prompt": "Ann"', ", line 1: broken JSON"),
    ):
        (tmp_path / "wrong.json").write_text(content)
        with pytest.raises(DataError, match=f"wrong.json{message}"):
            read_requests(tmp_path / "wrong.json")
    assert [request["target_new"] for request in found["requests"]] == ["Peru", "Le\u2028go"], (
        "a separator inside a text ends no line"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Ann Lee lives in"], "a fact needs its object as well"),
        (["Ann Lee lives in", "Peru", "--requests", "x.json"], "give a fact or --requests, not both"),
        (["--requests", "nowhere.json"], "cannot be read"),
        (["Ann Lee lives in", "Peru", "--subject", "Bob"], "does not occur in its prompt"),
        (["Ann Lee lives in", "Peru", "--save", "."], "exists; choose another folder"),
        (["Ann Lee lives in", "Peru", "--save", f"{__file__}/edit"], f"{__file__} is no folder that can be written to"),
        (["Ann Lee lives in", "Peru", "--tolerance", "0.1"], "--tolerance says how an edit is saved; give --save FOLDER as well"),
        (["Ann Lee lives in", "Peru", "--save", "x", "--tolerance", "10"], "the change's norm, between 0 and 1, got 10"),
        (["Ann Lee lives in", "Peru", "--related", " "], "a question must not be empty"),
        (["", "Peru"], "prompt must be a non-empty string"),
        (["--related", "Where does Ann work?"], "give the fact as well"),
        (["--subject", "Ann"], "give the fact as well"),
    ],
)
def test_bad_edits(arguments, message, own_hparams, capsys):
    assert main(["edit", *arguments, "--hparams", own_hparams]) == 2
    assert message in capsys.readouterr().err


def test_asking_under_another_model_is_refused(own_hparams, base, tmp_path, capsys):
    assert main(["edit", "Ann Lee lives in", "Peru", "--hparams", own_hparams, "--save", str(tmp_path / "edit")]) == 0
    other = tiny.save_model_folder(tmp_path / "other", load_model(str(base))[1], seed=5)
    capsys.readouterr()
    assert main(["ask", "Where?", "--edit", str(tmp_path / "edit"), "--model", str(other), "--device", "cpu"]) == 2
    assert "made on other weights" in capsys.readouterr().err
    asked = ["ask", "Where?", "--edit", str(tmp_path / "edit"), "--model", str(other), "--device", "cpu"]
    assert main([*asked, "--any-base", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)["answers"]
    assert row["answers"]["unedited"] != row["answers"]["edit"]


def ability(model, tmp_path, *more):
    where = ["--datasets", str(tmp_path / "train.jsonl"), "--output", str(tmp_path / "ability"), "--device", "cpu", "--limit", "3"]
    return main(["ability", str(model), *where, *more])


def test_ability_of_a_checkpoint_its_base_and_their_edits(base, own_hparams, tmp_path, capsys, monkeypatch):
    assert meta_train(base, tmp_path) == 0
    capsys.readouterr()
    both = ["--edits", "3,1", "--method", "MetaFT,FT", "--hparams", own_hparams]
    assert ability(tmp_path / "out", tmp_path, *both) == 0
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "ability" / "ability.json").read_text())
    assert (tmp_path / "ability" / "ability.md").read_text() == printed and printed.count("\n| ") == 6
    rows = [(row["kind"], row["method"], row["edits"]) for row in found["rows"]]
    assert rows == [("base", "", 0), ("base", "FT", 1), ("base", "FT", 3)] + [
        ("meta-tuned", method, edits) for method, edits in (("", 0), ("MetaFT", 1), ("MetaFT", 3))
    ]
    values = [row["perplexity"]["value"] for row in found["rows"]]
    assert (
        len(set(values)) == 6
        and found["rows"][0]["ratio"] == 1
        and found["rows"][3]["ratio"] == pytest.approx(values[3] / values[0])
    )
    lines = (tmp_path / "ability" / "rows.jsonl").read_text().splitlines()
    (tmp_path / "ability" / "rows.jsonl").write_text("\n".join(lines[:-1]) + "\n")  # as if it had been stopped there
    taken = []
    original = studies_ability.compute_perplexity
    monkeypatch.setattr(studies_ability, "compute_perplexity", lambda *given: taken.append(1) or original(*given))
    assert ability(tmp_path / "out", tmp_path, *both) == 0
    assert len(taken) == 1 and (tmp_path / "ability" / "rows.jsonl").read_text().splitlines() == lines, (
        "three facts, anew and alike"
    )
    assert json.loads((tmp_path / "ability" / "ability.json").read_text()) == found
    assert ability(base, tmp_path, "--edits", "0") == 0 and len(taken) == 1, "it was measured as a base"
    assert json.loads((tmp_path / "ability" / "ability.json").read_text())["rows"][0]["kind"] == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "ROME"], "--method takes MetaFT, FT, got ROME"),
        (["--method", "MetaFT"], "has no metaft.json: MetaFT edits what was meta-trained; take --method FT"),
        ([], "there is no hparams/FT/base.yaml; give --hparams"),
        (["--edits", "-1"], "--edits must be 0 or more, got -1"),
        (["--limit", "0"], "--limit must be 1 or more, got 0"),
        (["--task-folder", "."], "name those to run with --tasks"),
        (["--tasks", "quiz", "--task-folder", "nowhere"], "nowhere is no folder"),
        (["--texts", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--tasks", "quiz"], "lm-evaluation-harness, which is not installed here"),
    ],
)
def test_bad_measurements_of_ability(base, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert ability(base, tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "ability").exists()


def test_ability_needs_enough_facts_and_the_checkpoints_own_base(base, own_hparams, tmp_path, capsys):
    assert ability(base, tmp_path, "--hparams", own_hparams, "--edits", "5000") == 2
    assert "cases of one edit, but --edits asks for 5000" in capsys.readouterr().err
    assert meta_train(base, tmp_path) == 0
    other = tiny.save_model_folder(tmp_path / "other", load_model(str(base))[1], seed=5)
    assert ability(tmp_path / "out", tmp_path, "--base", str(other)) == 2
    assert "was meta-trained from other weights" in capsys.readouterr().err


class Remembering(GeneralTracker):
    """A tracker that keeps what it is given."""

    name = "remembering"
    requires_logging_directory = True
    given: ClassVar = []

    def __init__(self, run_name, logging_dir=None):
        super().__init__()
        self.given.append((run_name, logging_dir))

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.given.append(values)

    def log(self, values, step=None, **_):
        self.given.append((step, values))


def test_a_tracker_of_accelerates_gets_losses_and_validation(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "remembering", Remembering)
    monkeypatch.setattr(Remembering, "given", [])
    tiny.write_records(tmp_path / "train.jsonl", tiny.world_records("train_data_id", 40))
    more = [
        "--tracker",
        "remembering",
        "--tasks_per_step",
        "2",
        "--num_tasks",
        "4",
        "--validate_every",
        "4",
        "--validation_cases",
        "2",
    ]
    assert meta_train(base, tmp_path, *more) == 0
    (name, _), settings, *logged = Remembering.given
    assert name == "meta-training" and settings["tasks_per_step"] == "2"
    assert [step for step, _ in logged] == [2, 4, 4]
    assert set(logged[0][1]) == {"related_loss", "target_loss"} and set(logged[2][1]) == {"valid-id", "valid-ood"}
    losses = [row["related_loss"] for row in json.loads((tmp_path / "out" / "progress.json").read_text())["losses"]]
    assert logged[1][1]["related_loss"] == pytest.approx(sum(losses[2:]) / 2)
    shutil.rmtree(tmp_path / "out")
    assert meta_train(base, tmp_path, "--tracker", "abacus") == 2
    assert "tracker must be one of aim, " in capsys.readouterr().err
