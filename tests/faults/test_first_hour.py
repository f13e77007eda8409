"""The likeliest mistakes of a first hour: each ends with code 2, the value that is wrong, and what to do next."""

from __future__ import annotations

import os
from unittest.mock import Mock

import huggingface_hub
import pytest
import tiny
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from propmeta_edit.cli import main
from propmeta_edit.easyedit import forms
from propmeta_edit.finetune import single_edit
from propmeta_edit.models import loading
from propmeta_edit.studies import runs, variants

FACT = ["Ann Lee lives in", "Peru"]
CPU = ["--device", "cpu"]
EDIT = ["edit", *FACT, *CPU, "--model"]
TRAIN = ["meta-train", "--model", "./my-model", "--layers", "[1]", "--num-inner-steps", "2", *CPU]
TABLE = ["table2", "--model", "./my-model", "--metaft-model", "my-checkpoint", "--datasets", "cre-id=test.jsonl", *CPU, "--methods"]
MEMIT = "alg_name: MEMIT\nstats_dir: stats\nlayers: [1]\nv_loss_layer: 2\nmom2_dataset: sampled\nmom2_n_samples: 5\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What somebody has after half an hour: a model, data, a checkpoint, an edit, a table; and things that look like these."""
    folder, before = tmp_path_factory.mktemp("hour"), os.getcwd()
    os.chdir(folder)
    tokenizer = tiny.make_tokenizer()
    for name, seed in (("my-model", 0), ("other-model", 5)):
        tiny.save_model_folder(folder / name, tokenizer, seed=seed)
    for name in ("train", "test"):
        tiny.write_records(folder / f"{name}.jsonl", tiny.world_records(f"{name}_data_id", 3))
    assert main([*TRAIN, "--data", "train.jsonl", "--output", "my-checkpoint"]) == 0
    assert main([*EDIT, "my-checkpoint", "--save", "my-edit"]) == 0
    assert main([*TABLE, "unedited", "--limit", "1"]) == 0
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained("my-model"), LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained("adapter")
    (folder / "empty.jsonl").touch()
    (folder / "pictures").mkdir()
    tiny.write_records(folder / "other.jsonl", [{"text": "some text"}])
    (folder / "edit.yaml").write_text("alg_name: MetaFT\nmodel_name: my-checkpoint\nlayer: [1]\n")
    (folder / "train.yaml").write_text("model: ./my-model\ninner_rl: 0.01\n")
    (folder / "mine" / "MEMIT").mkdir(parents=True)
    (folder / "mine" / "MEMIT" / "my-model.yaml").write_text(MEMIT)
    (folder / "clone" / "easyeditor").mkdir(parents=True)
    (folder / "clone" / "easyeditor" / "__init__.py").touch()
    os.chdir(before)
    return folder


@pytest.fixture
def fail(folder, monkeypatch, capsys):
    """Give a command in that folder, which must end with code 2; what it said."""
    monkeypatch.chdir(folder)
    variants._HELD.clear()
    for cached in (runs.hash_of_model, runs.shape_of):
        cached.cache_clear()

    def run(*arguments):
        before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
        assert main(list(arguments)) == 2
        assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before, "it left something behind"
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said[said.index("error: ") :]

    return run


