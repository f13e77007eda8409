"""Table 1 and Figures 2 to 4 on tiny models: the variants, resuming, pictures, plans, and what is read."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import tiny
import torch
from safetensors.torch import load_file

from propmeta_edit.cli import main
from propmeta_edit.errors import ConfigError
from propmeta_edit.evaluation.measures import CaseOutcome
from propmeta_edit.evaluation.rows import Row
from propmeta_edit.evaluation.runner import Method, run_here
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.options import Names
from propmeta_edit.recipes import data_sets, meta_training
from propmeta_edit.records import OTHER
from propmeta_edit.studies import cost, engine, pictures, runs, sweeps, variants
from propmeta_edit.studies.choice import choose
from propmeta_edit.studies.engine import StudyOptions
from propmeta_edit.studies.runs import name_of_run
from propmeta_edit.studies.sweeps import SweepOptions
from propmeta_edit.studies.table1 import find_published
from propmeta_edit.studies.variants import Bench, Variant

table1, figure2, figure3, figure4 = (
    lambda arguments, verb=verb: main([verb, *arguments]) for verb in ("table1", "figure2", "figure3", "figure4")
)
FILES = ("train_data_id", "valid_data_id", "valid_data_ood", "test_data_id", "test_data_ood")


@pytest.fixture
def place(tmp_path, tokenizer, monkeypatch):
    """A tiny model with settings, and a small world."""
    tiny.save_model_folder(tmp_path / "base", tokenizer)
    (tmp_path / "world").mkdir()
    for name in FILES:
        count = 8 if name == "train_data_id" else 3
        tiny.write_records(tmp_path / "world" / f"{name}.jsonl", tiny.world_records(name, count))
    for module in (data_sets, meta_training):
        monkeypatch.setattr(module, "ensure_world", lambda: tmp_path / "world")
    yaml = tmp_path / "tiny.yaml"
    yaml.write_text(
        f"model: {tmp_path / 'base'}\nlayers: [1]\ninner_lr: 0.01\nouter_lr: 0.01\nnum_inner_steps: 2\nnum_tasks: 4\n"
        "dtype: float32\n"
    )
    monkeypatch.setattr(sweeps, "hparams_file", lambda method, name: yaml)
    forget_what_was_hashed()
    return tmp_path


def forget_what_was_hashed():
    """As in another process."""
    runs.hash_of_model.cache_clear()
    runs._read_tasks.cache_clear()
    runs.shape_of.cache_clear()


def arguments(place, *more):
    return ["--models", "tiny", "--device", "cpu", "--limit", "2", "--output", str(place / "out"), *more]


def is_png(path):
    return path.read_bytes()[:4] == b"\x89PNG"


def test_table1_has_every_choice_of_modules_with_and_without(place, capsys):
    assert table1(arguments(place)) == 0
    text = (place / "out" / "table1.md").read_text()
    assert text in capsys.readouterr().out and text.count("| validation |") == 12
    for modules in ("attention", "mlp", "attention+mlp"):
        assert f"| tiny {modules} | valid-id |" in text and f"| tiny {modules} without | valid-ood |" in text
    cards = [json.loads(p.read_text()) for p in (place / "out" / "checkpoints").glob("*/metaft.json")]
    assert len(cards) == 3 and {card["settings"]["layers"] for card in cards} == {"all"}


def test_figure2_goes_through_layers_and_continues(place):
    run = arguments(place, "--layers", "0,2", "--module-choices", "mlp,attention")
    assert figure2(run) == 0
    folders = {p: p.stat().st_mtime_ns for p in (place / "out" / "checkpoints").iterdir()}
    rows = (place / "out" / "rows.jsonl").read_text()
    assert len(folders) == 4 and len(rows.splitlines()) == 4 * 2 + 2 * 2, "and the best of each choice of modules on the test split"
    assert figure2(run) == 0
    assert {p: p.stat().st_mtime_ns for p in folders} == folders and (place / "out" / "rows.jsonl").read_text() == rows
    assert is_png(place / "out" / "figure2.png") and "<svg" in (place / "out" / "figure2.svg").read_text()
    assert "| tiny mlp | 0 | valid-ood | validation | 2† |" in (place / "out" / "figure2.md").read_text()


def test_figure3_is_made_of_the_checkpoints_of_one_run(place):
    assert figure3(arguments(place, "--every", "2")) == 0
    [checkpoint] = (place / "out" / "checkpoints").iterdir()
    last = load_file(checkpoint / "training" / "checkpoints" / "tasks-000004.safetensors")
    whole = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(value, whole[name]) for name, value in last.items())
    text = (place / "out" / "figure3.md").read_text()
    assert [text.count(f"| tiny | {n} |") for n in (0, 2, 4)] == [2, 2, 2] and is_png(place / "out" / "figure3.png")
    rows = [json.loads(line) for line in (place / "out" / "rows.jsonl").read_text().splitlines()]
    assert len({row["hparams_sha256"] for row in rows}) == 3, "states of one run are told apart"


def test_a_state_on_the_way_took_its_share_of_the_meta_training(place):
    assert figure3(arguments(place, "--every", "2")) == 0
    [card] = (place / "out" / "checkpoints").glob("*/metaft.json")
    card.write_text(json.dumps({**json.loads(card.read_text()), "seconds": 100.0}))
    (place / "out" / "rows.jsonl").unlink()
    assert figure3(arguments(place, "--every", "2")) == 0
    seconds = {row["method"]: row["precomputation"].get("meta-training") for row in rows_of(place)}
    assert seconds == {"tiny after 0": None, "tiny after 2": 50.0, "tiny after 4": 100.0}


def test_figure3_needs_checkpoints_where_its_points_are(place, capsys):
    assert figure3(arguments(place, "--every", "3")) == 2
    assert "--every must divide --num-tasks, got 3 and 4" in capsys.readouterr().err


def test_figure4_takes_layers_by_depth(place):
    assert figure4(arguments(place, "--depths", "0,0.4,0.99")) == 0
    text = (place / "out" / "figure4.md").read_text()
    assert [f"| tiny | {layer} |" in text for layer in range(3)] == [True, True, True] and is_png(place / "out" / "figure4.png")


def test_a_plan_starts_nothing(place, capsys):
    assert figure2(arguments(place, "--layers", "0,1", "--module-choices", "mlp", "--plan", "--seconds-a-task", "30")) == 0
    printed = capsys.readouterr().out
    assert printed.count("about 2 min") == 2 and "about 4 min of meta-training are left" in printed
    assert not (place / "out" / "checkpoints").exists()


ONE = ("--layers", "0", "--module-choices", "mlp")


def rows_of(place, file="rows.jsonl"):
    return [json.loads(line) for line in (place / "out" / file).read_text().splitlines()]


def checkpoints(place):
    folder = place / "out" / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def test_runs_are_named_as_before_and_alike_on_every_device():
    """A stopped sweep finds its checkpoints and rows again, and parts made elsewhere fit together; a setting of meta-training that
    comes or goes changes the names."""
    config = MetaTrainConfig("smollm2-135m", layers=[8], num_tasks=1600, device="cpu", dtype="float32")
    assert (
        name_of_run(config)
        == "smollm2-135m_layer-8_attention+mlp_1600-tasks_ced368b1"
        == name_of_run(replace(config, device="cuda:1"))
    )
    assert name_of_run(replace(config, dtype="bfloat16")) != name_of_run(config)


def test_a_seed_of_the_yaml_counts_unless_another_is_given(place):
    yaml = place / "tiny.yaml"
    yaml.write_text(yaml.read_text() + "seed: 3\nvalidate_every: 2\n")
    configs = [
        sweeps.read_configs(StudyOptions(device="cpu", seed=seed), SweepOptions(Names(["tiny"])), ["valid-ood"])["tiny"]
        for seed in (None, 0)
    ]
    assert [config.seed for config in configs] == [3, 0] and configs[0].validate_every is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--layers", "0,7"), "layer 7 is outside the model: it has layers 0 to 2"),
        (("--layers", "0,x"), "--layers: whole numbers are wanted, separated by commas, got 'x'"),
        (("--layers", ","), "--layers: at least one value is wanted, got ','"),
        ((*ONE[:3], "mlp,mpl"), "--module-choices takes attention, mlp, attention+mlp, got mpl"),
        ((*ONE, "--limit", "0"), "--limit must be 1 or more, got 0"),
        ((*ONE, "--num-tasks", "0"), "--num-tasks must be 1 or more, got 0"),
        ((*ONE, "--num-tasks", "99"), "num_tasks is 99, but the data has 8 tasks"),
        ((*ONE, "--minutes-per-row", "0"), "--minutes-per-row must be more than 0, got 0.0"),
        ((*ONE, "--minutes", "nan"), "--minutes: Expected a float, got 'nan'"),
        ((*ONE, "--part", "3/2"), "--part must be I/N with I from 1 to N, e.g. 2/4, got '3/2'"),
        ((*ONE, "--datasets", "valid-odd"), "unknown data set 'valid-odd'"),
        ((*ONE, "--datasets", ""), "--datasets: at least one value is wanted, got ''"),
        ((*ONE, "--test", "--test-datasets", "world-ood"), "--test-datasets is for what is chosen on valid-id or valid-ood"),
        ((*ONE, "--test-datasets", "world-id"), "--test-datasets must be those of --datasets (valid-ood), got world-id"),
        ((*ONE, "--device", "tpu"), "device must be auto, cpu, mps, cuda or cuda:N, got 'tpu'"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_runs(place, capsys, more, message):
    assert figure2(arguments(place, *more)) == 2
    assert message in capsys.readouterr().err and not checkpoints(place)


def test_depths_are_shares(place, capsys):
    assert figure4(arguments(place, "--depths", "0.2,2")) == 2
    assert "--depths must be shares from 0 to 1, got 2.0" in capsys.readouterr().err


def test_rows_of_other_settings_are_refused_before_the_meta_training(place, capsys):
    assert figure2(arguments(place, *ONE)) == 0
    before = checkpoints(place)
    assert figure2(arguments(place, *ONE, "--num-tasks", "2")) == 2
    printed = capsys.readouterr().err
    assert (
        "holds rows of tiny layer 0 mlp made from something else (num_tasks 4, now 2)" in printed
        and "choose another --output" in printed
    )
    assert figure2(arguments(place, *ONE, "--seed", "1")) == 2, "the same label, another seed"
    assert checkpoints(place) == before


def test_a_checkpoint_of_other_data_or_another_base_is_refused(place, tokenizer, capsys):
    train, run = place / "world" / "train_data_id.jsonl", arguments(place, *ONE)
    assert figure2(run) == 0
    (place / "out" / "rows.jsonl").unlink()
    whole = train.read_text()
    train.write_text("\n".join(reversed(whole.splitlines())) + "\n")
    forget_what_was_hashed()
    for more in ((), ("--plan", "--seconds-a-task", "1")):
        assert figure2([*run, *more]) == 2
        printed = capsys.readouterr().err
        assert checkpoints(place)[0] in printed and "made from something else (tasks_sha256 '" in printed
        assert "base_sha256" not in printed and "choose another --output, or delete this folder and the rows of it" in printed
    train.write_text(whole)
    tiny.save_model_folder(place / "base", tokenizer, seed=1)
    forget_what_was_hashed()
    assert figure2(run) == 2
    printed = capsys.readouterr().err
    assert "base_sha256 '" in printed and "tasks_sha256" not in printed and not (place / "out" / "rows.jsonl").exists()


def test_a_checkpoint_under_another_name_is_refused(place, capsys):
    run = arguments(place, *ONE)
    assert figure2(run) == 0
    [name] = checkpoints(place)
    card = place / "out" / "checkpoints" / name / "metaft.json"
    values = json.loads(card.read_text())
    values["settings"]["outer_lr"] = 0.5
    card.write_text(json.dumps(values))
    assert figure2(run) == 2
    assert "outer_lr 0.5, now 0.01" in capsys.readouterr().err


def test_what_is_compared_is_hashed_once(place, monkeypatch):
    run = arguments(place, "--layers", "0,1", "--module-choices", "mlp")
    assert figure2(run) == 0
    forget_what_was_hashed()
    read, hashed = [], []
    load, hash_one = runs.load_tasks, runs.model_sha256
    monkeypatch.setattr(runs, "load_tasks", lambda config: read.append(config) or load(config))
    monkeypatch.setattr(runs, "model_sha256", lambda folder: hashed.append(folder) or hash_one(folder))
    assert figure2(run) == 0
    assert len(read) == 1 and len(hashed) == len(set(hashed)) == 3, "the base and two checkpoints"


def row_of(method, case_id, correct=False, error=None):
    shas = {"model_sha256": method, "base_sha256": "b", "data_sha256": "d", "hparams_sha256": "h", "seed": 0}
    return Row(method=method, dataset="valid-ood", case_id=str(case_id), model=method, correct=correct, error=error, **shas)


def test_the_best_is_chosen_on_the_cases_that_all_were_asked():
    """One whose time ran out after two cases is right on both; another is too, and is wrong later."""
    rows = [row_of("few", n, n != 1) for n in range(2)] + [row_of("many", n, n < 2) for n in range(8)]
    choice = choose(["few", "many"], ["valid-ood"], rows)
    assert (choice.best, choice.note) == ("many", "chosen by the n = 2 cases that all were asked")
    assert choice.ranking == ("many", "few") and choice.scores == {"few": 0.5, "many": 1.0}
    whole = [row_of(name, n, name == "b") for name in ("a", "b", "c") for n in range(2)]
    assert choose(["a", "b", "c"], ["valid-ood"], whole).ranking == ("b", "a", "c"), "a tie goes to the first"
    assert choose(["a", "b", "c"], ["valid-ood"], whole).note == ""
    assert choose(["a", "c"], ["valid-ood"], whole).best == "a"
    nothing = choose(["a", "not asked"], ["valid-ood"], whole)
    assert (nothing.best, nothing.note) == (None, "")
    apart = choose(["a", "b"], ["valid-ood"], [row_of("a", 0), row_of("b", 1)])
    assert (apart.best, apart.note) == (None, "nothing is chosen, since no case was asked of all variants")


def test_several_data_sets_count_alike_however_many_cases_they_have():
    """a: 1 of 4 and 1 of 1; b: 3 of 4 and 0 of 1: 62.5 against 37.5 %."""
    rows = [replace(row_of(name, n, n < right), dataset="large") for name, right in (("a", 1), ("b", 3)) for n in range(4)]
    rows += [replace(row_of(name, 9, name == "a"), dataset="small") for name in ("a", "b")]
    choice = choose(["a", "b"], ["large", "small"], rows)
    assert choice.ranking == ("a", "b") and choice.scores == {"a": 0.625, "b": 0.375}


def test_by_net_what_other_subjects_get_too_does_not_count():
    """a: right everywhere, and so for every other subject; b: right once, for its own subject alone."""
    other = {"kind": OTHER, "answers": ["x"], "against": ["yes"], "before": "no"}
    rows = [
        replace(row_of(name, n, name == "a" or n == 0), before="no", answers=("yes",), probes=({**other, "after": after},))
        for name, after in (("a", "yes"), ("b", "no"))
        for n in range(4)
    ]
    assert choose(["a", "b"], ["valid-ood"], rows).ranking == ("a", "b")
    choice = choose(["a", "b"], ["valid-ood"], rows, "net")
    assert choice.ranking == ("b", "a") and choice.scores == {"a": 0.0, "b": 0.25}
    untold = choose(["a", "b"], ["valid-ood"], [replace(row, probes=()) for row in rows], "net")
    assert (untold.best, untold.note) == (None, "nothing is chosen, since a data set has no case of which net can be told")


class Failing(Method):
    """Finds no memory for the edit of layer 0, and answers nothing right elsewhere."""

    def __init__(self, layer):
        self.layer = layer

    def evaluate_many(self, cases):
        if self.layer == 0:
            raise RuntimeError("no such luck")
        return Guesser(self.layer).evaluate_many(cases)


def test_failed_cases_are_shown_decide_nothing_and_run_again(place, monkeypatch, capsys):
    monkeypatch.setattr(variants, "_build_trained", lambda hparams, weights, max_new_tokens: Failing(hparams.layers[0]))
    run = arguments(place, "--layers", "0,1", "--module-choices", "mlp")
    assert figure2(run) == 1
    assert "--retry-failed runs them again" in capsys.readouterr().err
    text = (place / "out" / "figure2.md").read_text()
    assert "| efficacy % | errors |" in text and "best" not in text and "| 0.0 | 2 |" in text
    note = (
        "- tiny mlp on valid-ood: nothing is chosen, since cases failed (2 of tiny layer 0 mlp); mend the cause and give the same"
    )
    assert note in text and {row["dataset"] for row in rows_of(place)} == {"valid-ood"}
    monkeypatch.setattr(variants, "_build_trained", lambda hparams, weights, max_new_tokens: Guesser(hparams.layers[0]))
    assert figure2(run) == 1, "not run again by themselves"
    assert figure2([*run, "--plan", "--retry-failed"]) == 0
    assert "4 cases are left to ask" in capsys.readouterr().out, "those, and the best on the test split"
    assert figure2([*run, "--retry-failed"]) == 0
    assert "2 cases that failed run again" in capsys.readouterr().err
    text = (place / "out" / "figure2.md").read_text()
    assert (
        "errors" not in text and "| world-ood | test (chosen on validation) | 2† |" in text and "- †: fewer than 30 cases." in text
    )


def test_cases_that_a_part_asked_again_replace_those_that_failed(place, monkeypatch):
    monkeypatch.setattr(variants, "_build_trained", lambda hparams, weights, max_new_tokens: Failing(hparams.layers[0]))
    part, run = arguments(place, *ONE, "--part", "1/1"), arguments(place, *ONE)
    assert [figure2(part), figure2(run)] == [1, 1]
    monkeypatch.setattr(variants, "_build_trained", lambda hparams, weights, max_new_tokens: Guesser(hparams.layers[0]))
    assert [figure2([*part, "--retry-failed"]), figure2(run)] == [0, 0]
    assert {row["error"] for row in rows_of(place)} == {None}


def test_cases_that_fail_give_exit_code_1(place, monkeypatch, capsys):
    class Broken(Method):
        def evaluate_many(self, cases):
            raise RuntimeError("no such luck")

    monkeypatch.setattr(variants, "_build_trained", lambda hparams, weights, max_new_tokens: Broken())
    assert figure3(arguments(place, "--every", "4", "--datasets", "valid-ood")) == 1
    assert "4 cases failed and count as wrong" in capsys.readouterr().err
    assert "| tiny | 4 | valid-ood | validation | 2† | 0.0 [0.0, 65.8] |" in (place / "out" / "figure3.md").read_text()


def test_a_sweep_that_is_stopped_has_shown_what_it_had(place, monkeypatch):
    make, made = engine.prepare, []

    def make_one(variant, bench):
        made.append(variant.name)
        if len(made) > 1:
            raise KeyboardInterrupt
        return make(variant, bench)

    monkeypatch.setattr(engine, "prepare", make_one)
    assert figure2(arguments(place, "--layers", "0,1", "--module-choices", "mlp")) == 130
    text = (place / "out" / "figure2.md").read_text()
    assert "| tiny mlp | 0 | valid-ood |" in text and "best" not in text, "nothing is chosen before all are asked"
    assert is_png(place / "out" / "figure2.png") and len(json.loads((place / "out" / "summary-figure2.json").read_text())) == 1


def test_the_best_on_validation_is_reported_on_test(place, monkeypatch):
    monkeypatch.setattr(variants, "_build_trained", lambda hparams, weights, max_new_tokens: Guesser(hparams.layers[0]))
    run = arguments(place, "--layers", "0,1,2", "--module-choices", "mlp,attention")
    assert figure2(run) == 0
    rows = rows_of(place)
    assert {row["method"] for row in rows if row["dataset"] == "world-ood"} == {"tiny layer 1 mlp", "tiny layer 1 attention"}
    text = (place / "out" / "figure2.md").read_text()
    for modules in ("mlp", "attention"):
        assert f"| tiny {modules} | 1 | valid-ood | validation | 2† | 100.0 [34.2, 100.0] | 0.0 | best |" in text
        assert f"| tiny {modules} | 1 | world-ood | test (chosen on validation) | 2† | 100.0 [34.2, 100.0] | 0.0 | best |" in text
    assert text.count("best") == 4
    summary = pd.read_csv(place / "out" / "summary-figure2.csv")
    assert summary["chosen"].sum() == 4 and set(summary["split"]) == {"validation", "test (chosen on validation)"}


class Guesser(Method):
    """Answers everything right if it edits layer 1, nothing else."""

    def __init__(self, layer):
        self.knows = layer == 1

    def evaluate_many(self, cases):
        return [CaseOutcome(case.question.answers[0] if self.knows else "?", None, ("?",) * len(case.edits), 0.1) for case in cases]


def test_the_papers_way_says_so_where_something_is_chosen(place):
    assert figure2(arguments(place, *ONE, "--test")) == 0
    assert "| world-ood | test (chosen on test, as in the paper) |" in (place / "out" / "figure2.md").read_text()
    assert {row["dataset"] for row in rows_of(place)} == {"world-ood"}
    assert figure3(arguments(place, "--every", "4", "--test", "--output", str(place / "f3"))) == 0
    text = (place / "f3" / "figure3.md").read_text()
    assert "| world-id | test |" in text and "| world-ood | test |" in text and "chosen" not in text, "Figure 3 chooses nothing"


def test_a_file_is_labelled_by_its_name(place):
    path = place / "world" / "test_data_ood.jsonl"
    assert figure3(arguments(place, "--every", "4", "--datasets", f"cre-ood={path}")) == 0
    text = (place / "out" / "figure3.md").read_text()
    assert "| tiny | 4 | cre-ood | test | 2† |" in text


def test_table1_pairs_its_rows_and_draws_them(place):
    assert table1(arguments(place, "--datasets", "valid-id")) == 0
    text = (place / "out" / "table1.md").read_text()
    assert "Gain of meta-training" in text and text.count("| valid-id | tiny ") == 3 and "published" not in text
    assert is_png(place / "out" / "table1.png") and "<svg" in (place / "out" / "table1.svg").read_text()
    settings = json.loads((place / "out" / "settings.json").read_text())
    assert settings["tiny mlp"]["settings"]["outer_lr"] == 0.01 and "outer_lr" not in settings["tiny mlp without"]["settings"]
    assert {row["hparams_sha256"] for row in rows_of(place)} == {entry["hparams_sha256"] for entry in settings.values()}


def test_published_numbers_stand_beside_the_papers_own_model_and_files_alone(place):
    file = f"cre-id={place / 'world' / 'test_data_id.jsonl'}"
    options = arguments(place, "--models", "llama3-8b-instruct", "--datasets", f"{file},valid-ood", "--limit", "1")
    assert table1(options) == 0
    text = (place / "out" / "table1.md").read_text()
    assert "| llama3-8b-instruct attention | cre-id | test | 18.6 |" in text and "cited from the paper's Table 1" in text
    assert "| llama3-8b-instruct attention without | cre-id | test | 6.8 |" in text
    assert "| llama3-8b-instruct mlp without | valid-ood | validation | – |" in text
    row = {"model": "llama3-8b-instruct", "modules": "mlp", "dataset": "cre-ood", "is_meta_trained": True, "is_released": True}
    assert find_published(row) == 6.3
    assert find_published({**row, "model": "llama3-8b"}) is None, "the base is another model"
    assert find_published({**row, "is_released": False}) is None, "facts generated offline"


def test_models_that_train_on_a_file_need_files_for_tests_and_hold_validation_out(place, capsys):
    data = tiny.write_records(place / "train.jsonl", tiny.world_records("train_data_id", 300, skip=1000))
    on_file = arguments(place, "--data", str(data))
    assert figure2([*on_file, *ONE, "--test"]) == 2
    assert "name the file: cre-ood=test_data_ood.jsonl" in capsys.readouterr().err and not checkpoints(place)
    test = f"cre-ood={place / 'world' / 'test_data_ood.jsonl'}"
    assert figure2([*on_file, *ONE, "--test-datasets", test]) == 0
    asked = {row["question"] for row in rows_of(place) if row["dataset"] == "valid-ood"}
    assert len(asked) == 2 and all(question in data.read_text() for question in asked), "of this file, not of the offline world"
    assert "| cre-ood | test (chosen on validation) |" in (place / "out" / "figure2.md").read_text()


def test_no_variant_is_started_after_the_minutes_are_over(place, capsys):
    assert figure2(arguments(place, *ONE, "--minutes", "1e-9")) == 0
    printed = capsys.readouterr()
    assert "the 1e-09 minutes are over; left, and done by the same command: tiny layer 0 mlp on valid-ood" in printed.err
    assert not checkpoints(place) and "nothing was asked yet" in printed.out


def test_parts_share_the_runs_and_are_put_together(place, capsys):
    run = arguments(place, "--layers", "0,1,2", "--module-choices", "mlp")
    assert [figure2([*run, "--part", part]) for part in ("1/2", "2/2")] == [0, 0]
    assert [len(rows_of(place, f"rows-part-{n}-of-2.jsonl")) for n in (1, 2)] == [4, 2]
    before = checkpoints(place)
    assert len(before) == 3 and not (place / "out" / "figure2.md").exists()
    capsys.readouterr()
    assert figure2(run) == 0
    assert checkpoints(place) == before and (place / "out" / "figure2.md").read_text().count("| validation |") == 3
    assert [row["dataset"] for row in rows_of(place)].count("valid-ood") == 6


def test_states_of_one_run_stay_on_one_machine():
    config = MetaTrainConfig("m", device="cpu", num_tasks=4)
    own = [Variant(name, training=config, num_tasks=n) for name, n in (("base", 0), ("after 2", 2), ("after 4", 4))]
    own += [Variant("other", training=replace(config, layers=[1]))]
    study = engine.Study("s", own, [], Bench("", "", "cpu", "float32"), write=lambda results: "")
    shares = [engine._share_of(study, StudyOptions(part=part)) for part in ("1/2", "2/2")]
    assert [[variant.name for variant in share] for share in shares] == [["base", "other"], ["after 2", "after 4"]]


def test_cases_are_asked_where_the_options_say(place, monkeypatch):
    cloudpickle = pytest.importorskip("cloudpickle")
    asked = []

    class Workers:
        """Ray's in all but the processes: what they run travels as bytes."""

        def __init__(self, *settings):
            asked.append(settings)

        def __call__(self, method, work, seed, versions):
            return run_here(pickle.loads(cloudpickle.dumps(method)), work, seed, versions)

    monkeypatch.setattr(engine, "RayWorkers", Workers)
    assert figure2(arguments(place, *ONE, "--ray", "auto", "--workers", "3", "--cpus-per-worker", "0.5")) == 0
    assert asked == [(3, "auto", 0, 0.5)] and len(rows_of(place)) == 4


