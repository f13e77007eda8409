"""Compiled blocks: the same numbers, plain blocks outside and where compiling fails."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch._dynamo.exc import TorchDynamoException

from propmeta_edit.errors import ConfigError, ModelError
from propmeta_edit.finetune.compiled import CompiledBlocks
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.task_texts import encode_step
from propmeta_edit.metatrain.trainer import compute_step_gradients, meta_train
from propmeta_edit.models import packed
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.records import EditRequest, MetaTask, Question
from propmeta_edit.text.encoding import TextEncoder

TASKS = [
    MetaTask("a", EditRequest("Ann Lee lives in", "Peru"), Question("What does Ann Lee pay with?", ("sol",))),
    MetaTask("b", EditRequest("Bob Day was born in the city of", "Lima"), Question("Where was Bob Day born?", ("Peru",))),
]
CONFIG = MetaTrainConfig(model="tiny", layers=[0], inner_lr=0.01, outer_lr=0.01, num_inner_steps=2, compile=True)
compile_truly = torch.compile


def traced(plain, dynamic):
    """Through the tracer, and no further: what the machine's compiler makes is not ours to test."""
    return compile_truly(plain, dynamic=dynamic, backend="aot_eager")


def test_compiled_blocks_give_the_same_gradients(family, tokenizer, monkeypatch):
    monkeypatch.setattr(torch, "compile", traced)
    model = tiny.make_model(family, dtype=torch.float32)
    parameters = select_parameters(model, [0])
    parts = encode_step(TextEncoder(tokenizer), TASKS, CONFIG)
    plain = compute_step_gradients(model, parameters, parts, CONFIG)
    blocks = CompiledBlocks(model, parameters)
    with blocks.used():
        compiled = compute_step_gradients(model, parameters, parts, CONFIG)
    assert not blocks._has_failed and blocks._forwards
    for own, expected in zip(compiled.gradients, plain.gradients, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-6)
    assert all("forward" not in block.__dict__ for block in blocks._forwards), "plain again outside"


def test_blocks_up_to_the_trained_one_stay_as_they_are(tokenizer):
    model = tiny.make_model("llama")
    last = len(model.model.layers) - 1
    assert set(CompiledBlocks(model, select_parameters(model, [0]))._forwards) == set(model.model.layers[1:])
    assert CompiledBlocks(model, select_parameters(model, [0, last]))._forwards == {}


def test_where_compiling_fails_the_run_is_that_of_plain_blocks(tokenizer, monkeypatch, caplog):
    calls = []

    def fail(plain, dynamic):
        def forward(*args, **kwargs):
            calls.append(1)
            raise TorchDynamoException("no compiler found\nand much more")

        return forward

    monkeypatch.setattr(torch, "compile", fail)
    model, expected = tiny.make_model("llama"), tiny.make_model("llama")
    meta_train(model, tokenizer, TASKS, CONFIG)
    monkeypatch.undo()
    meta_train(expected, tokenizer, TASKS, MetaTrainConfig(**{**vars(CONFIG), "compile": False}))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))
    assert len(calls) == 1 and caplog.text.count("plain blocks from now on (no compiler found)") == 1


def test_another_error_in_compiled_blocks_is_passed_on(tokenizer, monkeypatch):
    def run_out(plain, dynamic):
        def forward(*args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory")

        return forward

    monkeypatch.setattr(torch, "compile", run_out)
    with pytest.raises(ModelError, match="out of memory with 1 tasks at once"):
        meta_train(tiny.make_model("llama"), tokenizer, TASKS, CONFIG)


def test_weights_of_compiled_blocks_are_not_packed(monkeypatch):
    monkeypatch.setattr(packed, "SMALLEST", 1)
    monkeypatch.setattr(packed, "_has_packed_products", lambda dtype: True)
    model = tiny.make_model("llama", dtype=torch.float32)
    parameters = select_parameters(model, [0])
    inside = {m for block in model.model.layers[1:] for m in block.modules()}
    assert inside & set(packed._find_packed(model, parameters))
    with CompiledBlocks(model, parameters).used():
        assert not inside & set(packed._find_packed(model, parameters)) and packed._find_packed(model, parameters)


def test_what_it_cannot_be_combined_with():
    with pytest.raises(ConfigError, match="compile cannot be combined with shard"):
        MetaTrainConfig(model="tiny", compile=True, shard=True)
