"""How things are made from the rooms above: meta-trained checkpoints, the bundled models, data sets by name, second moments."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from propmeta_edit.models.artefacts import register_builder

# The first two come as small files, the last one is the first's model as it comes; the others are made on first use, by training.
NAMES = (
    "smollm2-135m",
    "smollm2-135m-metaft",
    "smollm2-135m-k0",
    "smollm2-135m-shuffled",
    "smollm2-135m-seed1",
    "smollm2-135m-seed2",
    "gemma3-270m",
    "gemma3-270m-metaft",
    "smollm2-135m-raw",
)


def _when_called(function: str, *arguments: Any) -> Any:
    return getattr(importlib.import_module("propmeta_edit.recipes.bundled"), function)(*arguments)


def register_bundled_models() -> None:
    """Let the bundled models be called by name; what makes them is imported when one is made."""
    for name in NAMES:
        register_builder(name, partial(_when_called, "origin_of", name), partial(_when_called, "build", name))
