"""The same on every device: what a GPU computes is what the CPU computes, up to rounding, and all of it runs there.

Each test runs on the CPU everywhere, and on the GPU of a machine that has one (``pytest -m gpu``).
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors.torch import load_file

from propmeta_edit import Edit, EditedModel, MetaFTHyperParams, compute_edit, edit_many, generate_with_edits
from propmeta_edit.cli import main
from propmeta_edit.easyedit.plugin import apply_metaft_to_model
from propmeta_edit.finetune.single_edit import write_facts
from propmeta_edit.records import as_requests

FACTS = [
    {"prompt": f"Ann {name} lives in", "target_new": place} for name, place in (("Lee", "Peru"), ("Orr", "Oslo"), ("Ray", "Rome"))
]
PROMPTS = ["Question: Where does Ann Lee live?\nAnswer: The answer is", "Ann Orr lives in", "Paris is"]
NUM_TASKS = 12


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return request.param


@pytest.fixture
def base(tmp_path, tokenizer):
    tiny.write_records(tmp_path / "train.jsonl", tiny.world_records("train_data_id", NUM_TASKS))
    return tiny.save_model_folder(tmp_path / "base", tokenizer)


def settings_on(device, base, **more):
    return MetaFTHyperParams(str(base), device=device, layers=[1], lr=1e-2, num_steps=5, **more)


def weights_after(device, base, **more):
    hparams = settings_on(device, base, **more)
    model, tokenizer = hparams.load_model()
    edit = compute_edit(model, tokenizer, FACTS[0], hparams)
    return {name: value.cpu() for name, value in edit.change().items()}


def close_to(values, expected, tolerance):
    """Relative to the whole change: AdamW's steps amplify the rounding of single entries."""
    difference = sum(float((values[name] - expected[name]).square().sum()) for name in expected)
    return difference <= tolerance**2 * sum(float(value.square().sum()) for value in expected.values())


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.02), ("bfloat16", 0.4)])
def test_an_edit_is_the_cpus_edit(device, base, dtype, tolerance):
    expected = weights_after("cpu", base)
    assert expected and close_to(weights_after(device, base, dtype=dtype), expected, tolerance)
    assert not close_to({name: torch.zeros_like(value) for name, value in expected.items()}, expected, tolerance)


def test_an_edit_is_put_in_place_taken_out_kept_and_asked(device, base, tmp_path):
    hparams = settings_on(device, base)
    model, tokenizer = hparams.load_model()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    edits = edit_many(model, tokenizer, FACTS, hparams, at_once=2)
    edits[0].save(tmp_path / "edit")
    loaded = Edit.load(tmp_path / "edit")
    one_by_one = [EditedModel(model, edit).answer(tokenizer, [prompt])[0] for edit, prompt in zip(edits, PROMPTS, strict=True)]
    assert generate_with_edits(model, tokenizer, PROMPTS, edits) == one_by_one
    assert EditedModel(model, loaded).answer(tokenizer, PROMPTS[:1]) == one_by_one[:1]
    with loaded.applied(model):
        assert not all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    write_facts(model, tokenizer, as_requests(FACTS), replace(hparams.edit, batch_size=2))
    for name, value in model.named_parameters():
        assert value.device.type == device and torch.equal(value, before[name]) == (name not in edits[0].weights), name


def test_easyedits_way_gives_the_weights_of_before(device, base):
    hparams = settings_on(device, base)
    model, tokenizer = hparams.load_model()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    _, original = apply_metaft_to_model(model, tokenizer, FACTS[:1], hparams, return_orig_weights=True)
    assert original and all(torch.equal(value, before[name]) for name, value in original.items())
    assert all(not torch.equal(model.get_parameter(name), value) for name, value in original.items())


def meta_train(base, tmp_path, device, output, *more):
    values = ["--model", str(base), "--data", str(tmp_path / "train.jsonl"), "--output", str(tmp_path / output), "--device", device]
    rates = ["--layers", "[1]", "--inner_lr", "0.01", "--num_inner_steps", "3", "--outer_lr", "0.01"]
    assert main(["meta-train", *values, *rates, *more]) == 0
    losses = [entry["related_loss"] for entry in json.loads((tmp_path / output / "progress.json").read_text())["losses"]]
    return load_file(tmp_path / output / "model.safetensors"), losses


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--tasks_per_step", "4"),
        ("--tasks_per_step", "4", "--tasks_at_once", "2", "--validate_every", "4", "--validation_cases", "2"),
        ("--questions_per_task", "2", "--outer_terms", "{related: 1.0, locality: 0.3}"),
    ],
    ids=["one", "four", "accumulated", "terms"],
)
def test_meta_training_is_the_cpus(device, base, tmp_path, more):
    expected, expected_losses = meta_train(base, tmp_path, "cpu", "expected", *more)
    found, losses = meta_train(base, tmp_path, device, "found", *more)
    start = load_file(base / "model.safetensors")
    moved, expected_move = ({name: value - start[name] for name, value in w.items()} for w in (found, expected))
    assert losses == pytest.approx(expected_losses, rel=0.02)
    assert close_to(moved, expected_move, 0.1) and any(value.any() for value in expected_move.values())


def test_the_same_run_gives_the_same_bits(device, base, tmp_path):
    runs = [meta_train(base, tmp_path, device, name, "--tasks_per_step", "2", "--dtype", "bfloat16")[0] for name in ("one", "two")]
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())
