"""What a dtype setting means on a device, whether this machine has it or not."""

from __future__ import annotations

import pytest

from propmeta_edit import MetaFTHyperParams, MetaTrainConfig
from propmeta_edit.cli import main
from propmeta_edit.easyedit import hparams as hparams_module
from propmeta_edit.models import devices
from propmeta_edit.models.devices import resolve_dtype
from propmeta_edit.recipes import meta_training


@pytest.mark.parametrize(
    ("dtype", "device", "has_it", "expected"),
    [
        ("auto", "cuda:0", True, "bfloat16"),
        ("auto", "cuda:1", False, "bfloat16"),  # slower there, but it fits
        ("auto", "cpu", True, "float32"),
        ("auto", "mps", False, "float32"),
        ("fast", "cpu", True, "bfloat16"),
        ("fast", "cuda:0", False, "float32"),
        ("float16", "cuda:0", True, "float16"),
        ("float32", "cuda:0", True, "float32"),
    ],
)
def test_a_dtype_on_a_device(monkeypatch, dtype, device, has_it, expected):
    monkeypatch.setattr(devices, "has_native_bf16", lambda _: has_it)
    assert resolve_dtype(dtype, device) == expected


@pytest.mark.parametrize(("device", "expected"), [("cuda:0", "bfloat16"), ("cpu", "float32")])
def test_ones_own_model_is_half_as_large_on_a_gpu_unless_it_is_asked_otherwise(monkeypatch, device, expected):
    loaded = {}
    monkeypatch.setattr(meta_training, "resolve_device", lambda _: device)
    monkeypatch.setattr(hparams_module, "resolve_device", lambda _: device)
    monkeypatch.setattr(hparams_module, "load_model", lambda name, **more: loaded.update(more))
    assert meta_training.resolve(MetaTrainConfig("my/llama")).dtype == expected
    assert meta_training.resolve(MetaTrainConfig("my/llama", dtype="float32")).dtype == "float32"
    MetaFTHyperParams("my/llama", layers=[1]).load_model()
    assert (loaded["dtype"], loaded["device"]) == (expected, device)


@pytest.mark.parametrize("verb", ["meta-train", "ability"])
def test_help_says_so(verb, capsys):
    assert main([verb, "--help"]) == 0
    assert "bfloat16 on CUDA" in " ".join(capsys.readouterr().out.split())
