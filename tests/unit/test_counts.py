"""Propagation against leak, told apart, real neighbours: each count by hand, on invented rows and cases."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from propmeta_edit.evaluation.asking import Examiner, prompts_of, prompts_to_compare
from propmeta_edit.evaluation.companions import NUM_OTHERS, NUM_REAL, SEEN, with_groups, with_probes, with_seen
from propmeta_edit.evaluation.counts import COUNTS, TOLD_APART, TOLD_APART_OF, compare_counts, count, count_told_apart, group_of
from propmeta_edit.evaluation.rows import Row, RowFile
from propmeta_edit.evaluation.scoring import contains_answer
from propmeta_edit.evaluation.tables import make_markdown, summarise
from propmeta_edit.models.generation import generate_greedily
from propmeta_edit.records import ELSEWHERE, OTHER, PARAPHRASE, REAL, SAME_FACT, TOGETHER, Case, EditRequest, Probe, Question
from propmeta_edit.studies.pictures import draw_leaks

BASE = {"model": "tiny", "model_sha256": "m", "data_sha256": "d", "hparams_sha256": "h", "seed": 0, "base_sha256": "m"}


def probe(kind, after, before=None, answers=("?",), against=()):
    about = {"kind": kind, "question": "What?", "answers": list(answers), "against": list(against)}
    return {**about, "before": before, "after": after}


def row(case_id="0", correct=True, before=" a peso", tags=None, probes=(), method="FT", dataset="cre-ood", **more):
    more = {"answers": ("krone",), **more}
    return Row(method, dataset, case_id, correct=correct, before=before, tags=tags or {}, probes=tuple(probes), **BASE, **more)


def other(after, before=" a peso"):
    return probe(OTHER, after, before, answers=("euro",), against=("krone",))


def counted(rows):
    return count(rows, COUNTS)


def test_leak_and_net_are_over_pairs_that_did_not_have_the_answer_before():
    """Of five pairs: two leak; of the two rows with pairs one is right, with three and one of them."""
    rows = [
        row("right", True, probes=[other(" a krone"), other(" a euro"), other(" krone", " krone"), other(" krones")]),
        row("wrong", False, probes=[other(" euro")]),
        row("known before", True, before=" the KRONE", probes=[other(" krone")]),
        row("nothing to compare", True),
    ]
    found = counted(rows)
    assert (found["own_n"], found["leak_n"], found["net_n"]) == (4, 4, 4)
    assert found["own"] == 3 / 4 and found["leak"] == 2 / 4 and found["net"] == pytest.approx(1 / 4)
    assert found["unchanged"] == 1 / 6 and found["unchanged_n"] == 6, "one of all others kept its words"


def test_a_row_without_an_edit_has_nothing_to_compare():
    asked = [probe(kind, " krone", answers=("krone",), against=("euro",)) for kind in (OTHER, ELSEWHERE, REAL, PARAPHRASE)]
    found = counted([row(before=None, probes=asked)])
    compared = ("own", "leak", "net", "unchanged", "target_elsewhere", "locality_real")
    assert all(found[name] is None and found[f"{name}_n"] == 0 for name in compared)
    assert found["accuracy_paraphrase"] == 1 and found["accuracy_all_n"] == 1


def test_a_model_that_always_says_the_newest_answer_has_no_net():
    rows = [row(str(n), True, probes=[other(" krone")] * 4) for n in range(5)]
    found = counted(rows)
    assert found["own"] == found["leak"] == 1 and found["net"] == 0


def test_accuracy_over_all_questions_of_the_fact():
    rows = [
        row("0", True, probes=[probe(SAME_FACT, " Oslo", answers=("Oslo",)), probe(SAME_FACT, " Bergen", answers=("Oslo",))]),
        row("1", False, probes=[other(" euro")]),
    ]
    found = counted(rows)
    assert found["accuracy_all_n"] == 4 and found["accuracy_all"] == 2 / 4
    assert found["accuracy_paraphrase"] is None and found["accuracy_paraphrase_n"] == 0


def test_real_neighbours_count_where_the_answer_was_known_and_targets_where_they_are_new():
    rows = [
        row(
            probes=[
                probe(REAL, " euro", " euro", answers=("euro",)),
                probe(REAL, " krone", " euro", answers=("euro",)),
                probe(REAL, " euro", " dollar", answers=("euro",)),
                probe(ELSEWHERE, " Norway", " Spain", answers=("Spain",), against=("Norway",)),
                probe(ELSEWHERE, " Norway", " Norway", answers=("Spain",), against=("Norway",)),
            ]
        )
    ]
    found = counted(rows)
    assert (found["locality_real"], found["locality_real_n"]) == (1 / 2, 2)
    assert (found["target_elsewhere"], found["target_elsewhere_n"]) == (1.0, 1)


def test_intervals_are_by_bootstrap_over_groups():
    """A hundred rows of two groups that agree within themselves say as little as two rows."""
    tags = [{"entity_name": name, "relation": "currency"} for name in ("Norway", "Spain")]
    rows = [row(str(n), n % 2 == 0, tags=tags[n % 2], probes=[other(" euro")]) for n in range(100)]
    found = counted(rows)
    assert found["own"] == 0.5 and found["own_ci95"] == [0.0, 1.0]
    assert group_of(rows[0]) == ("Norway", "currency")
    single = count([replace(r, tags={"entity_name": r.case_id, "relation": "c"}) for r in rows], COUNTS)["own_ci95"]
    assert 0.35 < single[0] < 0.45 < 0.55 < single[1] < 0.65
    assert counted(rows[:1])["own_ci95"] is None, "one group has no interval"


def test_own_and_leak_are_drawn_as_two_bars_a_method():
    tags = [{"entity_name": str(n), "relation": "c"} for n in range(4)]
    rows = [row(str(n), n < 3, tags=tags[n], probes=[other(" krone" if n < 1 else " euro")]) for n in range(4)]
    rows += [replace(r, method="in-context") for r in rows] + [row("0", method="unedited", before=None)]
    figure = draw_leaks(summarise(rows))
    [axis] = figure.axes
    own, leak = axis.containers[-1], axis.containers[0]
    widths = sorted({round(bar.get_width(), 6) for bar in axis.patches})
    assert widths == [25.0, 75.0] and len(axis.patches) == 4 and own is not leak, "a row without pairs has no bars"
    assert [label.get_text() for label in axis.get_yticklabels()] == ["FT\nnet +50", "in-context\nnet +50"]
    assert draw_leaks(summarise([row("0", method="unedited", before=None)])) is None


def test_nets_are_compared_on_the_same_cases_over_groups():
    """Method a has net 1 where b has 0 in each of 40 groups; cases that only one of them has do not count."""
    net = next(one for one in COUNTS if one.column == "net")
    tags = [{"entity_name": str(n), "relation": "c"} for n in range(40)]
    a = [row(str(n), True, tags=tags[n], probes=[other(" euro")]) for n in range(40)]
    b = [row(str(n), n % 2 == 0, tags=tags[n], probes=[other(" krone" if n % 2 == 0 else " euro")]) for n in range(40)]
    found = compare_counts([*a, row("only here", False, probes=[other(" krone")])], b, net)
    assert (found["n"], found["difference"], found["low"], found["high"], found["p_value"]) == (40, 1.0, 1.0, 1.0, 0.001)
    same = compare_counts(b, b, net)
    assert (same["difference"], same["low"], same["high"], same["p_value"]) == (0, 0, 0, 1.0)
    assert compare_counts(a[:1], b[:1], net) is None and compare_counts([row("0")], [row("0")], net) is None


def test_facts_told_apart_are_right_crossed_or_neither():
    asked = [
        probe(TOGETHER, " krone", answers=("krone",), against=("euro", "peso")),
        probe(TOGETHER, " peso", answers=("euro",), against=("krone", "peso")),
        probe(TOGETHER, " dollar", answers=("peso",), against=("krone", "euro")),
        probe(TOGETHER, " krone or euro", answers=("euro",), against=("krone",)),
    ]
    tags = {TOLD_APART: "4", TOLD_APART_OF: "cre-ood"}
    group = row("4-0", tags=tags, probes=asked, dataset="cre-ood, 4 told apart")
    found = count_told_apart([group], 4)
    assert (found["told_apart_4"], found["crossed_4"], found["told_apart_4_n"]) == (0.5, 0.25, 4)
    assert found["told_apart_4_groups"] == 1 and count_told_apart([group], 2)["told_apart_2"] is None
    summary = summarise([row("0", probes=[other(" euro")]), group, row("0", method="ROME")])
    assert [(entry["method"], entry["dataset"], entry["told_apart_4"]) for entry in summary] == [
        ("FT", "cre-ood", 0.5),
        ("ROME", "cre-ood", None),
    ], "a group stands with its data set, and what was not asked is none"
    assert all(f"{name}_n" in summary[0] for name in ("accuracy", "leak", "net", "told_apart_4", "locality_real"))
    assert "told apart, 4 facts %" in make_markdown(summary) and "50.0 (n 4)" in make_markdown(summary)


def make_case(n, relation="currency", answers=None):
    country, money = f"Land{n}", answers or (f"coin{n}",)
    return Case(
        f"c{n}",
        (EditRequest(f"Ann{n} Lee was born in", country, f"Ann{n} Lee"),),
        Question(f"What is the currency of the country that Ann{n} Lee was born in?", money),
        second_hop=Question(f"What is the currency of {country}?", money),
        tags={"relation": relation, "entity_name": country},
    )


CASES = [make_case(n) for n in range(10, 20)]


def test_probes_are_of_other_subjects_with_other_answers():
    for case in with_probes([*CASES, make_case(30, "capital"), make_case(31, answers=("coin10",))], seed=0):
        kinds = [p.kind for p in case.probes]
        if case.case_id == "c30":
            assert kinds == [], "there is no other case of the relation"
            continue
        assert kinds == [OTHER] * NUM_OTHERS + [ELSEWHERE] + [REAL] * NUM_REAL
        for p in case.probes:
            assert case.edits[0].subject not in p.question.text and case.edits[0].target_new not in p.question.text
            assert not any(contains_answer(answer, case.question.answers) for answer in p.question.answers)
        assert {p.against for p in case.probes if p.kind == OTHER} == {case.question.answers}
        assert [p.against for p in case.probes if p.kind == ELSEWHERE] == [(case.edits[0].target_new,)]
        assert len({p.question.text for p in case.probes}) == len(case.probes)
    assert with_probes(CASES, 0) == with_probes(CASES, 0) != with_probes(CASES, 1), "drawn by the seed"
    several = replace(CASES[0], edits=CASES[0].edits * 2)
    assert with_probes([several, *CASES[1:]], 0)[0] == several


def test_groups_hold_facts_of_one_kind_with_different_answers():
    born = [make_case(n, answers=(f"coin{n % 3}",)) for n in range(10, 22)]
    lives = [replace(make_case(n), edits=(EditRequest(f"Ann{n} Lee lives in", f"Land{n}", f"Ann{n} Lee"),)) for n in range(40, 43)]
    groups = with_groups([*born, *lives], 3, seed=0, number=100)
    assert sorted(len(group.edits) for group in groups) == [3] * 5, "four of those born, one of those who live"
    used = [edit.subject for group in groups for edit in group.edits]
    assert len(set(used)) == len(used) == 15
    for group in groups:
        assert len({edit.prompt.replace(edit.subject, "") for edit in group.edits}) == 1
        assert [p.kind for p in group.probes] == [TOGETHER] * 3
        assert len({p.question.answers for p in group.probes}) == 3
        for p in group.probes:
            assert sorted(p.against) == sorted(a for q in group.probes if q is not p for a in q.question.answers)
    assert with_groups(born, 4, 0, 100) == [], "only three answers differ"
    assert len(with_groups(born, 2, 0, 2)) == 2


def test_what_training_held_is_told_of_cases_that_name_their_entity():
    training = [make_case(10), make_case(11, "capital")]
    same, other, nameless = with_seen([make_case(10), make_case(12), replace(CASES[0], tags={"relation": "P36"})], training)
    assert [same.tags[tag] for tag in SEEN] == ["yes", "yes", "yes"]
    assert [other.tags[tag] for tag in SEEN] == ["no", "no", "yes"]
    assert nameless.tags == {"relation": "P36"}


def test_probes_are_asked_and_stay_with_the_row(tokenizer, tmp_path):
    model = tiny.make_model("llama", dtype=torch.float32)
    again = Probe(PARAPHRASE, Question("Which currency does the land of birth of Ann10 Lee have?", ("coin10",)))
    [case, *_] = with_probes([replace(CASES[0], probes=(again,)), *CASES[1:]], 0)
    examiner = Examiner(model, tokenizer)
    examiner.ask_unedited([case])
    [said] = examiner.ask([case])
    assert len(said.probes) == len(case.probes) == 1 + NUM_OTHERS + 1 + NUM_REAL
    for number, (p, kept) in enumerate(zip(case.probes, said.probes, strict=True)):
        prompt = prompts_of(case)[f"probe {number}"]
        assert (p.kind == ELSEWHERE) == (prompt == p.question.text), "a fact's prompt is asked as it is"
        assert kept["after"] == generate_greedily(model, tokenizer, [prompt])[0]
        assert (kept["before"] is None) == (p.kind == PARAPHRASE) and kept["before"] in (None, kept["after"])
    assert said.before == said.generated and "question" in prompts_to_compare(case)
    rows = RowFile(tmp_path / "rows.jsonl")
    rows.append(row("c10", answers=("coin10",), probes=said.probes))
    [read] = RowFile(tmp_path / "rows.jsonl").rows
    assert read.probes == said.probes and counted([read])["leak_n"] == NUM_OTHERS
