"""Settings files: strict, and read as EasyEdit reads them."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tiny
import torch

from propmeta_edit import EditSettings, MetaFTHyperParams
from propmeta_edit.config import build_config, read_yaml
from propmeta_edit.easyedit.algorithms import default_layers, fill_layers
from propmeta_edit.easyedit.hparams import edit_settings_of
from propmeta_edit.errors import ConfigError, ModelError
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.models.devices import resolve_device
from propmeta_edit.models.layers import get_architecture, resolve_layers, select_parameters

HPARAMS = Path(__file__).resolve().parents[2] / "hparams"
EDITED_AS = {
    "smollm2-135m-all-layers": "FT-all-layers/smollm2-135m.yaml",
    "llama3-8b-instruct": "MetaFT/llama3-8b.yaml",
    "smollm2-135m-real-bound": "MetaFT/smollm2-135m-bound.yaml",
}


def write(tmp_path, text):
    path = tmp_path / "hparams.yaml"
    path.write_text(text)
    return path


def test_numbers_as_text_are_numbers_and_the_suffix_is_optional(tmp_path):
    write(tmp_path, 'model_name: x\ndevice: cpu\nlr: 5e-4\nnum_steps: "7"\nlayers: [1]\n')
    hparams = MetaFTHyperParams.from_hparams(str(tmp_path / "hparams"))
    assert (hparams.lr, hparams.num_steps, hparams.layers) == (5e-4, 7, [1])
    assert hparams.edit.inner_lr == 5e-4 and hparams.edit.num_inner_steps == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model_name: x\nlearning_rate: 1\n", "unknown setting learning_rate; known are model_name, alg_name"),
        ("lr: 0.1\n", "missing setting model_name"),
        ("model_name: x\nlr: fast\n", "lr"),
        ("model_name: x\nnum_steps: 2.5\n", "num_steps"),
        ("model_name: x\nalg_name: FT\n", "alg_name must be MetaFT for these settings, got 'FT'"),
        ("model_name: x\nnum_steps: -1\n", "must be 0 or more, got -1"),
        ("model_name: x\nbatch_size: 0\n", "batch_size must be 1 or more, got 0"),
        ("model_name: x\ndevice: tpu9\n", "device must be auto, cpu, mps, cuda or cuda:N, got 'tpu9'"),
        ("model_name: x\nmodel_parallel: true\n", "model_parallel is not available"),
        ("model_name: x\n  lr: [\n", "line 2: broken YAML"),
        ("- a\n- b\n", "must hold a mapping of settings, got list"),
    ],
)
def test_bad_settings_name_the_setting(tmp_path, text, message):
    with pytest.raises(ConfigError, match=None) as caught:
        MetaFTHyperParams.from_hparams(write(tmp_path, text))
    assert message in str(caught.value) and "hparams.yaml" in str(caught.value)


def test_missing_file():
    with pytest.raises(ConfigError, match=r"no such settings file: nowhere\.yaml"):
        MetaFTHyperParams.from_hparams("nowhere")


def test_absent_cuda_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device(0) == "cuda:0" and resolve_device("cuda:0") == "cuda:0"
    with pytest.raises(ConfigError, match="this machine has 1 CUDA devices"):
        resolve_device(1)


def test_model_name_unpacks_to_the_model(family, tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "t5-in-the-name"
    tiny.make_model(family, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    hparams = MetaFTHyperParams(model_name=str(folder), device="cpu", layers=[1])
    assert type(hparams.model_name) is not str and hparams.model_name == str(folder)
    model, tok = hparams.model_name
    assert model.config.model_type == family and tok.padding_side == "left"
    assert hparams.model_name.lower() == family
    assert json.loads(json.dumps(hparams.to_dict()))["model_name"] == str(folder)
    for copied in (copy.deepcopy(hparams), pickle.loads(pickle.dumps(hparams))):
        assert copied == hparams and copied.model_name.hparams is copied
    monkeypatch.setattr("propmeta_edit.easyedit.hparams.load_model", lambda name, **options: options["device"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    hparams.device = 1  # as scripts that pick a GPU do with EasyEdit's own
    assert hparams.load_model() == "cuda:1"


@pytest.mark.parametrize("path", sorted(HPARAMS.glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_yaml_loads(path):
    edits = dict.fromkeys(("MetaFT", "FT", "FT-paraphrases", "FT-all-layers", "FT-subject"), MetaFTHyperParams)
    cls = {**edits, "MetaTrain": MetaTrainConfig}.get(path.parent.name)
    assert path.read_text().startswith("# ")
    if cls is None:
        assert read_yaml(path)["alg_name"] == {"FT-L": "FT", "FT-M": "FT"}.get(path.parent.name, path.parent.name)
    else:
        values = read_yaml(path)
        if "device" in values:
            values["device"] = "cpu"
        build_config(cls, values, str(path))


FINE_TUNED = ("MetaFT", "FT", "FT-paraphrases", "FT-all-layers", "MetaTrain")


@pytest.mark.parametrize(
    "path",
    [path for method in FINE_TUNED for path in sorted((HPARAMS / method).glob("*.yaml"))],
    ids=lambda p: f"{p.parent.name}/{p.name}",
)
def test_its_layers_and_modules_are_in_the_model_it_is_for(path):
    values = read_yaml(path)
    name = max((name for name in tiny.SHAPES if path.stem.startswith(name)), key=len)
    family, depth = tiny.SHAPES[name]
    model = tiny.make_model(family, num_layers=depth)
    chosen = select_parameters(model, values.get("layers"), values.get("modules", "attention+mlp"))
    layers = resolve_layers(values.get("layers"), depth)
    architecture = get_architecture(model)
    for layer in layers:
        for part in (*architecture.attention, *architecture.mlp):
            assert any(key.startswith(f"{architecture.blocks}.{layer}.{part}.") for key in chosen), (layer, part)
    assert len(chosen) == len(layers) * {"llama": 7, "qwen2": 10, "gpt2": 8, "gemma3_text": 7}[family]


@pytest.mark.parametrize(
    ("name", "depth", "layers"),
    [
        ("ROME", 32, [5]),
        ("ROME", 2, [0]),
        ("MEMIT", 32, [4, 5, 6, 7, 8]),
        ("AlphaEdit", 18, [2, 3, 4, 5, 6]),
        ("MEMIT", 4, [0, 1, 2, 3]),
        ("FT", 32, [21]),
        ("FT", 1, [0]),
        ("CaKE", 32, None),
    ],
)
def test_layers_by_depth(name, depth, layers):
    assert default_layers(name, depth) == layers


def test_layers_are_filled_where_they_are_left_out(tmp_path, caplog):
    tiny.make_model("gpt2", num_layers=16).config.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="propmeta_edit.easyedit.algorithms"):
        assert fill_layers("ROME", {"layers": None}, str(tmp_path)) == {"layers": [2], "v_loss_layer": 15}
    assert "ROME: layers [2], by the 16 layers of" in caplog.text and "ROME: v_loss_layer 15" in caplog.text
    assert fill_layers("FT", {"lr": 1}, str(tmp_path)) == {"lr": 1, "layers": [10]}
    given = {"layers": [3], "v_loss_layer": 7}
    assert fill_layers("MEMIT", given, "no model is looked at") == given and fill_layers("CaKE", {}, "nor here") == {}
    with pytest.raises(ModelError, match="unknown model 'nowhere'"):
        fill_layers("MEMIT", {"layers": [3]}, "nowhere")


def test_what_an_edit_is_made_with_comes_whole_from_every_kind_of_settings():
    """None of the values is a default; those that EasyEdit calls otherwise are among them."""
    own = EditSettings([3], "mlp", 3e-4, 7, weight_decay=0.3, loss_reduction="sum", batch_size=5)
    shared = {"layers": [3], "modules": "mlp", "weight_decay": 0.3, "loss_reduction": "sum"}
    assert MetaFTHyperParams("x", device="cpu", lr=3e-4, num_steps=7, batch_size=5, **shared).edit == own
    train = MetaTrainConfig("x", inner_lr=3e-4, num_inner_steps=7, **shared)
    assert train.edit == replace(own, batch_size=1)
    values = edit_settings_of(asdict(train))
    assert values == {"alg_name": "MetaFT", "lr": 3e-4, "num_steps": 7, **shared}
    assert MetaFTHyperParams("x", device="cpu", **values).edit == train.edit
    with pytest.raises(KeyError, match="num_inner_steps"):
        edit_settings_of({**shared, "inner_lr": 3e-4})


def test_saved_edits_and_rows_say_all_but_how_many_facts_share_an_update():
    assert EditSettings([3], batch_size=4).to_dict() == EditSettings([3]).to_dict() != EditSettings([4]).to_dict()
    whitened = EditSettings(inner_step="whitened")
    assert set(asdict(whitened)) - set(whitened.to_dict()) == {"batch_size", "positions", "tf32"}


def test_what_the_loop_cannot_use_is_refused():
    for values, message in (
        ({"inner_lr": -1.0}, "the inner learning rate must be 0 or more, got -1.0"),
        ({"num_inner_steps": -1}, "the number of inner steps must be 0 or more, got -1"),
        ({"loss_reduction": "max"}, "loss_reduction must be mean or sum, got 'max'"),
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            EditSettings(**values)


def test_metaft_settings_agree_with_meta_training():
    """An edit must use the loop that the checkpoint was meta-trained with; the controls are edited as the model they are for."""
    for path in sorted((HPARAMS / "MetaTrain").glob("*.yaml")):
        train = build_config(MetaTrainConfig, read_yaml(path), str(path))
        own = HPARAMS / EDITED_AS.get(path.stem, f"MetaFT/{path.stem}.yaml")
        edit = MetaFTHyperParams.from_hparams(own if own.exists() else HPARAMS / "MetaFT" / "smollm2-135m.yaml")
        steps = train.num_inner_steps or edit.num_steps  # the K = 0 control has no inner loop in training
        # facts of one update are how many a task has; EasyEdit's edit takes one
        assert edit.edit == replace(train.edit, num_inner_steps=steps, batch_size=edit.batch_size), path
        assert edit.layers == train.layers and edit.modules == train.modules


def test_controls_differ_from_the_shipped_settings_in_one_thing():
    """Each differs from smollm2-135m.yaml in what it is a control for, and in no schedule that would change its bits."""
    main = read_yaml(HPARAMS / "MetaTrain" / "smollm2-135m.yaml")
    schedule = {"validate_every", "validation_cases", "checkpoint_every"}
    expected = {"k0": {"num_inner_steps": 0}, "shuffled": {"pairing": "shuffled"}, "seed1": {"seed": 1}, "seed2": {"seed": 2}}
    for name, change in expected.items():
        control = read_yaml(HPARAMS / "MetaTrain" / f"smollm2-135m-{name}.yaml")
        assert control == {**{k: v for k, v in main.items() if k not in schedule}, **change}


def test_the_short_run_differs_in_its_length_and_its_steps():
    main, short = (read_yaml(HPARAMS / "MetaTrain" / f"smollm2-135m{name}.yaml") for name in ("", "-five-minutes"))
    assert short == {**{k: v for k, v in main.items() if k in short}, "num_tasks": 500, "tasks_per_step": 8, "outer_lr": 2e-3}


def test_other_settings_of_the_same_model_differ_in_what_they_say():
    """Table 1's own rates, and the Instruct model that the paper's Table 1 is of."""
    changes = {
        ("smollm2-135m", "smollm2-135m-all-layers"): {"layers": "all", "inner_lr": 5e-5, "outer_lr": 5e-5},
        ("llama3-8b", "llama3-8b-instruct"): {"model": "meta-llama/Meta-Llama-3-8B-Instruct"},
    }
    for (main, other), change in changes.items():
        values = [read_yaml(HPARAMS / "MetaTrain" / f"{name}.yaml") for name in (main, other)]
        assert values[1] == {**values[0], **change}
