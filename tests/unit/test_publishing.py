"""Cards that the hub finds valid, and uploads; a stand-in for the hub, no network."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
import tiny
import torch
import yaml
from huggingface_hub import ModelCard

from propmeta_edit import MetaFTHyperParams
from propmeta_edit.cli import main
from propmeta_edit.edits.compute import compute_edit
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.metatrain.model_card import make_model_card
from propmeta_edit.models.loading import load_model

CARD = {
    "base_model": "owner/tiny-llama",
    "base_sha256": "b" * 64,
    "tasks_sha256": "t" * 64,
    "trained_tensors": ["model.layers.1.mlp.up_proj.weight"],
    "num_tasks": 6,
    "settings": {"data": "train.jsonl", "inner_lr": 0.01, "layers": [1]},
}
VALIDATION = [{"num_tasks": 0, "valid-id": 0.25}, {"num_tasks": 6, "valid-id": 0.5}]


@pytest.fixture
def hub(monkeypatch):
    """What was uploaded: the calls, in order. A card is refused as the hub does it, where its YAML cannot be read or lacks tags."""
    calls = []

    def validate(card, repo_type=None):
        values = yaml.safe_load(card.content.split("---")[1])
        if not isinstance(values.get("tags"), list) or None in values.values():
            raise ValueError("no valid card")
        calls.append(("validate", values))

    def create_repo(api, repo_id, **options):
        calls.append(("create_repo", repo_id, options))
        return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr(ModelCard, "validate", validate)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda api, **options: calls.append(("upload", options)))
    return calls


def test_a_card_says_what_is_needed_and_is_read_back_by_the_hubs_library():
    card = ModelCard(make_model_card(CARD, VALIDATION))
    assert card.data.base_model == "owner/tiny-llama" and card.data.library_name == "transformers" and card.data.license is None
    for told in (
        "| valid-id | 25.0 | 50.0 |",
        "t" * 64,
        "b" * 64,
        "train.jsonl",
        "## Limits",
        "@software",
        "from_checkpoint",
        "layers",
    ):
        assert told in card.text
    compact = make_model_card(CARD, is_compact=True)
    assert "propmeta-edit expand" in compact and "None was asked for" in compact and "from_checkpoint" in compact
    assert "AutoModelForCausalLM" in card.text and "AutoModelForCausalLM" not in compact
    half = make_model_card({**CARD, "exported_dtype": "bfloat16"})
    assert "rounded to bfloat16 in this copy" in half and "all of it in fp32" not in half


def test_the_base_of_a_card_is_a_hub_id_or_left_out_and_its_licence_the_bases(tmp_path, tokenizer):
    base = tiny.save_model_folder(tmp_path / "base", tokenizer)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    card = ModelCard(make_model_card({**CARD, "base_model": str(base)}))
    assert card.data.base_model is None and card.data.license == "apache-2.0" and str(base) in card.text


def test_a_checkpoint_and_an_edit_are_pushed(tmp_path, tokenizer, hub, capsys):
    base = tiny.save_model_folder(tmp_path / "base", tokenizer)
    tiny.write_records(tmp_path / "train.jsonl", tiny.world_records("train_data_id", 2))
    data = ["--model", str(base), "--data", str(tmp_path / "train.jsonl"), "--layers", "[1]", "--device", "cpu"]
    assert main(["meta-train", *data, "--output", str(tmp_path / "out")]) == 0
    hparams = MetaFTHyperParams.from_checkpoint(tmp_path / "out", device="cpu")
    assert hparams.layers == [1] and hparams.lr == 2e-5 and hparams.model_name == str(tmp_path / "out")
    assert main(["push", str(tmp_path / "out"), "me/tuned"]) == 0
    assert [call[0] for call in hub] == ["validate", "create_repo", "upload"] and hub[1][2] == {"private": True, "exist_ok": True}
    assert hub[2][1]["repo_id"] == "me/tuned" and "pushed" in capsys.readouterr().out
    model, _ = load_model(str(base))
    edit = compute_edit(model, tokenizer, {"prompt": "Ann Lee lives in", "target_new": "Peru"}, EditSettings([1], inner_lr=0.01))
    edit.save(tmp_path / "edit")
    assert main(["push", str(tmp_path / "edit"), "me/edit", "--public"]) == 0
    assert hub[4] == ("create_repo", "me/edit", {"private": False, "exist_ok": True})
    assert "Ann Lee lives in **Peru**" in (tmp_path / "edit" / "README.md").read_text()
    assert all(torch.equal(type(edit).load(tmp_path / "edit").weights[name], value) for name, value in edit.weights.items())


def test_what_is_neither_and_what_the_hub_refuses_is_told(tmp_path, hub, capsys):
    assert main(["push", str(tmp_path), "me/x"]) == 2
    assert "is neither a meta-tuned checkpoint (metaft.json) nor an edit (edit_config.json)" in capsys.readouterr().err
    (tmp_path / "metaft.json").write_text(json.dumps(CARD))
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert main(["push", str(tmp_path), "me/x"]) == 2
    assert "no valid card; to give it a token: hf auth login" in capsys.readouterr().err and not hub
