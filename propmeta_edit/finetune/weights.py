"""Snapshots and exact restoration of the tensors that the loops change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from propmeta_edit.protocols import LanguageModel


def snapshot(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Copies of the values, in the parameters' own dtype and on their device, so that restoring is exact."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def apply_snapshot(parameters: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor]) -> None:
    """Write values back in place."""
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


@contextmanager
def restored_on_exit(parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, torch.Tensor]]:
    """Whatever happens inside, the parameters have the values of before, to the bit, outside."""
    before = snapshot(parameters)
    try:
        yield before
    finally:
        apply_snapshot(parameters, before)


@contextmanager
def only_trainable(model: LanguageModel, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Gradients on for ``parameters`` alone and dropout off; on exit flags and every module's mode are as before."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode
