"""An edit's folder: what stands in its files, apart from the tensors themselves."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from propmeta_edit.finetune.low_rank import Factors, LowRankWeights
from propmeta_edit.models.artefacts import EDIT_CARD
from propmeta_edit.records import EditRequest

WEIGHTS, CONFIG = "edit_model.safetensors", EDIT_CARD
BASE, PACKED = "base", "base.json.zlib.base85"  # in the header of the first; the one of an older version, or the other
DTYPE = "dtype"  # in the second: of the weights, where the first holds factors
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}


class Saved(NamedTuple):
    """What ``Edit.save`` wrote.

    Attributes:
        num_bytes: of the whole folder.
        lost: the norm of what was left out, over the norm of the change; 0 without a tolerance.
    """

    num_bytes: int
    lost: float


def describe_saved(saved: Saved) -> str:
    """Its size, and what it loses, for people."""
    size = f"{saved.num_bytes / 1e6:.1f} MB" if saved.num_bytes >= 1e6 else f"{saved.num_bytes / 1e3:.0f} kB"
    return f"{size}; {100 * saved.lost:.1f} % of the change is lost" if saved.lost else size


def require_of_kind(kind: type, config: Mapping[str, Any], name: str) -> Any:
    """A value of the configuration.

    Raises:
        KeyError, TypeError: there is none, or one of another kind.
    """
    if not isinstance(config[name], kind):
        raise TypeError(f"{name} is {config[name]!r}")
    return config[name]


def read_base(file: Path) -> dict[str, Any]:
    """What every parameter held without any edit, from the header of an edit's tensors."""
    with safe_open(str(file), framework="pt") as reader:  # type: ignore[no-untyped-call]
        header = reader.metadata() or {}
    if PACKED in header:
        return {BASE: json.loads(zlib.decompress(base64.b85decode(header[PACKED])))}
    return {BASE: json.loads(header[BASE])} if BASE in header else {}


def pack(base: Mapping[str, str]) -> str:
    """Names and hashes in a fifth of their room, which would else be a tenth of a small edit."""
    return base64.b85encode(zlib.compress(json.dumps(dict(base)).encode(), 9)).decode()


def as_tensors(factors: Factors) -> dict[str, torch.Tensor]:
    """Factors as the first file has them, by parameter name and letter."""
    return {f"{name}.{letter}": value for name, pair in factors.items() for letter, value in zip("AB", pair, strict=True)}


def read_factors(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> LowRankWeights:
    """The same read again, with what the configuration says of them."""
    factors = {name: (tensors[f"{name}.A"], tensors[f"{name}.B"]) for name in config["tensors"]}
    return LowRankWeights(factors, config["transposed"], _DTYPES[config[DTYPE]])


def read_request(row: Mapping[str, Any]) -> EditRequest:
    """A saved request, its lists as the tuples they were."""
    pairs = tuple((text, completion) for text, completion in row["augmentation"])
    return EditRequest(**{**row, "augmentation": pairs, "rephrasings": tuple(row["rephrasings"])})
