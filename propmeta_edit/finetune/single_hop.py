"""Teaching a small base model single facts, so that the second hop of a question is something it knows.

A 135M model knows few facts by heart, and a two-hop test on it would measure ignorance. Plain supervised fine-tuning on one-hop
questions comes first, on all layers with the embeddings frozen; no two-hop question is seen here.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from propmeta_edit.finetune.losses import compute_answer_loss
from propmeta_edit.finetune.weights import only_trainable
from propmeta_edit.models.devices import has_native_bf16
from propmeta_edit.models.layers import get_architecture
from propmeta_edit.records import Question
from propmeta_edit.text.encoding import collate, encode_answer
from propmeta_edit.text.prompts import format_question

EncodedText = tuple[list[int], list[int]]  # what encode_answer gives
POOL = 8  # batches


@dataclass(frozen=True)
class SingleHopSettings:
    """Settings of the fine-tuning: AdamW with a linear decay to zero.

    Matrix products run in bf16 where the device has it in hardware; weights and optimiser stay fp32.
    """

    learning_rate: float = 3e-4
    num_epochs: int = 3
    batch_size: int = 32
    seed: int = 0


def apply_single_hop_finetuning(model: Any, tokenizer: Any, questions: Sequence[Question], settings: SingleHopSettings) -> float:
    """Fine-tune ``model`` in place on every question's first answer.

    Returns:
        The mean loss of the last epoch, in nats a token.
    """
    encoded = [encode_answer(tokenizer, format_question(q.text), q.answers[0]) for q in questions]
    blocks = get_architecture(model.config.model_type).blocks
    parameters = {name: p for name, p in model.named_parameters() if name.startswith(blocks + ".")}
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate)
    steps_per_epoch = -(-len(encoded) // settings.batch_size)
    num_steps = settings.num_epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=num_steps)
    order = random.Random(settings.seed)
    use_bf16 = has_native_bf16(str(model.device))
    losses: list[float] = []
    with only_trainable(model, parameters), tqdm(total=num_steps, desc="single-hop fine-tuning", unit="step") as bar:
        for _ in range(settings.num_epochs):
            for texts in make_batches(encoded, settings.batch_size, order):
                batch = collate(tokenizer, texts).to(model.device)
                autocast = torch.autocast(model.device.type, torch.bfloat16) if use_bf16 else nullcontext()
                with autocast:
                    loss = compute_answer_loss(model, batch)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                losses.append(float(loss.detach()))
                bar.set_postfix(loss=f"{losses[-1]:.3f}")
                bar.update()
    return sum(losses[-steps_per_epoch:]) / steps_per_epoch


def make_batches(encoded: Sequence[EncodedText], batch_size: int, order: random.Random) -> list[list[EncodedText]]:
    """One epoch: shuffled, but sorted by length inside pools of eight batches, which saves a third of the padding."""
    pool_size = POOL * batch_size
    shuffled = order.sample(list(encoded), len(encoded))
    pools = [sorted(shuffled[i : i + pool_size], key=lambda text: len(text[0])) for i in range(0, len(shuffled), pool_size)]
    batches = [pool[i : i + batch_size] for pool in pools for i in range(0, len(pool), batch_size)]
    order.shuffle(batches)
    return batches
