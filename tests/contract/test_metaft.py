"""MetaFT keeps EasyEdit's contract in both forms, on GPT-2, Llama and Qwen2, whatever the model's folder is called."""

from __future__ import annotations

import pytest
import tiny

from propmeta_edit.models.layers import select_parameters

pytestmark = pytest.mark.easyedit


@pytest.fixture(scope="module")
def report(form, run_script):
    return run_script(form, "script_metaft.py")


@pytest.mark.parametrize("way", ["edit", "no_subject", "batch"])
def test_the_fact_is_written_and_the_weights_come_back(report, family, way):
    result = report[family][way]
    assert result["changed"] == []
    assert result["originals"] == sorted(select_parameters(tiny.make_model(family), [1]))
    assert result["originals_moved"] == 0
    assert sum(score[0] for score in result["post"]) >= 2.5 > sum(score[0] for score in result["pre"]) + 1
    assert result["locality"] == [True] * 3


def test_sequential_edits_stay(report, family):
    result = report[family]["edit_sequential"]
    assert result["changed"] == result["originals"] and result["originals_moved"] == len(result["originals"])


def test_a_sequential_edit_of_one_request_can_be_kept(report, family):
    kept = report[family]["kept"]
    assert kept["left"] == [] and kept["exact"] and kept["as_model"], "its folder names the edited model, too"
    assert "there is no edit in this model" in kept["put_back"] and "sequential_edit=True" in kept["put_back"]


def test_texts_before_and_after_an_edit(report, form):
    if form.kind == "pypi":
        pytest.skip("generate_edit is in the repository form only")
    result = report["llama"]["generate_edit"]
    assert result["texts"]["post"].strip().startswith("Lima") and not result["texts"]["pre"].strip().startswith("Lima")
    assert result["changed"] == [] and result["originals"] == sorted(select_parameters(tiny.make_model("llama"), [1]))
    assert result["asked"] == ["portability_ans", "rephrase_ans", "rewrite_ans"]


def test_given_requests_are_used_and_left_alone(report, family):
    assert report[family]["given_requests"] == {"count": 3, "untouched": True}


def test_a_place_for_the_subject_is_filled_in_for_the_scores_too(report):
    places, filled = report["llama"]["places"], report["llama"]["filled"]
    assert (places["pre"], places["post"]) == (filled["pre"], filled["post"])
    assert sum(score[0] for score in places["post"]) > sum(score[0] for score in places["pre"]) + 1


def test_loading_is_ours(report, family):
    assert report[family]["padding_side"] == "left" and report[family]["dtypes"] == ["torch.float32"]


def test_an_empty_target_is_refused_and_changes_nothing(report, family):
    result = report[family]["empty_target"]
    assert "target_new must be a non-empty string, got ' '" in result["error"] and result["changed"] == []


def test_an_existing_ft_script_runs_with_its_hparams_line_changed(report):
    assert report["script"]["post"] == [[1.0], [1.0]]
