"""float64 on devices that have it, and on the CPU for those that do not."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from propmeta_edit.models.devices import in_double


def test_numbers_stay_where_they_are_but_for_mps():
    tensor = torch.rand(3)
    assert torch.equal(in_double(tensor), tensor.double())
    places = []
    # A tensor on MPS would raise on double().
    away = SimpleNamespace(device=torch.device("mps", 0), to=lambda place: places.append(place) or tensor)
    assert torch.equal(in_double(away), tensor.double())
    assert places == ["cpu"]
