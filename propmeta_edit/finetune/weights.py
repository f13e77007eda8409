"""Snapshots and exact restoration of the tensors that the loops change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from propmeta_edit.models.ownership import locked
from propmeta_edit.models.states import plain_torch, put_back_after
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
def copies_in_place(model: LanguageModel, parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, copies of some parameters stand in the model in their places; outside it has its own, which nothing has touched.

    So whatever goes wrong inside, there is nothing to write back; and gradients, hooks and flags of its own are left alone.

    Yields:
        The copies, by name.
    """
    copies = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in parameters.items()}
    with put_back_after(lambda: _set_parameters(model, parameters)):
        _set_parameters(model, copies)
        yield copies


def _set_parameters(model: LanguageModel, parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, parameter)


@contextmanager
def only_trainable(model: LanguageModel, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Gradients on for ``parameters`` alone, dropout off, and torch in its own state (``plain_torch``), for this thread alone.

    On exit flags and every module's mode are as before.
    """
    with locked(model), plain_torch(model):
        flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
        modes = {module: module.training for module in model.modules()}
        with put_back_after(lambda: _set_flags(flags, modes)):
            model.eval()
            model.requires_grad_(False)
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            with torch.enable_grad():
                yield


def _set_flags(flags: Mapping[nn.Parameter, bool], modes: Mapping[nn.Module, bool]) -> None:
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
    for module, mode in modes.items():
        module.training = mode
