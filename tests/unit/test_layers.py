"""Which parameters a layer and a module choice mean."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers import MambaConfig, MambaForCausalLM

from propmeta_edit.errors import ModelError
from propmeta_edit.models.layers import cast_around, default_layer, resolve_layers, select_parameters

EXPECTED = {
    "gpt2": {
        "attention": {"attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias"},
        "mlp": {"mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"},
    },
    "llama": {
        "attention": {f"self_attn.{p}_proj.weight" for p in "qkvo"},
        "mlp": {f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")},
    },
    "qwen2": {
        "attention": {f"self_attn.{p}_proj.weight" for p in "qkvo"} | {f"self_attn.{p}_proj.bias" for p in "qkv"},
        "mlp": {f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")},
    },
}


@pytest.mark.parametrize("modules", ["attention", "mlp", "attention+mlp"])
def test_all_projections_with_their_biases_and_nothing_else(family, modules):
    model = tiny.make_model(family)
    prefix = "transformer.h.1." if family == "gpt2" else "model.layers.1."
    wanted = set().union(*(EXPECTED[family][part] for part in modules.split("+")))
    chosen = select_parameters(model, [1], modules)
    assert {name.removeprefix(prefix) for name in chosen} == wanted
    named = dict(model.named_parameters())
    assert all(parameter is named[name] for name, parameter in chosen.items())


def test_layer_1_is_not_layer_11():
    model = tiny.make_model("llama", num_layers=12)
    assert {name.split(".")[2] for name in select_parameters(model, [1])} == {"1"}
    assert {name.split(".")[2] for name in select_parameters(model, [11])} == {"11"}


def test_default_is_a_quarter_of_the_depth():
    assert [default_layer(n) for n in (16, 28, 30, 32, 48)] == [4, 7, 7, 8, 12]
    assert resolve_layers(None, 30) == [7] and resolve_layers("all", 3) == [0, 1, 2]


@pytest.mark.parametrize("layers", [[3], [-1], [0, 7], [True], ["1"], [1.0]])
def test_layer_outside_the_model(layers):
    with pytest.raises(ModelError, match=r"outside the model: it has layers 0 to 2"):
        select_parameters(tiny.make_model("llama"), layers)


def test_other_refusals_name_the_choices():
    model = tiny.make_model("llama")
    with pytest.raises(ModelError, match="'norm'"):
        select_parameters(model, [0], "norm")
    with pytest.raises(ModelError, match="must be a list of layer numbers"):
        select_parameters(model, "9")
    model = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=50))
    with pytest.raises(ModelError, match=r"'mamba' is not supported; supported are .*, such as gemma3_text, gpt2"):
        select_parameters(model, [0])


def test_fp32_projection_inside_a_bf16_model_computes_in_fp32():
    linear = torch.nn.Linear(8, 4)
    cast_around(linear)
    cast_around(linear)
    copied = copy.deepcopy(linear)
    torch.nn.init.zeros_(copied.weight)
    torch.nn.init.zeros_(copied.bias)
    assert copied(torch.ones(1, 8)).abs().sum() == 0, "a copy computes with its own weights"
    x = torch.randn(3, 8).bfloat16()
    expected = (x.float() @ linear.weight.T + linear.bias).bfloat16()
    assert torch.equal(linear(x), expected) and linear(x).dtype == torch.bfloat16
    assert linear(x.float()).dtype == torch.float32


def test_accelerates_hook_calls_a_projection_that_casts():
    """A model that transformers spread over devices has such hooks before its edited layer is put into fp32."""
    linear = torch.nn.Linear(8, 4)
    plain = copy.deepcopy(linear)
    add_hook_to_module(linear, AlignDevicesHook("cpu", io_same_device=True))
    for module in (linear, plain):
        cast_around(module)
    x = torch.randn(3, 8).bfloat16()
    assert torch.equal(linear(x), plain(x)) and linear(x).dtype == torch.bfloat16
