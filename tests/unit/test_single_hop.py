"""Teaching a base its facts: every text once an epoch, embeddings alone, and it learns."""

from __future__ import annotations

import random

import tiny
import torch

from propmeta_edit.finetune.single_hop import SingleHopSettings, apply_single_hop_finetuning, make_batches
from propmeta_edit.records import Question


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


def test_it_learns_and_leaves_the_embeddings(family, tokenizer):
    model = tiny.make_model(family, dtype=torch.float32)
    embeddings = model.get_input_embeddings().weight.detach().clone()
    questions = [Question("What is the capital of France?", ("Paris",)), Question("What does Ann Lee speak?", ("Spanish",))]
    first = apply_single_hop_finetuning(model, tokenizer, questions, SingleHopSettings(learning_rate=0.0, num_epochs=1))
    last = apply_single_hop_finetuning(model, tokenizer, questions, SingleHopSettings(learning_rate=0.01, num_epochs=30))
    assert last < 0.8 * first  # sixteen random, frozen output directions leave no more
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
