"""Tiny random models of every family and a local byte-level tokenizer: no network, a few milliseconds each."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config
from transformers.models.gemma3 import Gemma3ForCausalLM
from transformers.models.gpt2 import GPT2LMHeadModel
from transformers.models.llama import LlamaForCausalLM
from transformers.models.qwen2 import Qwen2ForCausalLM

from propmeta_edit.data.world import unpack_world

POSITIONS = 512  # a prompt of four hops with its facts before it takes half of them
FAMILIES = ("gpt2", "llama", "qwen2")
SHAPES = {  # the architecture and depth of the models that have settings in hparams/
    "llama3-8b": ("llama", 32),
    "llama3.2-3b": ("llama", 28),
    "llama3.2-1b": ("llama", 16),
    "llama2-7b": ("llama", 32),
    "qwen2.5-7b": ("qwen2", 28),
    "gpt2-xl": ("gpt2", 48),
    "smollm2-135m": ("llama", 30),
    "gemma3-270m": ("gemma3_text", 18),
}
TIED = ("llama3.2-3b", "llama3.2-1b", "smollm2-135m", "gemma3-270m")  # their head is the embedding
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM),
}
CORPUS = [
    "Smith Innovation PLC was founded in Greece. Question: What is the currency of the country? Answer: The answer is euro",
    "Ann Lee is a citizen of Peru and speaks Spanish in Lima. The capital of France is Paris.",
]


def save_model_folder(folder: Path, tokenizer: Any, seed: int = 0) -> Path:
    """A random Llama in fp32 with its tokenizer, as an ordinary model folder."""
    make_model("llama", dtype=torch.float32, seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Records as a file of JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def world_records(stem: str, count: int, skip: int = 0) -> list[Any]:
    """Some records of a file of the shipped world, e.g. ``train_data_id``."""
    return [json.loads(line) for line in _world_lines(stem)[skip : skip + count]]


@cache
def _world_lines(stem: str) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        unpack_world(Path(folder))
        return (Path(folder) / f"{stem}.jsonl").read_text(encoding="utf-8").split("\n")


def make_tokenizer(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that spaces merge with the following word as in GPT-2 and Llama-3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def make_model(family: str, num_layers: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.nn.Module:
    """A random model with weights large enough that nothing is near zero by accident."""
    torch.manual_seed(seed)
    size = {"vocab_size": 300, "initializer_range": 0.15, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=num_layers, n_head=2, n_positions=POSITIONS, **size))
    else:
        config_class, model_class = CLASSES[family]
        config = config_class(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=POSITIONS,
            **({"head_dim": 8} if family == "gemma3_text" else {}),
            **size,
        )
        model = model_class(config)
    return model.to(dtype).eval()