MISTAKES = {
    "no such model": ([*EDIT, "my-modle"], ["'my-modle'", "did you mean my-model?", "owner/name"]),
    "a subject that is not in the prompt": (
        [*EDIT, "my-checkpoint", "--subject", "Bob"],
        ["'Bob' does not occur in its prompt 'Ann Lee lives in'", "spell it as in the prompt, or leave the subject out"],
    ),
    "a prompt without its object": (["edit", FACT[0]], ["propmeta-edit edit 'Ann Lee lives in' 'the object'"]),
    "a model that was not meta-trained": (
        [*EDIT, "my-model"],
        ["my-model: it has no metaft.json", "propmeta-edit meta-train --model my-model --data FILE --output FOLDER", "--hparams"],
    ),
    "a folder that holds no model": (
        [*EDIT, "pictures"],
        ["pictures is no model's folder", "name the folder that has config.json"],
    ),
    "an adapter as the model to train": (
        ["meta-train", "--model", "./adapter", "--data", "train.jsonl", *CPU, "--output", "new"],
        ["./adapter holds an adapter of peft", "merge_and_unload().save_pretrained(FOLDER)"],
    ),
    "a layer outside the model": (
        [*TRAIN, "--data", "train.jsonl", "--layers", "[9]", "--output", "new"],
        ["layer 9", "it has layers 0 to 2 (0-based)"],
    ),
    "a mistyped key in an edit's YAML": (
        ["edit", *FACT, "--hparams", "edit.yaml"],
        ["edit.yaml: unknown setting layer", "did you mean layers?"],
    ),
    "a mistyped key in a run's YAML": (
        ["meta-train", "--config", "train.yaml", "--output", "new"],
        ["'inner_rl'", "did you mean inner_lr?", "propmeta-edit meta-train --help"],
    ),
    "a data file of another shape": (
        [*TRAIN, "--data", "other.jsonl", "--output", "new"],
        ["other.jsonl", "missing key 'entity_type'", "propmeta-edit data check other.jsonl"],
    ),
    "an empty data file": (
        [*TRAIN, "--data", "empty.jsonl", "--output", "new"],
        ["empty.jsonl: it holds no record", "expected a JSON list of objects, or one object a line"],
    ),
    "a mistyped data file": ([*TRAIN, "--data", "trian.jsonl", "--output", "new"], ["trian.jsonl", "did you mean train.jsonl?"]),
    "an output folder that is there": (
        [*TRAIN, "--data", "train.jsonl", "--output", "my-checkpoint"],
        ["my-checkpoint exists", "choose another --output"],
    ),
    "a results folder of another model": (
        ["table2", "--model", "./other-model", "--methods", "unedited", "--datasets", "cre-id=test.jsonl", "--limit", "1", *CPU],
        ["results/table2/rows.jsonl", "model_sha256", "choose another --output"],
    ),
    "a checkpoint of another base": (
        ["table2", "--model", "./other-model", *TABLE[3:], "MetaFT", "--output", "new"],
        ["my-checkpoint was meta-trained from other weights (./my-model", "name its own base with --model"],
    ),
    "an edit of another base": (
        ["ask", "Where?", "--edit", "my-edit", "--model", "./other-model", *CPU],
        ["on other weights (my-checkpoint", "apply it to the model it was made on", "--any-base"],
    ),
    "a folder that holds no edit": (
        ["ask", "Where?", "--edit", "my-checkpoint", *CPU],
        ["my-checkpoint holds no whole edit", "propmeta-edit edit --save"],
    ),
    "missing second moments": (
        [*TABLE, "MEMIT", "--hparams-dir", "mine", "--output", "new"],
        ["stats/my-model/", "propmeta-edit statistics ./my-model --layers '[1]' --dataset sampled --num-texts 5 --output stats"],
    ),
    "no settings for a method and a model": (
        [*TABLE, "ROME", "--output", "new"],
        ["no settings for ROME on 'my-model'", "--hparams NAME", "FOLDER/ROME/my-model.yaml", "begin with a copy of one in"],
    ),
    "a mistyped method": ([*TABLE, "MetFT", "--output", "new"], ["MetFT", "did you mean MetaFT?"]),
    "a mistyped data set": (
        ["table2", "--datasets", "wrold-id", "--methods", "unedited"],
        ["'wrold-id'", "did you mean world-id?"],
    ),
    "a released data set that is not here": (
        ["table2", "--datasets", "cre-ood", "--methods", "unedited"],
        ["cre-ood does not come with the package", "write cre-ood=test_data_ood.jsonl", "PROPMETA_DATA"],
    ),
    "a mistyped verb": (["edti"], ["'edti'", "did you mean edit?"]),
    "a mistyped option": (["edit", *FACT, "--modle", "x"], ["--modle", "did you mean --model?", "propmeta-edit edit --help"]),
    "a report of no folder": (["report", "results/tabel2"], ["results/tabel2: is no folder", "name the --output of a study"]),
    "an empty corpus": (
        ["statistics", "./my-model", "--layers", "1", "--corpus", "empty.jsonl", "--output", "new"],
        ["empty.jsonl holds 0 texts", "name another file with --corpus"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_with_the_next_step(fail, mistake):
    arguments, told = MISTAKES[mistake]
    said = fail(*arguments)
    assert [one for one in told if one not in said] == [], said


RESPONSE = Mock(headers={}, status_code=403)
OF_THE_HUB = {
    "gated": (GatedRepoError("403 Client Error", response=RESPONSE), ["owner/model is gated", "hf auth login"]),
    "no such name, or private": (
        RepositoryNotFoundError("404 Client Error", response=RESPONSE),
        ["no folder 'owner/model' here", "mend the name", "hf auth login"],
    ),
    "offline": (LocalEntryNotFoundError("not in the cache"), ["'owner/model'", "HF_HUB_OFFLINE is 1", "hf download owner/model"]),
}


@pytest.mark.parametrize("kind", OF_THE_HUB)
def test_a_model_that_the_hub_does_not_give(fail, monkeypatch, kind):
    error, told = OF_THE_HUB[kind]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=error))
    said = fail(*EDIT, "owner/model")
    assert [one for one in told if one not in said] == [], said


def run_out(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize(
    ("module", "name", "told"),
    [
        (loading, "select_parameters", ["while loading my-checkpoint", "--device cpu", "--dtype bfloat16"]),
        (single_edit, "apply_inner_loop", ["in an edit", "edit fewer layers", "dtype: bfloat16", "--device cpu"]),
    ],
    ids=["loading", "editing"],
)
def test_no_memory(fail, monkeypatch, module, name, told):
    monkeypatch.setattr(module, name, run_out)
    said = fail(*EDIT, "my-checkpoint")
    assert [one for one in ["out of memory", *told] if one not in said] == [], said


def test_no_memory_while_transformers_loads(fail, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", run_out)
    assert "out of memory while loading my-checkpoint" in fail(*EDIT, "my-checkpoint")


def test_cuda_is_asked_of_a_torch_for_cpus(fail, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in ("cuda", "hip"):
        monkeypatch.setattr(torch.version, name, None)
    said = fail("edit", *FACT, "--model", "my-checkpoint", "--device", "cuda")
    assert "'cuda'" in said and "use auto or cpu" in said and "pip install --force-reinstall torch --index-url URL" in said


def test_easyedit_is_missing(fail, monkeypatch):
    monkeypatch.setattr(forms, "find_easyeditor", lambda: None)
    said = fail(*TABLE, "ROME", "--hparams", "smollm2-135m", "--output", "new")
    assert "EasyEdit was not found" in said and "pip install" in said and "easyeditor==0.0.1.dev0" in said


@pytest.mark.parametrize(
    ("home", "told"),
    [("pictures", ["EASYEDIT_HOME is 'pictures'", "be unset"]), ("clone", ["no usable EasyEdit", "easyeditor==0.0.1.dev0"])],
)
def test_easyedit_home_names_something_else(fail, monkeypatch, home, told):
    monkeypatch.setenv("EASYEDIT_HOME", home)
    said = fail(*TABLE, "ROME", "--hparams", "smollm2-135m", "--output", "new")
    assert [one for one in told if one not in said] == [], said


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'gguf'"), ImportError("Please install gguf")])
def test_the_bench_extra_is_missing(fail, monkeypatch, error):
    monkeypatch.setattr(loading, "resolve_model_folder", Mock(side_effect=error))
    said = fail(*EDIT, "my-checkpoint")
    assert "gguf" in said and 'pip install "propmeta-edit[bench]"' in said


def test_a_rate_that_writes_nothing_is_a_warning_with_the_way_out(fail, folder, capsys, caplog):
    assert main([*EDIT, "my-checkpoint"]) == 0
    assert "this edit was not learnt (Ann Lee lives in -> Peru" in caplog.text and "propmeta-edit choose-rate" in caplog.text
