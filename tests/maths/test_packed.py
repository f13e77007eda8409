"""Packed products: the plain ones but for rounding, forward and back, and never those of other weights."""

from __future__ import annotations

import platform

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from propmeta_edit.models import packed as packed_room
from propmeta_edit.models.devices import has_native_bf16
from propmeta_edit.models.packed import packed_products

pytestmark = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="packed products are for x86")
WIDTH = 288  # 288 x 288 numbers are enough to be worth packing
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not has_native_bf16("cpu"), reason="no bf16 here"))]


class Body(nn.Module):
    """A frozen projection of each kind around one that is trained, and one too small to be packed."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.trained = nn.Linear(WIDTH, WIDTH)
        self.second = Conv1D(2 * WIDTH, WIDTH)
        self.small = nn.Linear(2 * WIDTH, 8, bias=False)
        self.to(dtype).requires_grad_(False)
        self.trained.requires_grad_(True)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.small(torch.tanh(self.second(torch.tanh(self.trained(torch.tanh(self.first(inputs)))))))


NAMES = ("trained.weight", "trained.bias")


def outputs_and_gradient(model, inputs):
    outputs = model(inputs)
    gradients = torch.autograd.grad(outputs.float().square().sum(), [model.trained.weight, model.trained.bias])
    return [outputs.detach(), *gradients]


def make_inputs(dtype=torch.float32, *shape):
    return torch.randn(*(shape or (2, 7)), WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5,), (2, 7), (3, 64)])
def test_outputs_and_gradients_are_those_of_the_plain_products(dtype, shape):
    model, inputs = Body(dtype), make_inputs(dtype, *shape)
    plain = outputs_and_gradient(model, inputs)
    with packed_products(model, NAMES):
        assert {name for name, m in model.named_modules() if "forward" in m.__dict__} == {"first", "second"}
        packed = outputs_and_gradient(model, inputs)
    assert not any("forward" in m.__dict__ for m in model.modules())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip(plain, packed, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(a.abs().max()))


def test_the_gradient_agrees_with_finite_differences():
    model, inputs = Body(), make_inputs()
    direction = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(2))
    with packed_products(model, NAMES):
        gradient = outputs_and_gradient(model, inputs)[1]
        values = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                model.trained.weight.add_(step * direction)
                values.append(float(model(inputs).double().square().sum()))
                model.trained.weight.sub_(step * direction)
    assert (gradient * direction).sum() == pytest.approx((values[0] - values[1]) / 2e-2, rel=2e-2)


@pytest.mark.parametrize("change", ["in place", "past autograd", "another tensor", "bias"])
def test_a_weight_that_changed_is_packed_anew(change):
    model, inputs = Body(), make_inputs()
    with packed_products(model, NAMES):
        before = outputs_and_gradient(model, inputs)
    with torch.no_grad():
        if change == "in place":
            model.first.weight[3, 4] += 5.0
        elif change == "past autograd":
            model.first.weight.data[3, 4] += 5.0
        elif change == "another tensor":
            model.second.weight.data = torch.randn_like(model.second.weight)
        else:
            model.second.bias.add_(1.0)
    expected = outputs_and_gradient(model, inputs)
    with packed_products(model, NAMES):
        found = outputs_and_gradient(model, inputs)
    assert not torch.allclose(before[0], expected[0], atol=1e-3)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max()))


def test_an_unchanged_weight_is_packed_once(monkeypatch):
    model, packs = Body(), []
    pack = packed_room._pack
    monkeypatch.setattr(packed_room, "_pack", lambda matrix: packs.append(matrix.shape) or pack(matrix))
    for _ in range(3):
        with packed_products(model, NAMES):
            outputs_and_gradient(model, make_inputs())
    # Below the trained projection nothing goes back.
    assert packs == [(WIDTH, WIDTH), (2 * WIDTH, WIDTH), (WIDTH, 2 * WIDTH)]


def test_inside_another_and_without_room_nothing_changes(monkeypatch):
    model = Body()
    with packed_products(model, NAMES):
        own = model.first.forward
        with packed_products(model, NAMES):
            assert model.first.forward is own
        assert model.first.forward is own
    monkeypatch.setattr(packed_room, "SHARE_OF_MEMORY", 2**50)
    with packed_products(model, NAMES):
        assert not any("forward" in m.__dict__ for m in model.modules())


def test_float64_and_small_models_stay_plain():
    model, inputs = Body().double(), make_inputs(torch.float64)
    plain = outputs_and_gradient(model, inputs)
    with packed_products(model, NAMES):
        assert all(torch.equal(a, b) for a, b in zip(plain, outputs_and_gradient(model, inputs), strict=True))
