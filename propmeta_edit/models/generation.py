"""Greedy continuation of prompts: the protocol that every score rests on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.text.encoding import padded_on

MAX_NEW_TOKENS = 10  # the paper's, after CaKE


def generate_greedily(
    model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int = MAX_NEW_TOKENS, batch_size: int = 32
) -> list[str]:
    """The new text after each prompt, decoded greedily, special tokens left out.

    Every generation setting that comes with the model (sampling, beams, repetition penalty) is set aside meanwhile: transformers
    would fill them in. They and the tokenizer's padding side are as before on return.
    """
    from transformers import GenerationConfig

    generation = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
    )
    own_settings = model.generation_config
    texts: list[str] = []
    try:
        model.generation_config = GenerationConfig()
        with padded_on(tokenizer, "left"), torch.no_grad():
            for start in range(0, len(prompts), batch_size):
                inputs = tokenizer(list(prompts[start : start + batch_size]), return_tensors="pt", padding=True)
                inputs = {key: inputs[key].to(model.device) for key in ("input_ids", "attention_mask")}
                output = model.generate(**inputs, generation_config=generation)
                texts += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    finally:
        model.generation_config = own_settings
    return texts
