"""How things are made from the rooms above: meta-trained checkpoints, the bundled models, data sets by name, second moments."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from propmeta_edit.models.artefacts import INPUT_MOMENTS, MAKERS, WHOLE, register_builder

# The first three come as small files, the last one is the first's model as it comes; the others are made on first use, by training.
NAMES = (
    "smollm2-135m",
    "smollm2-135m-metaft",
    "smollm2-135m-bound",
    "smollm2-135m-k0",
    "smollm2-135m-shuffled",
    "smollm2-135m-seed1",
    "smollm2-135m-seed2",
    "smollm2-135m-bound-seed1",
    "smollm2-135m-bound-seed2",
    "gemma3-270m",
    "gemma3-270m-metaft",
    "smollm2-135m-raw",
)


REAL_NAMES = (  # made from files of the user's
    "smollm2-135m-real",
    "smollm2-135m-real-metaft",
    "smollm2-135m-real-bound",
    "smollm2-135m-real-bound-seed1",
    "smollm2-135m-real-bound-seed2",
)


def _when_called(module: str, function: str, *arguments: Any) -> Any:
    return getattr(importlib.import_module(module), function)(*arguments)


def register_bundled_models() -> None:
    """Let the bundled models be called by name, second moments be gathered, and differences be put together with
    their base; what makes them is imported when one is made."""
    makers = {
        **dict.fromkeys(NAMES, "propmeta_edit.recipes.bundled"),
        **dict.fromkeys(REAL_NAMES, "propmeta_edit.recipes.real"),
    }
    for name, module in makers.items():
        register_builder(name, partial(_when_called, module, "origin_of", name), partial(_when_called, module, "build", name))
    MAKERS[INPUT_MOMENTS] = partial(_when_called, "propmeta_edit.recipes.statistics", "gather_input_moments")
    MAKERS[WHOLE] = partial(_when_called, "propmeta_edit.recipes.whole", "put_together")
