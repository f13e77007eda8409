"""Teaching a base its facts: every text once an epoch, embeddings alone, and it learns."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import tiny
import torch
from safetensors.torch import load_file

from propmeta_edit.errors import ModelError, OriginError
from propmeta_edit.finetune import single_hop
from propmeta_edit.finetune.saved_state import save_state
from propmeta_edit.finetune.single_hop import SingleHopSettings, make_batches, train_single_hop_adapter
from propmeta_edit.models.artefacts import ADAPTER
from propmeta_edit.models.differences import apply_difference, merge_adapter, save_adapter, save_difference
from propmeta_edit.models.generation import generate_greedily
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.records import Question
from propmeta_edit.text.prompts import format_question


def test_every_text_once_an_epoch_in_batches_of_like_length():
    encoded = [(list(range(5 + i % 30)), [i]) for i in range(100)]
    batches = make_batches(encoded, 8, random.Random(0))
    assert sorted(labels[0] for batch in batches for _, labels in batch) == list(range(100))
    assert len(batches) == 13 and all(len(batch) <= 8 for batch in batches)

    def padding(batches):
        return sum(max(len(ids) for ids, _ in batch) - len(ids) for batch in batches for ids, _ in batch)

    shuffled = random.Random(0).sample(encoded, 100)
    assert padding(batches) < 0.5 * padding([shuffled[i : i + 8] for i in range(0, 100, 8)])
    assert make_batches(encoded, 8, random.Random(1)) != batches


def test_it_learns_to_answer_and_to_stop_and_merges_to_the_same_bits(tokenizer, tmp_path):
    """A LoRA on every projection; merged from its files it answers alone, twice the same, embeddings untouched."""
    base = tiny.make_model("llama", dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    questions = [Question("What is the capital of France?", ("Paris",)), Question("What does Ann Lee speak?", ("Spanish",))]
    settings = SingleHopSettings(learning_rate=0.03, num_epochs=60, rank=8, warmup_steps=5)
    trained = train_single_hop_adapter(tiny.make_model("llama", dtype=torch.float32), tokenizer, questions, settings)
    save_adapter(trained, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    merged = []
    for _ in range(2):
        model = tiny.make_model("llama", dtype=torch.float32)
        merge_adapter(model, tmp_path)
        merged.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in before)
    moved = {name for name in before if not torch.equal(before[name], merged[0][name])}
    assert moved == set(select_parameters(base, "all"))
    texts = generate_greedily(model, tokenizer, [format_question(q.text) for q in questions])
    assert texts == [" Paris.", " Spanish."], "ten tokens would hold more if it did not stop"
    wide = {name: before[name].double() for name in moved}
    factors = load_file(tmp_path / ADAPTER)
    for name, value in wide.items():
        a, b = (factors[f"base_model.model.{name.replace('.weight', f'.lora_{x}.weight')}"].double() for x in "AB")
        torch.testing.assert_close(merged[0][name].double(), value + b @ a, rtol=1e-6, atol=1e-7)


def test_a_stopped_training_goes_on_to_the_same_bits(tokenizer, tmp_path, monkeypatch):
    """Stopped in the second epoch; another training's state is refused rather than taken up or lost."""
    questions = [Question(f"What is the capital of land {i}?", (answer,)) for i, answer in enumerate(("Lima", "Paris", "Oslo"))]
    settings = SingleHopSettings(learning_rate=0.03, num_epochs=3, batch_size=1, rank=4, warmup_steps=4)
    monkeypatch.setattr(single_hop, "SAVE_EVERY", 2)
    compute, calls = single_hop.compute_answer_loss, []

    def train(states=None, settings=settings):
        model = train_single_hop_adapter(tiny.make_model("llama", dtype=torch.float32), tokenizer, questions, settings, states)
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def stop_in_the_sixth(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return compute(*arguments)

    whole = train()
    monkeypatch.setattr(single_hop, "compute_answer_loss", stop_in_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    resumed = train(tmp_path)
    assert len(calls) == 6 + 5, "steps 5 to 9 alone"
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    with pytest.raises(OriginError, match=r"made from something else \(.*\); remove that folder"):
        train(tmp_path, replace(settings, learning_rate=0.1))
    with pytest.raises(ModelError, match=r"of a training of other tensors \(.*lora_A.* of another shape\); remove "):
        train(tmp_path, replace(settings, rank=8))
    other = {"other": torch.nn.Parameter(torch.ones(2))}
    save_state(tmp_path, other, torch.optim.AdamW(other.values()), "{}")
    with pytest.raises(ModelError, match="of a training of other tensors"):
        train(tmp_path)


def test_factors_of_another_model_are_refused(tokenizer, tmp_path):
    question = Question("What does Ann Lee speak?", ("Spanish",))
    model = tiny.make_model("llama", num_layers=4, dtype=torch.float32)
    save_adapter(train_single_hop_adapter(model, tokenizer, [question], SingleHopSettings(num_epochs=1)), tmp_path)
    with pytest.raises(ModelError, match=r"factors for model\.layers\.3\..*, which the model does not have"):
        merge_adapter(tiny.make_model("llama", num_layers=3, dtype=torch.float32), tmp_path)


def test_a_difference_puts_the_tuned_tensors_back(tmp_path):
    base, tuned = tiny.make_model("qwen2", dtype=torch.float32), tiny.make_model("qwen2", dtype=torch.float32, seed=1)
    chosen = select_parameters(tuned, [1])
    save_difference(dict(base.named_parameters()), {name: p.detach() for name, p in chosen.items()}, tmp_path)
    own = {name: p.detach().clone() for name, p in base.named_parameters()}
    assert set(apply_difference(base, tmp_path)) == set(chosen)
    for name, p in base.named_parameters():
        if name in chosen:
            off = (p - chosen[name]).abs().max()
            assert off <= 2**-8 * (own[name] - chosen[name]).abs().max()
            assert name.endswith("bias") or not torch.equal(p, own[name])
        else:
            assert torch.equal(p, own[name])
    with pytest.raises(ModelError, match="does not fit this model"):
        apply_difference(tiny.make_model("gpt2", dtype=torch.float32), tmp_path)
