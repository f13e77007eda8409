"""Which model an edit belongs on: exact names for the tensors that it moves, and samples of all the others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping

import torch
from safetensors.torch import save

from propmeta_edit.protocols import LanguageModel

SAMPLES = 1024  # numbers of a tensor that are looked at, give or take a half
_HASHES: dict[frozenset[tuple[str, str]], str] = {}  # of what this process has hashed, by names and fingerprints


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, whatever their order and device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(save({name: tensors[name].detach().contiguous().cpu()}))
    return digest.hexdigest()


def hash_once(tensors: Mapping[str, torch.Tensor]) -> str:
    """``hash_tensors``, which copies to the CPU and is slow, once in a process for the same tensors: their fingerprints tell."""
    key = frozenset(take_fingerprints(tensors).items())
    if key not in _HASHES:
        _HASHES[key] = hash_tensors(tensors)
    return _HASHES[key]


def take_fingerprints(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """``take_fingerprint`` of each; a device is asked once for all that are there."""
    found = {}
    for names in _group(tensors, lambda value: value.device):
        sums = [_sums_of_bits(tensors[name]) for name in names]
        on_host = torch.cat(sums).cpu()
        for name, own in zip(names, torch.split(on_host, [len(one) for one in sums]), strict=True):
            about = str((tuple(tensors[name].shape), tensors[name].dtype)).encode()
            found[name] = hashlib.sha256(save({"sums": own.clone()}) + about).hexdigest()
    return found


def take_fingerprint(tensor: torch.Tensor) -> str:
    """A short name for the bits of a tensor, from sums of them over rows and columns: where it is, at the speed of memory."""
    return take_fingerprints({"": tensor})[""]


def _sums_of_bits(tensor: torch.Tensor) -> torch.Tensor:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(integers).reshape(len(tensor), -1)
    return torch.cat([bits.sum(dim=0, dtype=torch.int64), bits.sum(dim=1, dtype=torch.int64)])


def _group(tensors: Mapping[str, torch.Tensor], key: Callable[[torch.Tensor], Hashable]) -> list[list[str]]:
    """Names whose tensors have the same key, together."""
    groups: dict[Hashable, list[str]] = {}
    for name, value in tensors.items():
        groups.setdefault(key(value), []).append(name)
    return list(groups.values())


def take_identity(model: LanguageModel, instead: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """A short name for what every parameter holds, from its shape and about a thousand of its numbers, evenly spread.

    Where the model lies, and its path, do not matter. The numbers are rounded to bf16, so that a base is the same one whether it is
    loaded in fp32 or bf16 (float16 rounds in another way and is told apart). It takes milliseconds, whatever the model's size:
    enough to tell another model, or one whose matrices were trained on, but no check of every number.

    Args:
        instead: tensors that count in place of the model's own, by parameter name.
    """
    tensors = {name: instead.get(name, parameter.detach()) for name, parameter in model.named_parameters()}
    found = {}
    for names in _group(tensors, lambda value: (value.device, value.dtype)):  # together, so that a GPU is asked once
        samples = [_sample(tensors[name]) for name in names]
        bits = torch.cat(samples).to(torch.bfloat16).view(torch.int16).cpu()
        for name, own in zip(names, torch.split(bits, [len(sample) for sample in samples]), strict=True):
            content = str(tuple(tensors[name].shape)).encode() + own.numpy().tobytes()
            found[name] = hashlib.sha256(content).hexdigest()[:16]
    return found


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """An odd stride, so that a matrix is not read along a few of its columns alone."""
    flat = tensor.reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLES) | 1]
