"""What the PyPI form's MEMIT is given: layers that answer as it expects, and a name under which there are second moments."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch

from propmeta_edit.easyedit.layer_outputs import layers_answer_with_tuples
from propmeta_edit.easyedit.wheel_editor import _apply_memit
from propmeta_edit.models.layers import get_blocks

IDS = torch.tensor([[5, 6, 7]])


def test_layers_answer_with_tuples_and_the_model_with_the_same(family):
    model = tiny.make_model(family)
    expected, seen = model(IDS).logits, []
    with layers_answer_with_tuples(model):
        handle = get_blocks(model)[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
        assert torch.equal(model(IDS).logits, expected)
        handle.remove()
    assert isinstance(seen[0], tuple) and torch.equal(model(IDS).logits, expected)


def test_other_architectures_are_left_as_they_are():
    model = SimpleNamespace(config=SimpleNamespace(model_type="gptj"))
    with layers_answer_with_tuples(model):
        pass


@pytest.mark.parametrize(("folder", "name"), [("._cache_gpt2-xl", "./cache/gpt2-xl"), ("gpt2-xl", "gpt2-xl"), (None, "gpt2-xl")])
def test_second_moments_under_either_name_are_found(tmp_path, folder, name):
    if folder is not None:
        (tmp_path / folder).mkdir()
    model = tiny.make_model("gpt2")
    model.config._name_or_path = "./cache/gpt2-xl"
    hparams = SimpleNamespace(stats_dir=str(tmp_path), model_name="./cache/gpt2-xl")
    assert _apply_memit(lambda model, *others: model.config._name_or_path, model, None, [], hparams) == name
    assert model.config._name_or_path == "./cache/gpt2-xl"
