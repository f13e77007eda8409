"""Devices: their names, what they can do, and their memory."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from propmeta_edit.errors import ConfigError, ModelError

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")  # the GPU's, the machine's, a library's


def resolve_device(device: str | int | None = "auto") -> str:
    """A device setting as a torch device string.

    ``auto`` (or None) is the first CUDA device if there is one, else MPS, else the CPU; a number N is ``cuda:N``.

    Raises:
        ConfigError: no such kind of device, or a CUDA device that this machine has not.
    """
    if device is None or device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    name = f"cuda:{device}" if isinstance(device, int) or str(device).isdigit() else str(device)
    try:
        parsed = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device must be auto, cpu, mps, cuda or cuda:N, got {device!r}") from error
    if parsed.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device must be auto, cpu, mps, cuda or cuda:N, got {device!r}")
    if parsed.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device {device!r}: this machine has no MPS; use auto or cpu")
    if parsed.type == "cuda" and (parsed.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {device!r}: this machine has {torch.cuda.device_count()} CUDA devices; use auto or cpu{_build()}"
        )
    return name


def _build() -> str:
    """What to do where it is torch that knows no GPU."""
    if torch.version.cuda or torch.version.hip:
        return ""
    return (
        f", or install torch for GPUs, since this one ({torch.__version__}) is built for CPUs: pip install --force-reinstall torch "
        "--index-url URL, with the index that PyTorch's own page gives for your driver"
    )


def has_native_bf16(device: str | torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware; elsewhere bf16 is slower than fp32."""
    kind = torch.device(device).type
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if kind == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def resolve_dtype(dtype: str, device: str) -> str:
    """``auto`` as bfloat16 on CUDA, where an 8B model then fits into 24 GB, and float32 elsewhere; ``fast`` as bfloat16 wherever
    the device has it in hardware, a CPU too, and float32 elsewhere; any other name as it is."""
    if dtype == "auto":
        return "bfloat16" if torch.device(device).type == "cuda" else "float32"
    if dtype == "fast":
        return "bfloat16" if has_native_bf16(device) else "float32"
    return dtype


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device without taking them from anything else."""
    if device.type == "cuda":
        unused_of_ours = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused_of_ours
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return int(psutil.virtual_memory().available)


def device_of(tensors: Mapping[str, torch.Tensor]) -> torch.device:
    """Where they are, or the first of them if a model is spread over several devices."""
    return next(iter(tensors.values())).device


def free_unused() -> None:
    """Let a GPU have back what nothing refers to any more."""
    gc.collect()
    torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or in the machine: PyTorch has an error of its own for CUDA alone, and
    ``memory_errors_named`` makes another of it."""
    if isinstance(error, ModelError):
        return error.__cause__ is not None and is_out_of_memory(error.__cause__)
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


@contextmanager
def memory_errors_named(where: str) -> Iterator[None]:
    """Inside, running out of memory is a ``ModelError`` that says ``where``, and what to do; other errors are as they are."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(f"out of memory {where}") from error


def wait_for(device: torch.device) -> None:
    """Until everything that was asked of a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(run: Callable[[], Any], device: torch.device) -> float:
    """GiB that a run adds to what is there before it: the allocator's own count on CUDA, else the process's memory, sampled."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**30
    gc.collect()
    before, peak, is_over = _resident_bytes(), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not is_over.wait(0.002):
            peak = max(peak, _resident_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        run()
    finally:
        is_over.set()
        sampler.join()
    return max(0, peak - before) / 2**30


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def place_of_doubles(device: str | torch.device) -> str:
    """Where a device's numbers are computed with in float64: there, but for MPS, which has no such numbers, on the CPU."""
    return "cpu" if torch.device(device).type == "mps" else str(device)


def sum_of_bits(weight: torch.Tensor) -> torch.Tensor:
    """All bits of a tensor in one number, [], left on its device: another one means other weights."""
    integers = torch.int64 if weight.nbytes % 8 == 0 else torch.uint8
    return weight.detach().contiguous().view(-1).view(integers).sum(dtype=torch.int64)


def in_double(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in float64, at the ``place_of_doubles``."""
    return tensor.to(place_of_doubles(tensor.device)).double()
