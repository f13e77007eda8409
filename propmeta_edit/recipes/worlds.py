"""The offline data sets, written into the cache folder on first use."""

from __future__ import annotations

from pathlib import Path

from propmeta_edit.data.world import write_world
from propmeta_edit.data.world_mquake import write_mquake
from propmeta_edit.models.artefacts import build_whole, cache_home

WORLD = "world"  # the value of `data` that means: the facts generated offline
WORLD_SEED = 0
WORLD_VERSION = 3  # raise it when the generator's output changes, so that cached worlds are made anew


def ensure_world(seed: int = WORLD_SEED) -> Path:
    """The folder of the generated CRE and MQuAKE files, written on first use."""
    folder = cache_home() / "worlds" / f"v{WORLD_VERSION}-seed{seed}"
    if not folder.exists():

        def build(partial: Path) -> None:
            write_world(partial, seed)
            write_mquake(partial, seed)

        build_whole(folder, build)
    return folder
