"""States of torch and of a model that change numbers, put to what they are by default for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import nn

from propmeta_edit.protocols import LanguageModel


def to_the_end(put_back: Callable[[], object]) -> None:
    """Put something back even if that is interrupted (Ctrl-C): it is begun again then, before the interruption goes on."""
    try:
        put_back()
    except BaseException:
        put_back()
        raise


@contextmanager
def put_back_after(put_back: Callable[[], object]) -> Iterator[None]:
    """Whatever happens inside, put something back at the end, even if that is interrupted (Ctrl-C) on the way there or meanwhile.

    Args:
        put_back: may be called twice.
    """
    is_done = False
    try:
        try:
            yield
        finally:
            put_back()
            is_done = True
    finally:
        if not is_done:
            put_back()


@contextmanager
def plain_torch(model: LanguageModel) -> Iterator[None]:
    """Inside, torch computes with a model as it does by itself, whatever the caller has switched on; outside it is as it was.

    That is without autocast, inference mode, anomaly detection and another default device, without compiled modules, and without
    TF32 outside ``tf32_products``. Nothing is done about what is not switched on. On CUDA, attention is not cuDNN's either, which
    makes a plan for every new length of text and has another gradient in every call.
    """
    device = next(iter(model.parameters())).device.type
    with ExitStack() as states:
        if torch.is_inference_mode_enabled():
            states.enter_context(torch.inference_mode(False))
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            states.enter_context(torch.autocast(device, enabled=False))
        if torch.is_anomaly_enabled():
            states.enter_context(torch.autograd.set_detect_anomaly(False))
        if torch.get_default_device().type != "cpu":
            states.enter_context(torch.device("cpu"))
        if any(module._compiled_call_impl is not None for module in model.modules()):
            # A compiled module does not look for hooks, nor for a block that stands in for another one.
            states.enter_context(torch.compiler.set_stance("force_eager"))
        if _is_tf32_on():
            states.enter_context(_tf32(False))
        if device == "cuda" and torch.backends.cuda.cudnn_sdp_enabled():  # type: ignore[no-untyped-call]
            torch.backends.cuda.enable_cudnn_sdp(False)
            states.callback(torch.backends.cuda.enable_cudnn_sdp, True)
        yield


def tf32_products(is_on: bool) -> AbstractContextManager[None]:
    """Inside, if that is on, fp32 products on CUDA round their inputs to TF32 (10 bits of 23); elsewhere nothing changes."""
    return _tf32(True) if is_on else nullcontext()


@contextmanager
def _tf32(is_on: bool) -> Iterator[None]:
    """Inside, whether TF32 is on; outside it is as it was, in torch's older setting and in the one since 2.9, which knows more."""
    matmul = torch.backends.cuda.matmul
    before: list[tuple[str, object]] = [("fp32_precision", matmul.fp32_precision)] if _has_newer() else []
    inside: tuple[str, object] = "allow_tf32", is_on  # sets the newer one, too
    try:
        before.insert(0, ("allow_tf32", matmul.allow_tf32))
    except RuntimeError:  # the caller has used the newer one alone, and then the older one cannot be read
        inside = "fp32_precision", "tf32" if is_on else "ieee"
    with put_back_after(lambda: _set_all(matmul, before)):
        _set_all(matmul, [inside])
        yield


def _has_newer() -> bool:
    return hasattr(torch.backends.cuda.matmul, "fp32_precision")


def _is_tf32_on() -> bool:
    matmul = torch.backends.cuda.matmul
    return bool(matmul.fp32_precision == "tf32" if _has_newer() else matmul.allow_tf32)


def _set_all(target: object, values: Iterable[tuple[str, object]]) -> None:
    for name, value in values:
        setattr(target, name, value)


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Inside, no dropout; outside each module has the mode that it had."""
    training = [module for module in model.modules() if module.training]
    with put_back_after(lambda: _set_modes(training, True)):
        _set_modes(training, False)
        yield


def _set_modes(modules: Iterable[nn.Module], is_training: bool) -> None:
    for module in modules:
        module.training = is_training
