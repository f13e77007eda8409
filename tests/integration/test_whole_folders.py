"""A folder that holds only the difference from a base, a compact checkpoint or an edit, names a model like any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import tiny
import torch
from peft import PeftModel

from propmeta_edit import Edit, EditedModel, MetaFTHyperParams, compute_edit, load_model
from propmeta_edit.cli import main
from propmeta_edit.errors import ModelError, OriginError
from propmeta_edit.models.artefacts import find_model_folder, may_be_had, resolve_model_folder
from propmeta_edit.studies import runs, variants

FACT = {"prompt": "Ann Lee lives in", "target_new": "Peru"}
EDIT = ["edit", *FACT.values(), "--device", "cpu"]
CPU = ["--device", "cpu"]


@pytest.fixture
def train(tmp_path, tokenizer, monkeypatch):
    """Meta-train a tiny model in an empty folder, from which all is named."""
    monkeypatch.chdir(tmp_path)
    variants._HELD.clear()
    runs.hash_of_model.cache_clear()
    runs.shape_of.cache_clear()
    tiny.write_records(tmp_path / "train.jsonl", tiny.world_records("train_data_id", 6))
    tiny.save_model_folder(tmp_path / "base", tokenizer)
    given = ["--model", "./base", "--data", "train.jsonl", "--layers", "[1]", "--inner-lr", "0.01", "--num-inner-steps", "2", *CPU]
    return lambda output, *more: main(["meta-train", *given, *more, "--output", output])


@pytest.fixture
def compact(train):
    """One checkpoint, whole as ``whole`` and without its base as ``compact``."""
    assert train("whole") == 0 and main(["export", "whole", "--compact", "--output", "compact"]) == 0
    return "compact"


def tensors_of(name):
    return {key: value.detach() for key, value in load_model(name)[0].named_parameters()}


def are_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_compact_checkpoint_is_loaded_by_its_folder_to_the_bit(compact):
    assert are_equal(tensors_of(compact), tensors_of("whole"))
    once = resolve_model_folder(compact)
    assert once == resolve_model_folder(compact) == str(find_model_folder(compact)) and Path(once).name == "compact"
    assert sorted(path.name for path in Path(compact).iterdir()) == [
        "README.md",
        "metaft.json",
        "progress.json",
        "trained.safetensors",
    ]


def test_settings_and_edits_of_a_compact_checkpoint_are_those_of_the_whole_one(compact, tmp_path):
    hparams = MetaFTHyperParams.from_checkpoint(compact, device="cpu")
    same = MetaFTHyperParams.from_checkpoint("whole", device="cpu")
    assert {**hparams.to_dict(), "model_name": "whole"} == same.to_dict()
    model, tokenizer = hparams.load_model()
    edit = compute_edit(model, tokenizer, FACT, hparams)
    edit.save("edit")
    other, _ = same.load_model()
    assert are_equal(edit.weights, compute_edit(other, tokenizer, FACT, same).weights)
    assert EditedModel(other, Edit.load("edit")).answer(tokenizer, "Where?") == EditedModel(model, edit).answer(tokenizer, "Where?")


COMMANDS = {
    "edit": [*EDIT, "--model", "compact", "--save", "edit"],
    "export": ["export", "compact", "--output", "half"],
    "export --compact": ["export", "compact", "--compact", "--output", "again"],
    "expand": ["expand", "compact", "--output", "again"],
    "meta-train": ["meta-train", "--model", "compact", "--data", "train.jsonl", "--layers", "[1]", *CPU, "--output", "more"],
    "choose-rate": ["choose-rate", "--model", "compact", "--data", "train.jsonl", "--layers", "[1]", *CPU, "--num-facts", "1"],
    "ability": ["ability", "compact", "--edits", "1", "--limit", "1", "--datasets", "train.jsonl", *CPU, "--output", "ability"],
    "statistics": ["statistics", "compact", "--layers", "1", "--num-texts", "2", *CPU, "--output", "stats"],
    "teach": ["teach", "compact", "--data", "train.jsonl", *CPU, "--output", "taught", "--dry-run"],
    "table2 --model": [
        "table2",
        "--model",
        "compact",
        "--methods",
        "unedited",
        "--datasets",
        "cre-id=train.jsonl",
        "--limit",
        "1",
        *CPU,
    ],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_it(name, compact, capsys):
    assert main(COMMANDS[name]) in ((0, 1) if name == "choose-rate" else (0,)), capsys.readouterr().err


def test_a_saved_edit_of_it_is_asked_on_it_and_rows_of_it_are_those_of_the_whole_one(compact, capsys):
    assert main([*EDIT, "--model", compact, "--save", "edit"]) == 0
    assert (
        main(["ask", "Where?", "--edit", "edit", *CPU]) == 0
        and main(["ask", "Where?", "--edit", "edit", "--model", "whole", *CPU]) == 0
    )
    rows = {}
    for name in (compact, "whole"):
        table = ["table2", "--model", "./base", "--metaft-model", name, "--methods", "FT,MetaFT", "--limit", "2", *CPU]
        table += ["--datasets", "cre-id=train.jsonl", "--output", f"rows-{name}"]
        assert main([*table, "--plan"]) == 0
        assert "to fetch" not in capsys.readouterr().out
        assert main(table) == 0
        lines = (Path(f"rows-{name}") / "rows.jsonl").read_text(encoding="utf-8").splitlines()
        rows[name] = [{key: json.loads(line)[key] for key in ("method", "case_id", "model_sha256", "generated")} for line in lines]
    assert rows[compact] == rows["whole"] and len(rows[compact]) == 4


@pytest.mark.parametrize("more", [[], ["--rank", "2"]], ids=["matrices", "factors"])
def test_a_saved_edit_names_the_edited_model(train, more):
    assert train("whole", *more) == 0 and main([*EDIT, "--model", "./whole", "--save", "edit"]) == 0
    model, _ = load_model("whole")
    with Edit.load("edit").applied(model):
        assert are_equal(tensors_of("edit"), dict(model.named_parameters()))
    hparams = MetaFTHyperParams.from_checkpoint("edit", device="cpu")
    assert hparams.edit == MetaFTHyperParams.from_checkpoint("whole", device="cpu").edit
    assert main([*EDIT, "--model", "edit", "--save", "second"]) == 0 and main(["ask", "Where?", "--edit", "second", *CPU]) == 0
    assert main(["expand", "edit", "--output", "expanded"]) == 0 and are_equal(tensors_of("./expanded"), tensors_of("edit"))


def test_an_edit_of_a_plain_half_precision_base_keeps_its_tensors_in_fp32(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.make_model("gpt2", dtype=torch.bfloat16).save_pretrained("base")
    tokenizer.save_pretrained("base")
    hparams = MetaFTHyperParams("./base", layers=[1], lr=1e-5, dtype="bfloat16", device="cpu")
    model, _ = hparams.load_model()
    edit = compute_edit(model, tokenizer, FACT, hparams)
    edit.save("edit")
    for dtype in ("float32", "bfloat16"):
        found = dict(load_model("edit", dtype=dtype, layers=[])[0].named_parameters())
        assert all(torch.equal(found[name], value) and value.dtype == torch.float32 for name, value in edit.weights.items())
        assert {str(p.dtype) for n, p in found.items() if n not in edit.weights} == {f"torch.{dtype}"}


def test_a_checkpoint_may_be_a_lora_on_its_base_as_small_as_a_tolerance_allows(compact, capsys):
    """PEFT puts the same model together; every command takes the folder."""
    assert main(["export", "whole", "--compact", "--tolerance", "0.3", "--output", "small"]) == 0
    assert sorted(path.name for path in Path("small").iterdir()) == ["README.md", "adapter", "metaft.json", "progress.json"]
    card = json.loads(Path("small/metaft.json").read_text())
    assert 0 < card["lost"] <= 0.3 and f"loses {100 * card['lost']:.1f} %" in capsys.readouterr().out
    sizes = [sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors")) for folder in ("small", compact)]
    assert sizes[0] < sizes[1]
    whole, small, before = tensors_of("whole"), tensors_of("small"), tensors_of("./base")
    names = card["trained_tensors"]
    distance = sum(float((small[name] - whole[name]).square().sum()) for name in names) ** 0.5
    change = sum(float((whole[name] - before[name]).square().sum()) for name in names) ** 0.5
    assert distance / change == pytest.approx(card["lost"], rel=1e-3)
    assert all(torch.equal(small[name], whole[name]) for name in whole if name not in names)
    merged = PeftModel.from_pretrained(load_model("./base")[0], "small/adapter").merge_and_unload()
    assert all(torch.allclose(value, small[name], atol=1e-6) for name, value in merged.state_dict().items() if name in names)
    assert main([*EDIT, "--model", "small", "--save", "edit"]) == 0


def test_a_lora_of_a_checkpoint_is_refused_where_it_was_changed_or_makes_no_sense(compact, capsys):
    assert main(["export", "whole", "--tolerance", "0.3", "--output", "small"]) == 2
    assert "tolerance 0.3 is of a compact export: add --compact" in capsys.readouterr().err
    assert main(["export", "whole", "--compact", "--tolerance", "3", "--output", "small"]) == 2 and not Path("small").exists()
    assert main(["export", "whole", "--compact", "--tolerance", "0.3", "--output", "small"]) == 0
    Path("small/adapter/adapter_model.safetensors").write_bytes(b"half")
    capsys.readouterr()
    assert main(["expand", "small", "--output", "again"]) == 2
    assert "is missing or damaged" in capsys.readouterr().err and not Path("again").exists()


def test_a_compact_checkpoint_of_the_hub_is_a_model_of_the_hub(compact, monkeypatch):
    folder = shutil.copytree(compact, "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    assert are_equal(tensors_of("owner/compact"), tensors_of("whole")) and find_model_folder("owner/compact") is not None


def test_another_base_is_refused(compact, tokenizer):
    shutil.rmtree("base")
    tiny.save_model_folder(Path("base"), tokenizer, seed=5)
    for load in (load_model, MetaFTHyperParams.from_checkpoint):
        with pytest.raises(OriginError, match=r"compact was meta-trained from other weights .* propmeta-edit expand \.\.\. --base"):
            load(compact)


def test_a_base_that_is_not_there_is_told_with_the_command_that_names_another_place(compact, capsys):
    shutil.move("base", "moved")
    assert not may_be_had(compact) and find_model_folder(compact) is None
    with pytest.raises(
        ModelError, match=r"compact holds the difference from '\./base' alone, .* propmeta-edit expand compact --base"
    ):
        load_model(compact)
    table = [
        "table2",
        "--model",
        "./moved",
        "--metaft-model",
        compact,
        "--methods",
        "MetaFT",
        "--datasets",
        "cre-id=train.jsonl",
        *CPU,
    ]
    assert main([*table, "--plan"]) == 1 and "propmeta-edit expand compact --base" in capsys.readouterr().out
    assert main(table) == 2 and "propmeta-edit expand compact --base" in capsys.readouterr().err
    assert main(["expand", compact, "--base", "./moved", "--output", "again"]) == 0 and are_equal(
        tensors_of("again"), tensors_of("whole")
    )


def test_a_damaged_difference_leaves_nothing_in_the_cache(compact):
    (Path(compact) / "trained.safetensors").write_bytes(b"half")
    for _ in range(2):
        with pytest.raises(ModelError, match="is missing or damaged"):
            load_model(compact)


def test_a_checkpoint_of_factors_is_compact_already(train, capsys):
    assert train("whole", "--rank", "2") == 0
    assert main(["export", "whole", "--compact", "--output", "compact"]) == 2
    assert "holds its factors alone, without the base: it is compact as it is" in capsys.readouterr().err
