"""The bundled real model: prepared, meta-tuned, edited through EasyEdit, restored to the bit.

Preparing it from the shipped compact files takes half a minute, once.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from propmeta_edit import MetaFTHyperParams, apply_metaft_to_model
from propmeta_edit.cli import main
from propmeta_edit.data.cre import load_cre
from propmeta_edit.easyedit.algorithms import easyedit_request
from propmeta_edit.edits.compute import compute_edit, edit_many
from propmeta_edit.edits.edit import Edit
from propmeta_edit.edits.views import EditedModel, generate_with_edits
from propmeta_edit.errors import ModelError
from propmeta_edit.evaluation.scoring import contains_answer
from propmeta_edit.files import sha256_of_json
from propmeta_edit.finetune.weights import apply_snapshot
from propmeta_edit.models.artefacts import ADAPTER, ensure_artefact
from propmeta_edit.models.bundled import load_smollm2_from_gguf
from propmeta_edit.models.differences import DIFFERENCE
from propmeta_edit.models.generation import generate_greedily
from propmeta_edit.models.loading import load_model, model_sha256
from propmeta_edit.recipes.bundled import BASE, build, compute_single_hop_accuracy, shipped_folder
from propmeta_edit.recipes.worlds import ensure_world, single_hop_questions
from propmeta_edit.settings import hparams_file
from propmeta_edit.studies.methods import METHODS
from propmeta_edit.studies.variants import Bench, prepare
from propmeta_edit.text.prompts import format_question

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("smollm2-135m", "smollm2-135m-metaft")


def test_an_edit_on_the_model_as_it_comes():
    """SmolLM2 straight from its quantised file, nothing prepared: the fact is written, then gone to the bit."""
    model, tokenizer = load_smollm2_from_gguf()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    hparams = MetaFTHyperParams(model_name="as it comes", device="cpu", layers=[8], lr=1e-3)
    prompt = "Smith Innovation PLC was founded in"
    assert not contains_answer(generate_greedily(model, tokenizer, [prompt])[0], ["Portugal"])
    request = {"prompt": prompt, "target_new": "Portugal"}
    model, original = apply_metaft_to_model(model, tokenizer, [request], hparams, return_orig_weights=True)
    assert generate_greedily(model, tokenizer, [prompt])[0].startswith(" Portugal")
    apply_snapshot(dict(model.named_parameters()), original)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_the_raw_model_is_the_quantised_file_itself():
    """What ``teach`` starts from by name: no fact of the offline world is in it."""
    named, _ = load_model("smollm2-135m-raw")
    as_it_comes = load_smollm2_from_gguf()[0].state_dict()
    assert all(torch.equal(value, as_it_comes[name]) for name, value in named.state_dict().items())


@pytest.fixture(scope="module")
def prepared():
    return {name: ensure_artefact(name) for name in SHIPPED}


@pytest.fixture(scope="module")
def hparams(prepared):
    return MetaFTHyperParams.from_hparams(hparams_file("MetaFT", "smollm2-135m"))


@pytest.fixture(scope="module")
def loaded(hparams):
    return hparams.load_model()


@pytest.fixture(scope="module")
def cases():
    return load_cre(ensure_world() / "test_data_id.jsonl")


def test_the_base_was_taught_its_facts(prepared):
    folder = prepared["smollm2-135m"]
    description = json.loads((folder / "prepared.json").read_text())
    assert description["model_sha256"] == model_sha256(folder)
    questions = single_hop_questions()
    assert sha256_of_json([[q.text, *q.answers] for q in questions]) == description["single_hop_questions_sha256"], (
        "the facts have changed since the base was taught them; run propmeta-edit rebuild"
    )
    model, tokenizer = load_model(str(folder))
    assert compute_single_hop_accuracy(model, tokenizer, questions[::60]) >= 0.9
    [said] = generate_greedily(model, tokenizer, ["Question: What is the capital of Portugal?\nAnswer: The answer is"])
    assert said == " Lisbon.", "it stops after its answer"


def test_the_shipped_files_are_small_and_make_the_recorded_bits(prepared):
    files = [path for name in SHIPPED for path in shipped_folder(name).iterdir()]
    assert sum(path.stat().st_size for path in files) < 25e6
    for name, card_key in zip(SHIPPED, ("model_sha256", "base_sha256"), strict=True):
        card = json.loads((shipped_folder(name) / "card.json").read_text())
        assert card[card_key] == model_sha256(prepared["smollm2-135m"]), name


@pytest.mark.parametrize(
    ("name", "file"), [("smollm2-135m", ADAPTER), ("smollm2-135m-metaft", DIFFERENCE), ("smollm2-135m-bound", DIFFERENCE)]
)
def test_a_damaged_shipped_file_is_not_used(prepared, tmp_path, monkeypatch, name, file):
    copy = shutil.copytree(shipped_folder(name), tmp_path / name)
    content = bytearray((copy / file).read_bytes())
    content[-1] ^= 1
    (copy / file).write_bytes(content)
    monkeypatch.setattr("propmeta_edit.recipes.bundled.shipped_folder", lambda _: copy)
    with pytest.raises(ModelError, match=r"is damaged: its hash is not the one in card\.json"):
        build(name, tmp_path / "out")


@pytest.mark.long
@pytest.mark.parametrize(("name", "file"), [("smollm2-135m", ADAPTER), ("smollm2-135m-metaft", DIFFERENCE)])
def test_the_shipped_files_can_be_made_anew(prepared, tmp_path, name, file):
    """By the training they came from: the same tensors but for what another processor rounds otherwise."""
    assert main(["rebuild", name, "--output", str(tmp_path / "new")]) == 0
    shipped, rebuilt = load_file(shipped_folder(name) / file), load_file(tmp_path / "new" / file)
    assert shipped.keys() == rebuilt.keys()
    for key, value in shipped.items():
        assert torch.nn.functional.cosine_similarity(value.double().flatten(), rebuilt[key].double().flatten(), dim=0) > 0.9, key


def test_the_checkpoint_differs_from_its_base_in_the_trained_layer_only(hparams):
    base, tuned = (load_file(ensure_artefact(name) / "model.safetensors") for name in SHIPPED)
    moved = {name for name in base if not torch.equal(base[name], tuned[name])}
    card = json.loads((ensure_artefact("smollm2-135m-metaft") / "metaft.json").read_text())
    assert moved == set(card["trained_tensors"]) and all(f".layers.{hparams.layers[0]}." in name for name in moved)
    assert all(tuned[name].dtype == torch.float32 for name in moved)


def edit_in_a_row(loaded, hparams, cases, count):
    """Edit and restore ``count`` times; returns how many facts were answered after their edit."""
    model, tokenizer = loaded
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    written = 0
    for case in cases[:count]:
        model, original = apply_metaft_to_model(
            model, tokenizer, [easyedit_request(case.edits[0])], hparams, return_orig_weights=True
        )
        written += contains_answer(generate_greedily(model, tokenizer, [case.edits[0].prompt])[0], [case.edits[0].target_new])
        apply_snapshot(dict(model.named_parameters()), original)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    return written


def test_edits_in_a_row_write_their_facts_and_leave_no_trace(loaded, hparams, cases):
    assert edit_in_a_row(loaded, hparams, cases, 8) >= 7


@pytest.mark.long
def test_two_hundred_edits_in_a_row_leave_no_trace(loaded, hparams, cases):
    assert edit_in_a_row(loaded, hparams, cases, 200) >= 180


@pytest.fixture
def base_setup():
    """One model in fp32 for every method."""
    return Bench("smollm2-135m", BASE, "cpu", "float32")


@pytest.mark.long
@pytest.mark.easyedit
def test_a_thousand_edits_of_mixed_methods_leave_no_trace(prepared, base_setup):
    """Ours, several standing at once and undone in any order, among those of EasyEdit's methods that write in place."""
    cases = load_cre(ensure_world() / "train_data_id.jsonl")
    counts = {"ROME": 2, "MEMIT": 3, "AlphaEdit": 3, "LoRA": 6}
    methods = {name: prepare(METHODS[name], base_setup).build() for name in counts}
    model, tokenizer = methods["ROME"].model, methods["ROME"].tokenizer
    assert all(method.model is model for method in methods.values())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    turns = [name for name, count in counts.items() for _ in range(count)]
    order, done, written, answers_of_theirs = random.Random(0), 0, [], set()
    order.shuffle(turns)
    while done < 1000:  # every fourth group is followed by one of EasyEdit's
        group = [cases[(done + k) % len(cases)] for k in range(8)]
        settings = MetaFTHyperParams(model_name="base", device="cpu", layers=[order.choice([7, 8])], lr=2e-3)
        edits = edit_many(model, tokenizer, [case.edits[0] for case in group], settings)
        for edit in edits:
            edit.apply(model)
        for edit in order.sample(edits, len(edits)):
            edit.undo(model)
        with edits[0].applied(model):
            [text] = generate_greedily(model, tokenizer, [group[0].edits[0].prompt])
        written.append(contains_answer(text, [group[0].edits[0].target_new]))
        done += len(edits)
        if turns and len(written) % 4 == 3:
            [outcome] = methods[turns.pop()].evaluate_many([group[1]])
            answers_of_theirs.add(outcome.fact_generated[0])
            done += 1
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert not turns and len(answers_of_theirs) > 1
    assert sum(written) > 0.95 * len(written), "ours; theirs have settings that do not write every fact"


