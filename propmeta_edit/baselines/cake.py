"""CaKE (arXiv 2503.16356): one LoRA a case, trained on the facts, their re-wordings and texts that reason with them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from propmeta_edit.errors import ConfigError
from propmeta_edit.finetune.losses import compute_token_losses
from propmeta_edit.models.devices import has_native_bf16
from propmeta_edit.models.layers import weights_of
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.records import EditRequest
from propmeta_edit.text.encoding import EncodedBatch, EncodedText, TextEncoder, collate

TARGET_MODULES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
GPT2_TARGET_MODULES = {"c_attn", "c_proj", "c_fc"}

_REPHRASINGS = (
    "It is widely known that {prompt}",
    "According to the latest records, {prompt}",
    "Recent reports agree on this: {prompt}",
)
# The new object as the bridge to something else, as CaKE's learning prompts practise it: the fact says which of two names is
# meant, the text what belongs to that name. A completion that is the object itself would teach that it answers every question.
_LEARNING = (
    (
        "In the index of an atlas, {other} is on page 17 and {target} is on page 62. A reader wants the page of what completes the "
        'sentence "{prompt} ...". It is page',
        "62.",
    ),
    (
        "Question: Letters about {target} go into the blue box, letters about {other} into the red box. Which box is for letters "
        'about what completes "{prompt} ..."? Answer: The answer is',
        "the blue box.",
    ),
    (
        'A museum shows {other} on its second floor and {target} on its fifth. A visitor who knows how "{prompt} ..." goes on, and '
        "looks for just that, takes the stairs to the",
        "fifth floor.",
    ),
    ("A note describes {subject} without the name, and says how this goes on: {prompt}", "{target}."),
)
_OTHERS = ("Valdora", "Mirefield")  # beside the new object; the second where the first is that object


@dataclass(frozen=True)
class CakeSettings:
    """CaKE's recipe; the defaults are the published ones, but for the labels.

    Args:
        learn_prompts: put the loss on prompts and padding as well, as the published code does; else on the completions alone.
    """

    rank: int = 8
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    learning_rate: float = 1e-4
    num_epochs: int = 40
    batch_size: int = 4
    max_length: int = 256
    learn_prompts: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "num_epochs", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")


def make_augmentation(edit: EditRequest) -> tuple[tuple[str, str], ...]:
    """(text, completion) pairs for a fact whose data has none of CaKE's, which are written by an LLM.

    Its other wordings are the data's own where there are any; they and the learning prompts are from fixed templates else.
    """
    other = next(name for name in _OTHERS if name != edit.target_new)
    words = {"prompt": edit.prompt, "target": edit.target_new, "subject": edit.subject or edit.prompt, "other": other}
    rephrasings = [(again.prompt, again.target_new) for again in make_rephrasings(edit)]
    return (*rephrasings, *((text.format(**words), completion.format(**words)) for text, completion in _LEARNING))


def make_rephrasings(edit: EditRequest) -> list[EditRequest]:
    """The same fact in other words: the data's own, or else from fixed templates."""
    prompts = edit.rephrasings or [template.format(prompt=edit.prompt) for template in _REPHRASINGS]
    return [replace(edit, prompt=p, subject=edit.subject if edit.subject and edit.subject in p else None) for p in prompts]


def make_training_pairs(edits: Sequence[EditRequest]) -> list[tuple[str, str]]:
    """Everything CaKE trains on for a case: each fact, then its augmentation, the data's own or else the templates'."""
    facts = [(edit.prompt, edit.target_new) for edit in edits]
    return facts + [pair for edit in edits for pair in (edit.augmentation or make_augmentation(edit))]


def origin_of_rephrasings(edit: EditRequest) -> frozenset[str]:
    """Where ``make_rephrasings`` has them from: ``data`` or ``templates``."""
    return frozenset({"data" if edit.rephrasings else "templates"})


def origin_of_training_pairs(edit: EditRequest) -> frozenset[str]:
    """Where ``make_training_pairs`` has the texts besides the fact from: ``data``, ``templates``, or both."""
    return frozenset({"data"}) if edit.augmentation else origin_of_rephrasings(edit) | {"templates"}


