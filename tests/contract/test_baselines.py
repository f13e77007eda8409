"""MEMIT, AlphaEdit and CaKE work in both forms of EasyEdit and leave nothing behind."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.easyedit


@pytest.fixture(scope="module")
def report(form, run_script):
    return run_script(form, "script_baselines.py")


@pytest.mark.parametrize("name", ["MEMIT", "AlphaEdit", "ours"])
def test_the_facts_become_likelier_and_the_weights_come_back(report, family, name):
    result = report[family][name]
    block, projection = ("transformer.h", "c_proj") if family == "gpt2" else ("model.layers", "down_proj")
    assert result["moved"] == [f"{block}.{layer}.mlp.{projection}.weight" for layer in (0, 1)] and result["left"] == []
    assert sum(result["after"]) < 0.9 * sum(result["before"]), result


def test_cake_is_an_algorithm_of_either_form(report, family):
    result = report[family]["CaKE"]
    assert len(result["moved"]) == (12 if family == "gpt2" else 21) and result["left"] == []
    assert sum(result["after"]) < 0.9 * sum(result["before"]), result


@pytest.mark.parametrize(
    ("name", "layers"), [("ROME", [3]), ("MEMIT", [2, 3, 4, 5, 6]), ("AlphaEdit", [2, 3, 4, 5, 6]), ("CaKE", None)]
)
def test_the_second_bundled_family_is_edited_under_its_own_settings(report, name, layers):
    result = report["gemma"][name]
    if layers is None:
        assert len(result["moved"]) == 7 * 18
    else:
        assert result["moved"] == [f"model.layers.{layer}.mlp.down_proj.weight" for layer in layers]
    assert result["left"] == [] and sum(result["after"]) < 0.9 * sum(result["before"]), result


@pytest.mark.parametrize("name", ["MEMIT", "AlphaEdit", "LoRA"])
def test_an_edit_that_fails_half_way_leaves_the_model_as_it_was(report, family, name):
    assert report[family]["failed"][name] == ["out of memory", True, False]


@pytest.mark.parametrize("name", ["CaKE", "AlphaEdit"])
def test_through_base_editor_the_weights_come_back(report, family, name):
    if (report["kind"], family) == ("pypi", "qwen2"):
        assert report[family]["editor"][name] == "this form loads no such family"
    else:
        assert report[family]["editor"][name] == [2, []]


def test_lora_is_merged_and_leaves_no_adapter(report, family):
    result = report[family]["LoRA"]
    assert len(result["moved"]) == (3 if family == "gpt2" else 6) and result["left"] == [] and not result["adapter"]
    assert result["hooks"] == 0, "embeddings would ask for gradients ever after"
    assert sum(result["after"]) < sum(result["before"]), result


@pytest.mark.parametrize("name", ["ROME", "MEMIT", "AlphaEdit"])
def test_what_steps_have_in_common_computed_once_gives_the_same_edit(report, family, name):
    difference, quick, plain = report[family]["quick"][name]
    assert difference < 1e-3 and quick < plain - 2, "the lowest block sees the texts of all steps once"


@pytest.mark.parametrize("name", ["MEMIT", "AlphaEdit"])
def test_an_edit_after_an_undone_one_is_the_same_edit(report, family, name):
    assert report[family][name]["repeats"] < 1e-5


def test_our_alphaedit_is_easyedits(report, family):
    """Where EasyEdit has its own, theirs is compared with ours; in the other form ours is registered under the name."""
    assert report[family]["ours"]["differs"] < 1e-3


@pytest.mark.parametrize("whose", ["ours", "the form's"])
def test_keys_of_earlier_edits_count_while_those_stand(report, family, whose):
    chain = report[family]["chain"][whose]
    assert chain["undone_differs"] < 1e-5 and chain["standing_differs"] > 1e-3 and chain["others_count"] < 1e-5


def test_edits_of_every_method_can_be_kept_and_taken_out_in_any_order(report, family):
    kept = report[family]["kept"]
    assert kept["exact"] == [True] * 6, "MEMIT, AlphaEdit, CaKE, LoRA, ROME, FT: applied again, an edit says the same to the bit"
    assert kept["stood"] > 0 and kept["left"] == [] and min(kept["moved"]) > 0
    assert kept["moved"][4:6] == [1, 2 if family == "gpt2" else 1], "ROME and FT: one projection, with its bias by FT"
