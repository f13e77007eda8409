"""The offline data sets, unpacked into the cache folder on first use."""

from __future__ import annotations

from pathlib import Path

from propmeta_edit.data.world import SINGLE_HOP, load_single_hop, unpack_world
from propmeta_edit.models.artefacts import build_whole, cache_home
from propmeta_edit.records import Question

WORLD = "world"  # the value of `data` that means: the shipped facts
WORLD_VERSION = 3  # raise it when the shipped files change, so that models and statistics made from them are made anew


def ensure_world() -> Path:
    """The folder of the offline CRE and MQuAKE files, unpacked on first use."""
    folder = cache_home() / "worlds" / f"v{WORLD_VERSION}"
    if not folder.exists():
        build_whole(folder, unpack_world)
    return folder


def single_hop_questions() -> list[Question]:
    """Every fact of the offline world as its one-hop question, each in its two wordings, one after the other."""
    return load_single_hop(ensure_world() / SINGLE_HOP)
