"""Teaching a small base model single facts, so that the second hop of a question is something it knows.

A 135M model knows few facts by heart, and a two-hop test on it would measure ignorance. Supervised fine-tuning on one-hop questions
comes first, as a LoRA on every projection; no two-hop question is seen here. Answers end with a period and the end-of-sequence
token, so that the model learns to stop.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from propmeta_edit.files import sha256_of_json
from propmeta_edit.finetune.losses import compute_answer_loss
from propmeta_edit.finetune.saved_state import load_state, save_state
from propmeta_edit.models.devices import has_native_bf16
from propmeta_edit.progress import progress_bar
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.records import Question
from propmeta_edit.store import require_made_from
from propmeta_edit.text.encoding import EncodedText, TextEncoder, collate
from propmeta_edit.text.prompts import format_question

POOL = 8  # batches
SAVE_EVERY = 25  # steps; a minute on two cores


@dataclass(frozen=True)
class SingleHopSettings:
    """Settings of the fine-tuning: AdamW with warm-up and a linear decay to zero.

    Args:
        rank: of the LoRA on every attention and MLP projection; its scale is 1.
        max_grad_norm: gradients are clipped to this norm.
    """

    learning_rate: float = 2e-3
    num_epochs: int = 3
    batch_size: int = 32
    rank: int = 24
    warmup_steps: int = 20
    max_grad_norm: float = 1.0
    seed: int = 0


def train_single_hop_adapter(
    model: LanguageModel,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    settings: SingleHopSettings,
    states: Path | None = None,
) -> Any:
    """Learn every question's first answer as a LoRA.

    Args:
        model: left as it is, but for its frozen weights being bf16 afterwards where the device has bf16 in hardware.
        states: folder of the state while the training goes on; one that was stopped there is continued, on the same kind of machine
            to the same bits.

    Returns:
        The PEFT model around ``model``; ``models.differences.save_adapter`` writes what was learnt.
    """
    from peft import LoraConfig, get_peft_model

    encoder = TextEncoder(tokenizer, model.config)
    texts = [encoder.encode_ended_answer(format_question(q.text), q.answers[0] + ".") for q in questions]
    use_bf16 = has_native_bf16(str(model.device))
    torch.manual_seed(settings.seed)  # of the LoRA's random half
    config = LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules="all-linear")
    peft_model = get_peft_model(cast(Any, model.to(torch.bfloat16) if use_bf16 else model), config).eval()
    parameters = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=settings.learning_rate, weight_decay=0.0, fused=True)
    order = random.Random(settings.seed)
    batches = [batch for _ in range(settings.num_epochs) for batch in make_batches(texts, settings.batch_size, order)]
    made_from = {**asdict(settings), "texts_sha256": sha256_of_json(texts), "products_in_bf16": use_bf16}
    done = 0 if states is None else _load(states, parameters, optimizer, made_from)
    with progress_bar(total=len(batches), initial=done, desc="single-hop fine-tuning", unit="step") as bar:
        for step in range(done, len(batches)):
            rate = min(1.0, (step + 1) / settings.warmup_steps) * (1 - step / len(batches))
            optimizer.param_groups[0]["lr"] = settings.learning_rate * rate
            with torch.autocast(model.device.type, torch.bfloat16, enabled=use_bf16):
                loss = compute_answer_loss(model, collate(batches[step]).to(model.device))
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            if states is not None and (step + 1) % SAVE_EVERY == 0:
                save_state(states, parameters, optimizer, json.dumps({"made_from": made_from, "steps": step + 1}))
            bar.set_postfix(loss=f"{loss.item():.3f}")
            bar.update()
    return peft_model


def _load(
    states: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, made_from: Mapping[str, Any]
) -> int:
    """Continue from the state that is there, and say after how many steps it is.

    Raises:
        OriginError: it is of another training.
    """
    text = load_state(states, parameters, optimizer)
    if text is None:
        return 0
    state = json.loads(text)
    require_made_from(made_from, state.get("made_from", {}), states, "holds the state of a training", "remove that folder")
    return int(state["steps"])


def make_batches(encoded: Sequence[EncodedText], batch_size: int, order: random.Random) -> list[list[EncodedText]]:
    """One epoch: shuffled, but sorted by length inside pools of eight batches, which saves a third of the padding."""
    pool_size = POOL * batch_size
    shuffled = order.sample(list(encoded), len(encoded))
    pools = [sorted(shuffled[i : i + pool_size], key=lambda text: len(text[0])) for i in range(0, len(shuffled), pool_size)]
    batches = [pool[i : i + batch_size] for pool in pools for i in range(0, len(pool), batch_size)]
    order.shuffle(batches)
    return batches
