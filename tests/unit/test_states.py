"""States of torch that a call puts to its own."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import tiny
import torch

from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.inner_loop import apply_inner_loop
from propmeta_edit.finetune.losses import compute_answer_loss
from propmeta_edit.finetune.weights import only_trainable
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.fomaml import compute_task_gradients
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.models.states import plain_torch, tf32_products
from propmeta_edit.records import EditRequest
from propmeta_edit.text.encoding import TextEncoder, encode_requests


def model_on(device):
    """All that is looked at."""
    return SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device(device))]), modules=lambda: ())


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
@pytest.mark.parametrize("is_on", [True, False])
def test_attention_on_cuda_is_not_cudnns(device, is_on):
    """Whatever the caller's state, which comes back; also from inside and out of a failure."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    model = model_on(device)
    try:
        torch.backends.cuda.enable_cudnn_sdp(is_on)
        with pytest.raises(KeyError), plain_torch(model):
            with plain_torch(model):
                assert torch.backends.cuda.cudnn_sdp_enabled() == (is_on and device == "cpu")
            assert torch.backends.cuda.cudnn_sdp_enabled() == (is_on and device == "cpu")
            raise KeyError
        assert torch.backends.cuda.cudnn_sdp_enabled() == is_on
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


MATMUL = torch.backends.cuda.matmul
has_new_setting = pytest.mark.skipif(not hasattr(MATMUL, "fp32_precision"), reason="torch before 2.9")


@pytest.fixture
def as_before():
    """TF32 as torch has it by itself, before and after."""
    torch.set_float32_matmul_precision("highest")
    if hasattr(MATMUL, "fp32_precision"):
        MATMUL.fp32_precision = "none"
    yield
    torch.set_float32_matmul_precision("highest")
    if hasattr(MATMUL, "fp32_precision"):
        MATMUL.fp32_precision = "none"


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("outside", ["highest", "high"])
def test_tf32_is_what_the_setting_says_and_comes_back(outside):
    """Off inside every call whatever the caller has on, on where it is asked for; also after a failure."""
    torch.set_float32_matmul_precision(outside)
    with pytest.raises(KeyError), plain_torch(model_on("cpu")):
        assert not MATMUL.allow_tf32
        with tf32_products(False):
            assert not MATMUL.allow_tf32
        with tf32_products(True):
            assert MATMUL.allow_tf32
        assert not MATMUL.allow_tf32
        with tf32_products(True):
            raise KeyError
    assert (MATMUL.allow_tf32, torch.get_float32_matmul_precision()) == (outside == "high", outside)


@has_new_setting
@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("outside", ["tf32", "ieee", "none"])
def test_the_newer_setting_of_torch_comes_back_too(outside):
    """Set by itself, it makes the older one unreadable."""
    MATMUL.fp32_precision = outside
    with plain_torch(model_on("cpu")):
        assert MATMUL.fp32_precision != "tf32"
        with tf32_products(True):
            assert MATMUL.fp32_precision == "tf32"
        assert MATMUL.fp32_precision != "tf32"
    assert MATMUL.fp32_precision == outside


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("is_on", [True, False])
def test_the_inner_loop_and_the_outer_gradient_have_it_on_a_cpu_to_no_effect(tokenizer, monkeypatch, is_on):
    seen, made = [], []
    model = tiny.make_model("llama", dtype=torch.float32)
    target = encode_requests(TextEncoder(tokenizer), [[EditRequest("Ann Lee lives in", "Peru")]])
    parameters = select_parameters(model, [1])
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *a, **k: seen.append(MATMUL.allow_tf32) or forward(*a, **k), raising=False)
    for tf32 in (is_on, False):
        settings = EditSettings(layers=[1], num_inner_steps=2, inner_lr=0.01, tf32=tf32)
        seen.clear()
        with only_trainable(model, parameters):
            outer_loss = partial(compute_answer_loss, batch=target[0])
            made.append(compute_task_gradients(model, parameters, target, outer_loss, settings).gradients)
        assert seen[-1] == tf32 and set(seen[-3:]) == {tf32}, "two steps and the outer loss"
        assert not MATMUL.allow_tf32
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))
    with only_trainable(model, parameters):
        apply_inner_loop(model, parameters, target, EditSettings(layers=[1], num_inner_steps=1, tf32=is_on))
    assert seen[-1] == is_on and not MATMUL.allow_tf32


def test_tf32_changes_no_name_and_no_row_where_it_is_off():
    assert "tf32" not in EditSettings().to_dict() and EditSettings(tf32=True).to_dict()["tf32"] is True
    assert "tf32" not in MetaTrainConfig("m").decisive
    config = MetaTrainConfig("m", tf32=True)
    assert config.decisive["tf32"] is True and config.edit.tf32