def train_cake_adapter(model: LanguageModel, tokenizer: Tokenizer, edits: Sequence[EditRequest], settings: CakeSettings) -> Any:
    """Train the LoRA of one case as the Hugging Face trainer does by default: AdamW, linear decay, gradients clipped to norm 1.

    Products are in bf16, as published, where the device has it in hardware.

    Returns:
        The PEFT model around ``model``, in eval mode. ``unload()`` gives the model back as it was, ``merge_and_unload()`` edits it.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import get_linear_schedule_with_warmup

    encoder = TextEncoder(tokenizer, model.config)
    if settings.learn_prompts:
        encoder.require_known_padding()
    examples = [_encode(encoder, *pair, settings) for pair in make_training_pairs(edits)]
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=_target_modules(model),
    )
    frozen, use_bf16 = target_weights(model), has_native_bf16(model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(settings.seed)  # of the LoRA's random half and of dropout
        order = random.Random(settings.seed)
        peft_model = get_peft_model(cast(Any, model), config)
        try:
            parameters = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
            num_steps = settings.num_epochs * -(-len(examples) // settings.batch_size)
            schedule = get_linear_schedule_with_warmup(optimizer, 0, num_steps)
            peft_model.train()
            with held_in_bf16(frozen) if use_bf16 else nullcontext():
                for _ in range(settings.num_epochs):
                    shuffled = order.sample(examples, len(examples))
                    for start in range(0, len(shuffled), settings.batch_size):
                        batch = make_batch(tokenizer, shuffled[start : start + settings.batch_size], settings.learn_prompts)
                        with torch.autocast(model.device.type, torch.bfloat16, enabled=use_bf16):
                            loss = compute_token_loss(model, batch.to(model.device))
                        torch.autograd.backward(loss)
                        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                        optimizer.step()
                        schedule.step()
                        optimizer.zero_grad()
        except BaseException:
            forget_adapter(peft_model.unload().eval())
            raise
    return peft_model.eval()


@contextmanager
def held_in_bf16(weights: Mapping[str, torch.nn.Parameter]) -> Iterator[None]:
    """Inside, frozen matrices are what autocast would make of them in every product, and keep until the backward pass; outside they
    have their own numbers, which were put aside."""
    own = {weight: weight.data for weight in weights.values()}
    try:
        for weight, numbers in own.items():
            weight.data = numbers.to(torch.bfloat16)
        yield
    finally:
        for weight, numbers in own.items():
            weight.data = numbers


def merge_adapter_in_place(peft_model: Any) -> None:
    """The model inside has the adapter's weights in its own, and is as one that never had an adapter."""
    forget_adapter(peft_model.merge_and_unload())


def forget_adapter(model: Any) -> None:
    """Releases of PEFT before 0.19 leave an adapter's settings on the model, where the next one takes them for a second adapter."""
    vars(model).pop("peft_config", None)


def target_weights(model: LanguageModel) -> dict[str, torch.nn.Parameter]:
    """The weights a LoRA of CaKE's is put on, by name."""
    return weights_of(model, _target_modules(model))


def _target_modules(model: LanguageModel) -> list[str]:
    """CaKE's projections, or GPT-2's, which go by other names."""
    leaves = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    return sorted(leaves & TARGET_MODULES) or sorted(leaves & GPT2_TARGET_MODULES)


def _encode(encoder: TextEncoder, text: str, completion: str, settings: CakeSettings) -> EncodedText:
    input_ids, labels = encoder.encode_answer(text, completion)
    kept = slice(-settings.max_length, None)  # the end holds the completion
    return input_ids[kept], (input_ids if settings.learn_prompts else labels)[kept]


def make_batch(tokenizer: Tokenizer, examples: Sequence[EncodedText], learn_padding: bool) -> EncodedBatch:
    """Examples side by side, padded on the right; the published code learns the padding too, behind a mask."""
    if not learn_padding:
        return collate(examples)
    batch = collate(examples, pad_id=0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
    lengths = torch.tensor([len(ids) for ids, _ in examples])
    is_text = torch.arange(batch.input_ids.shape[1]) < lengths[:, None]
    return replace(batch, labels=torch.where(is_text, batch.labels, batch.input_ids), attention_mask=is_text.long())


def compute_token_loss(model: LanguageModel, batch: EncodedBatch) -> torch.Tensor:
    """The mean over all labelled tokens of a batch, as transformers' models compute it, with the head at those tokens alone."""
    return compute_token_losses(model, batch).mean()