def test_a_plan_measures_and_says_what_is_needed(place, capsys):
    assert figure2(arguments(place, "--layers", "0,1", "--module-choices", "mlp", "--plan")) == 0
    printed = capsys.readouterr().out
    assert printed.count("4 tasks, about 0 min, 0.0 GiB, 0.0 GiB of memory at least") == 2 and "GiB of disk are free" in printed
    assert "\n6 cases are left to ask: 0 min in all, 0 min guessed." in printed, "two of them on the test split"
    assert "best of tiny mlp" in printed and "(a guess)" in printed and "not known" not in printed
    assert not checkpoints(place)
    assert figure2(arguments(place, *ONE)) == 0
    assert figure2(arguments(place, "--layers", "0,1", "--module-choices", "mlp", "--plan")) == 0
    printed = capsys.readouterr().out
    assert ": there" in printed and "\n4 cases are left to ask: 0 min in all" in printed
    assert figure2(arguments(place, *ONE, "--plan")) == 0
    assert "\n0 cases are left to ask" in capsys.readouterr().out


def test_a_plan_counts_the_rows_of_parts_and_writes_nothing(place, capsys):
    run = arguments(place, "--layers", "0,1", "--module-choices", "mlp", "--seconds-a-task", "1")
    assert figure2([*run, "--part", "1/2"]) == 0
    file = place / "out" / "rows-part-1-of-2.jsonl"
    file.write_text(file.read_text() + "{")  # another machine is writing this line
    before = {path: path.read_bytes() for path in (place / "out").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert figure2([*run, "--plan"]) == 0
    assert "\n4 cases are left to ask: 0 min in all" in capsys.readouterr().out
    assert [figure2([*run, "--part", part, "--plan"]) for part in ("1/2", "2/2")] == [0, 0]
    printed = capsys.readouterr().out
    assert "\n0 cases are left to ask" in printed and "\n2 cases are left to ask" in printed
    assert {path: path.read_bytes() for path in (place / "out").rglob("*") if path.is_file()} == before


def test_a_plan_knows_the_memory_of_a_run(monkeypatch):
    """Eight billion numbers in bf16, of which two hundred million are trained in fp32: the rule of docs/reproducing.md."""
    shape = SimpleNamespace(parameters=lambda: [torch.empty(8_000_000_000, device="meta")])
    sizes = (150_000_000, 50_000_000)
    layer = {str(size): torch.nn.Parameter(torch.empty(size, device="meta")) for size in sizes}
    monkeypatch.setattr(cost, "shape_of", lambda model: shape)
    monkeypatch.setattr(cost, "select_parameters", lambda *of: layer)
    config = MetaTrainConfig("m", dtype="bfloat16", device="cpu")
    frozen = 2 * 7_800_000_000
    copy, largest = 4 * 200_000_000, 4 * 150_000_000  # θ, its moments, and of each task the weights, two moments and one gradient
    assert cost.run_bytes(config, 100) == frozen + (1 + 2 + 3) * copy + largest
    assert cost.run_bytes(replace(config, tasks_per_step=4), 100) == frozen + (1 + 2 + 12) * copy + 4 * largest
    assert cost.run_bytes(replace(config, tasks_per_step=4, tasks_at_once=1), 100) == frozen + 7 * copy + largest, "and a sum"


def test_a_plan_needs_no_weights(place, monkeypatch, capsys):
    (place / "base" / "model.safetensors").unlink()
    assert figure4(arguments(place, "--depths", "0,0.9", "--plan", "--seconds-a-task", "60")) == 0
    printed = capsys.readouterr().out
    assert printed.count("4 tasks, about 4 min") == 2
    monkeypatch.setattr(cost, "find_model_folder", lambda name: None)
    assert figure4(arguments(place, "--depths", "0,0.9", "--plan")) == 0
    assert "about 0 min of meta-training are left and 2 runs of unknown time" in capsys.readouterr().out


def test_a_checkpoint_is_as_large_as_planned(place):
    assert figure3(arguments(place, "--every", "2")) == 0
    [folder] = (place / "out" / "checkpoints").iterdir()
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    config = sweeps.read_configs(StudyOptions(device="cpu"), SweepOptions(Names(["tiny"])), ["valid-ood"])["tiny"]
    planned = cost.checkpoint_bytes(replace(config, checkpoint_every=2), 4)
    assert planned == pytest.approx(size, rel=0.3), "the files have headers too, which are large only here"


SERIES = ("a model with a long name attention+mlp", "another model with a long name mlp", "third")


def make_lines(num_panels):
    rows = [
        {"panel": f"d{panel}", "series": name, "layer": layer, "accuracy": 0.5, "low": 0.4, "high": 0.6, "chosen": layer == 5}
        for panel in range(num_panels)
        for name in SERIES
        for layer in (1, 5, 9)
    ]
    table = pd.DataFrame(rows).assign(n=100, reported=False, split="validation")
    tests = table[table["chosen"]].assign(reported=True, split="test (chosen on validation)")
    return pd.concat([table, tests], ignore_index=True)


@pytest.mark.parametrize("num_panels", [1, 2])
def test_nothing_of_a_picture_is_cut_off_or_hidden(num_panels):
    figure = pictures.draw_lines(make_lines(num_panels), "layer", "series", "one layer at a time", "layer")
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    [legend] = figure.legends
    for part in (figure._suptitle, legend, *figure.axes):
        box = part.get_tightbbox()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, part
    assert {text.get_text() for text in legend.get_texts()} == {*SERIES, "the best (filled) on test"}
    assert all(not legend.get_window_extent().overlaps(axis.get_window_extent()) for axis in figure.axes)
    places = {container.lines[0].get_xdata()[0] for container in figure.axes[0].containers}
    assert len(places) == 6, "error bars of series at one layer do not coincide"


def test_twelve_series_are_told_apart_in_grey_and_more_are_refused(place, capsys):
    table = make_lines(1).query("not reported and series == 'third'").assign(chosen=False)
    table = pd.concat([table.assign(series=f"s{number}") for number in range(12)], ignore_index=True)
    [axis] = pictures.draw_lines(table, "layer", "series", "one layer at a time", "layer").axes
    lines = [container.lines[0] for container in axis.containers]
    assert len({line.get_marker() for line in lines}) == 12
    assert len({(str(line._unscaled_dash_pattern), line.get_color()) for line in lines}) == 12
    pictures.require_styles([f"s{number}" for number in range(12)])
    with pytest.raises(ConfigError, match="at most 12 lines that are told apart in grey, got 13: s0"):
        pictures.require_styles([f"s{number}" for number in range(13)])
    models = ",".join(f"m{number}" for number in range(5))
    assert figure2(arguments(place, "--models", models, "--layers", "0")) == 2
    assert "got 15: m0 attention" in capsys.readouterr().err and not checkpoints(place)


def test_dots_of_table1_are_told_apart():
    rows = [
        {
            "panel": "cre-id",
            "modules": modules,
            "own": own,
            "accuracy": 0.5,
            "low": 0.4,
            "high": 0.6,
            "cited": 18.6 if own else None,
        }
        for modules in ("mlp", "attention+mlp")
        for own in (True, False)
    ]
    table = pd.DataFrame(rows).assign(n=100, split="test")
    figure = pictures.draw_dots(table, "modules", "own", ("with", "without"), "cited", "all layers trained")
    figure.draw_without_rendering()
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"with", "without", "published"}
    [axis] = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["mlp", "attention+mlp"]
    assert len({(c.lines[0].get_ydata()[0], c.lines[0].get_markerfacecolor()) for c in axis.containers}) == 4
    width, _ = figure.get_size_inches() * figure.dpi
    assert axis.get_tightbbox().x0 >= 0 and figure.legends[0].get_tightbbox().x1 <= width