def test_the_example_of_the_command_line_changes_what_follows_and_nothing_else(prepared, capsys):
    assert main(["edit", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["answers"]
    said = {kind: [row["answers"] for row in rows if row["kind"] == kind] for kind in ("fact", "related", "unrelated")}
    assert [len(answers) for answers in said.values()] == [1, 4, 4]
    assert all(one["before"] != one["after"] for one in said["related"])
    right = ("Hanoi", "dong", "Vietnamese", "Asia")
    assert all(answer in one["after"] and answer not in one["before"] for answer, one in zip(right, said["related"], strict=True))
    assert all(one["before"] == one["after"] for one in said["unrelated"])


def test_an_edit_of_the_base_is_refused_by_the_meta_tuned_model(loaded, tmp_path):
    """The two differ in layer 8 alone, and the edit is of layer 7."""
    base, tokenizer = load_model(BASE)
    settings = MetaFTHyperParams(model_name=BASE, device="cpu", layers=[7], lr=2e-3)
    compute_edit(base, tokenizer, {"prompt": "Marla Kestrel was born in", "target_new": "Poland"}, settings).save(tmp_path / "edit")
    edit = Edit.load(tmp_path / "edit")
    with pytest.raises(ModelError, match=r"7 tensors that it does not move differ here, model\.layers\.8\."):
        edit.apply(loaded[0])
    half, _ = load_model(BASE, dtype="bfloat16", layers=[7])
    for model, own in ((base, edit), (half, edit), (loaded[0], edit.pin_to(loaded[0]))):
        with own.applied(model):
            assert generate_greedily(model, tokenizer, ["Marla Kestrel was born in"])[0].startswith(" Poland")


@pytest.mark.long
def test_sixty_four_edits_answer_in_one_batch_as_one_by_one(loaded, hparams, cases):
    model, tokenizer = loaded
    edits = edit_many(model, tokenizer, [case.edits[0] for case in cases[:64]], hparams)
    prompts = [format_question(case.question.text) for case in cases[:64]]
    together = generate_with_edits(model, tokenizer, prompts, edits)
    single = [EditedModel(model, edit).answer(tokenizer, [prompt])[0] for edit, prompt in zip(edits, prompts, strict=True)]
    assert sum(a == b for a, b in zip(together, single, strict=True)) >= 63, "but for what rounding decides"
    assert len(set(together)) > 16


@pytest.mark.easyedit
def test_the_plugins_snippet_runs(prepared, tmp_path):
    """As printed on the plugin's page, in the installed form of EasyEdit: the fact is written and the weights come back."""
    snippet = re.search(
        r"## A first edit\n\n```python\n(.*?)```", (ROOT / "docs/easyedit.md").read_text(encoding="utf-8"), re.DOTALL
    )
    check = """
import json, torch
from propmeta_edit.models.loading import load_model
fresh, _ = load_model("smollm2-135m-metaft")
same = all(torch.equal(a, b) for a, b in zip(editor.model.parameters(), fresh.parameters()))
print("REPORT", json.dumps([metrics[0]["pre"]["rewrite_acc"], metrics[0]["post"]["rewrite_acc"], same]))
"""
    code = snippet.group(1).replace("hparams/MetaFT", str(ROOT / "hparams" / "MetaFT")) + check
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    pre, post, same = json.loads(done.stdout.split("REPORT ")[1])
    assert pre[0] < 1.0 and post == [1.0] and same
