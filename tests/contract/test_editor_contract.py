"""What ``BaseEditor`` does with EasyEdit's own FT and with an algorithm of ours, in both forms and on two architectures."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.easyedit
EDITED = {"gpt2": "transformer.h.1.mlp.c_proj", "llama": "model.layers.1.mlp.down_proj"}
CASES = [(family, method) for family in EDITED for method in ("FT", "Shift")]


@pytest.fixture(scope="module")
def report(form, run_script):
    return run_script(form, "script_editor.py")


@pytest.fixture(params=CASES, ids=[" ".join(case) for case in CASES])
def case(request, report):
    """(what every way of calling did, the parameters it edits)."""
    family, method = request.param
    suffixes = ("bias", "weight") if (family, method) == ("gpt2", "FT") else ("weight",)
    return report[f"{family} {method}"], [f"{EDITED[family]}.{suffix}" for suffix in suffixes]


@pytest.mark.parametrize("way", ["edit", "edit_requests", "batch"])
def test_weights_are_bit_exact_after_edits_that_are_not_sequential(case, way):
    ways, parameters = case
    assert ways[way]["changed"] == []
    assert ways[way]["originals"] == parameters and ways[way]["originals_moved"] == 0


@pytest.mark.parametrize("way", ["edit_sequential", "batch_sequential"])
def test_sequential_edits_stay_and_the_last_ones_originals_are_returned(case, way):
    ways, parameters = case
    assert ways[way]["changed"] == parameters
    # Before the last edit the earlier ones had moved every edited tensor already.
    assert ways[way]["originals"] == parameters and ways[way]["originals_moved"] == len(parameters)


def test_every_request_of_every_chunk_has_metrics(case):
    ways, _ = case
    counts = {way: [len(result["pre"]), len(result["post"])] for way, result in ways.items()}
    assert counts == {way: [2, 2] if way == "edit_requests" else [3, 3] for way in ways}
    assert ways["edit"]["locality"] == ways["batch"]["locality"] == ways["batch_sequential"]["locality"] == [True] * 3


def test_scores_before_are_of_the_unedited_model(case):
    ways, _ = case
    before = ways["edit"]["pre"]
    assert all(ways[way]["pre"] == before for way in ("edit_sequential", "batch"))
    assert ways["edit_requests"]["pre"] == before[:2]


@pytest.mark.parametrize("family", EDITED)
def test_fine_tuning_moves_the_score(report, family):
    result = report[f"{family} FT"]["edit"]
    assert sum(score[0] for score in result["post"]) > sum(score[0] for score in result["pre"])


@pytest.fixture
def wheel(report, form):
    if form.kind != "pypi":
        pytest.skip("of the PyPI form only")
    return report["wheel"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("unknown", "would ignore loc_prompts;"),
        ("unknown_batch", "would ignore locality_prompts;"),
        ("contradiction", "sequential_edit=True keeps the edits"),
    ],
)
def test_what_the_wheel_would_ignore_is_refused_before_any_edit(wheel, call, message):
    assert message in wheel[call]["error"]
    assert wheel[call]["changed"] == []


def test_the_wheel_takes_requests_and_its_own_word_for_keeping_edits(wheel):
    assert wheel["requests"]["changed"] == [] and len(wheel["requests"]["post"]) == 1
    assert wheel["wheel_keeps"]["changed"] == wheel["wheel_keeps_batch"]["changed"] == [EDITED["llama"] + ".weight"]
    assert wheel["undone_batch"]["changed"] == [] and wheel["undone_batch"]["originals"]


def test_a_request_without_a_locality_prompt_has_no_locality(wheel):
    assert wheel["some_locality"]["locality"] == [True, False, True]


def test_a_single_edit_leaves_the_batch_size(wheel):
    assert wheel["batch_size"] == 2


def test_the_wheel_edits_a_data_set_in_chunks_and_reports_all_records(wheel):
    data_set = wheel["data_set"]
    assert data_set["changed"] == [] and data_set["case_ids"] == [0, 1, 2]
    assert [len(chunk) for chunk in data_set["chunks"]] == [2, 1]


def test_the_wheels_lora_runs_and_is_taken_off_again(report, wheel):
    assert report["lora"]["metrics"] == 2 and report["lora"]["changed"] == []
    assert "starts its adapter anew" in report["lora"]["sequential"]["error"]
