"""Paired comparisons by hand, breakdowns, and the files they go to."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from propmeta_edit.evaluation.comparisons import break_down, compare_parts, compare_with, pool, write_comparisons
from propmeta_edit.evaluation.counts import TOLD_APART
from propmeta_edit.evaluation.rows import Row
from propmeta_edit.evaluation.statistics import compare_paired, wilson_interval


def test_mcnemar_and_difference_by_hand():
    """12 wins, 3 losses, 25 ties: p = 2 Σ_{k<=3} C(15, k) / 2^15, difference 9/40."""
    first = [True] * 12 + [False] * 3 + [True] * 10 + [False] * 15
    second = [False] * 12 + [True] * 3 + [True] * 10 + [False] * 15
    result = compare_paired(first, second)
    assert (result.n, result.wins, result.losses, result.difference) == (40, 12, 3, pytest.approx(9 / 40))
    assert result.p_value == pytest.approx(2 * sum(math.comb(15, k) for k in range(4)) / 2**15)
    deviation = math.sqrt((15 / 40 - (9 / 40) ** 2) / 40)
    assert result.low == pytest.approx(9 / 40 - 1.96 * deviation, abs=0.02)
    assert result.high == pytest.approx(9 / 40 + 1.96 * deviation, abs=0.02)
    assert compare_paired(second, first).difference == -result.difference


def test_no_difference_is_no_evidence():
    result = compare_paired([True, False], [True, False])
    bound = wilson_interval(0, 2)[1]
    assert (result.p_value, result.low, result.high) == (1.0, -bound, bound) and 0.6 < bound < 0.7, "two cases show little"
    all_won, all_lost = compare_paired([True] * 3, [False] * 3), compare_paired([False] * 3, [True] * 3)
    assert (all_won.low, all_won.high) == (1 - 2 * wilson_interval(0, 3)[1], 1.0) and all_won.low < 0
    assert (all_lost.low, all_lost.high) == (-all_won.high, -all_won.low)
    with pytest.raises(ValueError, match="equally long lists of verdicts, got 1 and 2"):
        compare_paired([True], [True, False])


def make_rows(method, verdicts, first=0):
    shas = {"model_sha256": "a", "base_sha256": "a", "data_sha256": "b", "hparams_sha256": "c"}
    base = {"dataset": "cre-id", "model": "m", "seed": 0, **shas}
    return [
        Row(
            method=method, case_id=f"c{first + i}", correct=v, question=f"q|{i}?", answers=("yes", "ja"), generated=f" {v}\n.",
            tags={"relation": "odd" if i % 2 else "even"}, **base,
        )
        for i, v in enumerate(verdicts)
    ]  # fmt: skip


ROWS = [
    *make_rows("in-context", [True, True, True, True]),
    *make_rows("FT", [True, False, False, False]),
    *make_rows("MetaFT", [True, True, True, False, True]),  # c4 has no partner
]


def test_only_shared_cases_are_compared():
    entries = {entry["method"]: entry for entry in compare_with(ROWS, "FT")}
    assert set(entries) == {"in-context", "MetaFT"}
    meta = entries["MetaFT"]
    assert (meta["n"], meta["wins"], meta["losses"], meta["difference"]) == (4, 2, 0, 0.5)
    assert meta["ratio_to_in_context"] == 0.75
    assert compare_with(ROWS, "ROME") == []


RECIPES = {"MetaFT, two seeds": ("MetaFT", "MetaFT-seed1")}
SEEDS = [*ROWS, *make_rows("MetaFT-seed1", [False, True, False, False])]


def test_seeds_are_pooled_on_the_cases_that_all_of_them_have():
    pooled = pool(SEEDS, RECIPES)
    assert {row.method for row in pooled} == {"MetaFT, two seeds"} and len(pooled) == 8, "c4 has one seed alone"
    assert pool(ROWS, RECIPES) == [], "a seed is missing"
    (found,) = [one for one in compare_parts([*SEEDS, *pooled], "FT") if one["method"] == "MetaFT, two seeds"]
    assert (found["measure"], found["n"], found["difference"]) == ("accuracy", 8, pytest.approx(4 / 8 - 1 / 4))


def test_groups_of_facts_are_compared_by_what_is_told_apart():
    """Of two groups of two facts, FT tells one fact apart and MetaFT three."""

    def groups(method, verdicts):
        asked = [
            [{"kind": "together", "after": " yes" if v else " no", "answers": ["yes"], "against": []} for v in g] for g in verdicts
        ]
        rows = make_rows(method, [True, True])
        return [replace(row, probes=tuple(own), tags={TOLD_APART: "2"}) for row, own in zip(rows, asked, strict=True)]

    rows = [*groups("FT", [(True, False), (False, False)]), *groups("MetaFT", [(True, True), (False, True)])]
    (found,) = compare_parts(rows, "FT")
    assert (found["measure"], found["n"], found["difference"]) == ("told_apart_2", 4, 0.5)


def test_breakdown_counts_by_tag():
    table = break_down(ROWS, "relation")
    assert table.loc[("cre-id", "even"), "n"] == 3 and table.loc[("cre-id", "odd"), "n"] == 2
    assert table.loc[("cre-id", "even"), "MetaFT"] == 100.0 and table.loc[("cre-id", "odd"), "FT"] == 0.0
    assert table.loc[("cre-id", "even"), "FT"] == "50.0 (n 2)", "fewer cases than the row's n"
    assert break_down(ROWS, "hops").empty


def test_files(tmp_path):
    markdown = write_comparisons(ROWS, tmp_path, ("FT", "MetaFT"))
    assert (tmp_path / "comparisons.md").read_text() == markdown
    assert "| cre-id | MetaFT | 4 | +50.0 [" in markdown and "## Accuracy % by relation" in markdown
    assert "| q/3? | yes / ja | False . | – |" in markdown, "a cell must not break the table"
    entries = json.loads((tmp_path / "comparisons.json").read_text())
    assert {(e["method"], e["reference"]) for e in entries} == {
        ("in-context", "FT"), ("MetaFT", "FT"), ("in-context", "MetaFT"), ("FT", "MetaFT")
    }  # fmt: skip
    pooled = write_comparisons(SEEDS, tmp_path, ("FT", "MetaFT"), recipes=RECIPES)
    assert "| cre-id | MetaFT, two seeds | accuracy | 8 | +25.0 [" in pooled and pooled.count("| MetaFT, two seeds |") == 1
    assert markdown.index("## Against FT, paired") < markdown.index("## Against MetaFT, paired")


def test_examples_of_every_method_stand_beside_the_unedited_answer(tmp_path):
    markdown = write_comparisons([*ROWS, *make_rows("unedited", [False, True])], tmp_path, ("FT",))
    assert "## FT right on cre-id" in markdown and "## in-context right on cre-id" in markdown and "## unedited" not in markdown
    assert "| question | expected | MetaFT | unedited |" in markdown
    assert "| q/1? | yes / ja | False . | True . |" in markdown, "FT's wrong answer to what the unedited model knew"
    assert "| q/2? | yes / ja | True . | – |" in markdown, "a case that the unedited model was not asked"


def test_rows_without_the_reference_still_have_examples(tmp_path):
    markdown = write_comparisons(make_rows("ROME", [True, False]), tmp_path, ("FT", "MetaFT"))
    assert "(nothing to compare)" in markdown and "## ROME wrong on cre-id" in markdown
