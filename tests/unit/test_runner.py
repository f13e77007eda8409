"""Rows on disk, resuming, and tables: counted by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from propmeta_edit.errors import DataError, ModelError, OriginError
from propmeta_edit.evaluation.counts import COUNTS, count, told_apart_counts
from propmeta_edit.evaluation.measures import CaseOutcome
from propmeta_edit.evaluation.rows import Row, RowFile, protocol_of
from propmeta_edit.evaluation.runner import DataSet, Method, MethodSpec, choose_cases, run_methods
from propmeta_edit.evaluation.statistics import wilson_interval
from propmeta_edit.evaluation.tables import make_markdown, require_comparable, summarise, write_tables
from propmeta_edit.records import FACT, OTHER, PARAPHRASE, REAL, SAME_FACT, TOGETHER, WEIGHED, Case, EditRequest, Probe, Question

CASES = [
    Case(f"c{i}", (EditRequest(f"Ann {i} lives in", "Peru"),), Question(f"What does Ann {i} pay with?", ("sol",), cloze=cloze))
    for i, cloze in enumerate(["Ann pays with", None, "Ann pays with", None, None])
]
DATA = DataSet("cre-id", "data", CASES)
ANSWERS = {"c0": " the sol", "c1": " the solution", "c2": " euro", "c3": " sol."}


class Spoken(Method):
    """Answers from a dict; c4 is not in it and fails."""

    def __init__(self):
        self.asked = []

    def evaluate_many(self, cases):
        return [self.evaluate(case) for case in cases]

    def evaluate(self, case):
        self.asked.append(case.case_id)
        if case.case_id not in ANSWERS:
            raise ModelError("no answer for c4")
        cloze = None if case.question.cloze is None else " sol"
        fact = (" Peru",) if case.case_id != "c2" else (" Chile",)
        said = ANSWERS[case.case_id]
        whole = {"c0": " a coin. The sol"}.get(case.case_id, said)  # the answer comes after the first sentence
        tokens = {"answer_tokens": 11 if case.case_id == "c1" else 2, "fact_tokens": 10}
        return CaseOutcome(said, cloze, fact, float(case.case_id[1]) + 1, whole=whole, facts_whole=fact, **tokens)


def make_spec(method, hparams="h", name="MetaFT"):
    return MethodSpec(name, "tiny", "weights", hparams, build=lambda: method)


def run(path, method, limit=None, **kwargs):
    rows = RowFile(path)
    failures = run_methods([make_spec(method, **kwargs)], [DATA], rows, limit=limit, seed=0, versions={"torch": "x"})
    return rows, failures


@pytest.mark.parametrize("settings", [{}, {"tf32": False}, {"tf32": True}])
def test_a_row_says_that_tf32_was_on_and_else_is_as_it_was(tmp_path, settings):
    is_on = settings.get("tf32", False)
    spec = replace(make_spec(Spoken()), settings=settings)
    run_methods([spec], [DATA], RowFile(tmp_path / "rows.jsonl"), limit=1, seed=0, versions={})
    [line] = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert ("tf32" in json.loads(line)) == is_on
    assert [row.tf32 for row in RowFile(tmp_path / "rows.jsonl").rows] == [is_on]


def test_verdicts_and_summary_by_hand(tmp_path):
    rows, failures = run(tmp_path / "rows.jsonl", Spoken())
    assert failures == 1
    by_case = {row.case_id: row for row in rows.rows}
    assert {c: (r.correct, r.correct_word_boundary, r.efficacy, r.cloze_correct) for c, r in by_case.items()} == {
        "c0": (True, True, True, True),
        "c1": (True, False, True, None),
        "c2": (False, False, False, True),
        "c3": (True, True, True, None),
        "c4": (False, False, False, None),
    }
    assert "no answer for c4" in by_case["c4"].error and by_case["c0"].error is None
    (entry,) = summarise(rows.rows)
    assert (entry["n"], entry["accuracy"], entry["accuracy_word_boundary"], entry["efficacy"]) == (5, 0.6, 0.4, 0.6)
    assert (entry["accuracy_cloze"], entry["seconds_per_edit"], entry["seconds_per_edit_median"]) == (1.0, 2.5, 2.5)
    assert entry["errors"] == 1 and entry["accuracy_ci95"] == list(wilson_interval(3, 5))


def test_a_row_that_hardly_writes_its_facts_is_marked(tmp_path):
    (entry,) = summarise(run(tmp_path / "rows.jsonl", Spoken())[0].rows)
    assert "‡" not in make_markdown([entry])
    barely = make_markdown([{**entry, "efficacy": 0.4, "efficacy_ci95": [0.1, 0.8]}])
    assert "40.0 [10.0, 80.0] ‡" in barely and "‡: fewer than 50 % of the facts" in barely and "choose-rate" in barely
    assert "‡" not in make_markdown([{**entry, "efficacy": 0.4, "seconds_per_edit": None}]), "nothing was edited"


def test_a_killed_run_goes_on_and_ends_the_same(tmp_path):
    whole, _ = run(tmp_path / "whole.jsonl", Spoken())
    path = tmp_path / "rows.jsonl"
    text = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(text[:2]) + text[2][:40])  # killed inside the third line
    method = Spoken()
    rows, _ = run(path, method)
    assert method.asked == [row.case_id for row in whole.rows[2:]]
    assert [replace(row, seconds=None) for row in RowFile(path).rows] == [replace(row, seconds=None) for row in whole.rows]
    again = Spoken()
    run(path, again)
    assert again.asked == [] and len(rows.rows) == 5


def test_what_cannot_run_is_refused_before_any_row_runs(tmp_path):
    def refuse():
        raise ModelError("no such thing here")

    first = Spoken()
    specs = [make_spec(first), replace(make_spec(Spoken(), name="other"), check=refuse)]
    rows = RowFile(tmp_path / "rows.jsonl")
    with pytest.raises(ModelError, match="no such thing here"):
        run_methods(specs, [DATA], rows, limit=None, seed=0, versions={})
    assert first.asked == [] and rows.rows == []


def test_finished_methods_are_not_built(tmp_path):
    run(tmp_path / "rows.jsonl", Spoken())
    spec = MethodSpec("MetaFT", "tiny", "weights", "h", build=lambda: pytest.fail("built"))
    run_methods([spec], [DATA], RowFile(tmp_path / "rows.jsonl"), limit=None, seed=0, versions={})


def test_a_larger_limit_continues_a_smaller_one(tmp_path):
    first = [case.case_id for case in choose_cases(CASES, 2, seed=3)]
    assert [case.case_id for case in choose_cases(CASES, 4, seed=3)][:2] == first
    assert sorted(case.case_id for case in choose_cases(CASES, None, seed=3)) == ["c0", "c1", "c2", "c3", "c4"]
    run(tmp_path / "rows.jsonl", Spoken(), limit=2)
    method = Spoken()
    run(tmp_path / "rows.jsonl", method, limit=4)
    assert len(method.asked) == 2


def test_a_slow_method_can_have_fewer_cases(tmp_path):
    methods = {name: Spoken() for name in ("MetaFT", "ROME")}
    specs = [make_spec(method, name=name) for name, method in methods.items()]
    run_methods(specs, [DATA], RowFile(tmp_path / "rows.jsonl"), limit=4, limits={"ROME": 2}, seed=0, versions={})
    assert len(methods["MetaFT"].asked) == 4 and methods["ROME"].asked == methods["MetaFT"].asked[:2]


def test_other_settings_are_not_mixed_in(tmp_path):
    run(tmp_path / "rows.jsonl", Spoken(), limit=2)
    method = Spoken()
    with pytest.raises(
        OriginError, match=r"holds rows of MetaFT on cre-id made from something else \(hparams_sha256 'h', now 'other'\)"
    ):
        run(tmp_path / "rows.jsonl", method, hparams="other")
    assert method.asked == []


def test_broken_lines_are_named(tmp_path):
    rows, _ = run(tmp_path / "rows.jsonl", Spoken(), limit=2)
    text = rows.path.read_text()
    rows.path.write_text(text.replace('"method"', "method", 1))
    with pytest.raises(DataError, match=r"rows\.jsonl, line 1: broken line"):
        RowFile(rows.path)
    with pytest.raises(DataError, match="is in the file already"):
        rows.append(rows.rows[0])


SOURCES = {"model": "m", "model_sha256": "a", "base_sha256": "a", "data_sha256": "b", "hparams_sha256": "c", "seed": 0}
BASE = {"method": "FT", "dataset": "d", **SOURCES}


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0c", "\n", "\r\n"])
def test_a_generated_line_separator_does_not_break_the_file(tmp_path, separator):
    row = Row(case_id="1", generated=f"a{separator}b", fact_generated=("x", "y"), **BASE)
    RowFile(tmp_path / "rows.jsonl").append(row)
    assert RowFile(tmp_path / "rows.jsonl").rows == [row]


def test_a_kill_inside_any_byte_of_a_row_loses_that_row_only(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [Row(case_id=case_id, generated=" São 🇫🇷", **BASE) for case_id in ("1", "2")]
    for row in rows:
        RowFile(path).append(row)
    content = path.read_bytes()
    end_of_first = content.index(b"\n") + 1
    for cut in range(end_of_first, len(content)):
        path.write_bytes(content[:cut])
        file = RowFile(path)
        assert file.rows == rows[:1] and path.read_bytes() == content[:end_of_first]
    file.append(rows[1])
    assert path.read_bytes() == content


def test_bytes_that_are_no_utf8_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    RowFile(path).append(Row(case_id="1", **BASE))
    path.write_bytes(path.read_bytes() + b"\xff\n")
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: broken line"):
        RowFile(path)


def test_a_case_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    for case_id in ("1", "2"):
        RowFile(path).append(Row(case_id=case_id, **BASE))
    first, second = path.read_text().splitlines(keepends=True)
    path.write_text(first + second + first)
    with pytest.raises(DataError, match=r"line 3: the case \('FT', 'd', '1'\) is in line 1 already"):
        RowFile(path)


def test_a_failed_case_counts_as_wrong_in_the_cloze_accuracy_too(tmp_path):
    """c0 and c2 have a cloze and answer it; the third case with one fails: 2 of 3."""
    failing = Case("c5", (EditRequest("Ann lives in", "Peru"),), Question("What?", ("sol",), cloze="Ann pays with"))
    rows = RowFile(tmp_path / "rows.jsonl")
    run_methods([make_spec(Spoken())], [DataSet("d", "s", [*CASES[:4], failing])], rows, limit=None, seed=0, versions={})
    (entry,) = summarise(rows.rows)
    assert (entry["n"], entry["accuracy"], entry["accuracy_cloze"], entry["errors"]) == (5, 0.6, pytest.approx(2 / 3), 1)


def test_only_failures_of_what_was_asked_for_are_counted(tmp_path):
    run(tmp_path / "rows.jsonl", Spoken(), name="FT")
    rows = RowFile(tmp_path / "rows.jsonl")
    assert run_methods([make_spec(Spoken(), name="FT")], [DATA], rows, limit=None, seed=0, versions={}) == 1
    without_failure = DataSet(DATA.name, DATA.sha256, CASES[:4])
    assert run_methods([make_spec(Spoken())], [without_failure], rows, limit=None, seed=0, versions={}) == 0


def test_an_interrupt_stops_the_run_and_keeps_what_is_done(tmp_path):
    class Interrupted(Spoken):
        def evaluate(self, case):
            if len(self.asked) == 2:
                raise KeyboardInterrupt
            return super().evaluate(case)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "rows.jsonl", Interrupted(), limit=4)
    assert len(RowFile(tmp_path / "rows.jsonl").rows) == 2


def test_tables_refuse_to_mix():
    with pytest.raises(DataError, match="tabulate them apart"):
        summarise([Row(case_id="1", **BASE), Row(case_id="2", **{**BASE, "seed": 1})])
    with pytest.raises(DataError, match="different protocols"):
        summarise([Row(case_id="1", **BASE), Row(case_id="2", **{**BASE, "method": "ROME"}, protocol="another")])
    assert protocol_of() != "another" and protocol_of(20) != protocol_of()
    with pytest.raises(DataError, match="different files"):
        summarise([Row(case_id="1", **BASE), Row(case_id="2", **{**BASE, "method": "ROME", "data_sha256": "other"})])


def test_tables_refuse_rows_of_different_bases_and_seeds():
    ft = Row(case_id="1", **BASE)
    require_comparable([ft, replace(ft, method="MetaFT", model_sha256="z")])
    with pytest.raises(DataError, match=r"rows of FT \(a\) and ROME \(other\) started from different base models"):
        require_comparable([ft, replace(ft, method="ROME", base_sha256="other")])
    with pytest.raises(DataError, match=r"rows of FT \(0\) and ROME \(1\) were run with different seeds"):
        require_comparable([ft, replace(ft, method="ROME", seed=1)])
    with pytest.raises(DataError, match="rows of d come from different files of that name"):
        require_comparable([ft, replace(ft, method="ROME", data_sha256="other")])


@pytest.mark.parametrize(
    ("names", "case_ids", "message"),
    [
        (["FT", "FT"], ["a"], "methods must have different names, but there are several of FT"),
        (["FT"], ["a", "b", "a"], "cases of d must have different names, but there are several of a"),
    ],
)
def test_names_that_are_not_unique_are_refused_before_anything_runs(tmp_path, names, case_ids, message):
    rows, spoken = RowFile(tmp_path / "rows.jsonl"), Spoken()
    data = DataSet("d", "sha", [replace(CASES[0], case_id=case_id) for case_id in case_ids])
    with pytest.raises(DataError, match=message):
        run_methods([replace(make_spec(spoken), name=n) for n in names], [data], rows, limit=None, seed=0, versions={})
    assert not spoken.asked and not rows.rows


def test_a_model_that_finds_no_memory_leaves_its_row_out_alone(tmp_path, caplog):
    def build():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    def run_both(large):
        rows = RowFile(tmp_path / "rows.jsonl")
        specs = [replace(make_spec(Spoken()), name="large", build=large), make_spec(Spoken())]
        return run_methods(specs, [DataSet("d", "data", CASES[:4])], rows, limit=None, seed=0, versions={}), rows

    failures, rows = run_both(build)
    assert failures == 4 == len(rows.rows) and {row.method for row in rows.rows} == {"MetaFT"}
    assert "large is left out: there is no memory for its model" in caplog.text
    failures, rows = run_both(Spoken)
    assert failures == 0 and len(rows.rows) == 8, "there was memory this time"


def test_failed_cases_run_again_when_they_are_forgotten(tmp_path):
    class Recovered(Spoken):
        def evaluate(self, case):
            return super().evaluate(case if case.case_id in ANSWERS else replace(CASES[0], case_id="c0"))

    path = tmp_path / "rows.jsonl"
    run(path, Spoken())
    method = Recovered()
    assert run(path, method)[1] == 1 and not method.asked, "failed is finished"
    assert RowFile(path).forget_failed() == 1 and len(RowFile(path).rows) == len(CASES) - 1
    assert run(path, method)[1] == 0 and len(method.asked) == 1
    assert RowFile(path).forget_failed() == 0


class Greedy(Spoken):
    """Has memory for three cases at once."""

    def evaluate_many(self, cases):
        self.asked.append(len(cases))
        if len(cases) > 3:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried")
        return [CaseOutcome(" sol", None, (" Peru",), None) for _ in cases]


def test_where_memory_runs_out_fewer_go_together_from_then_on(tmp_path):
    cases = [Case(f"k{n}", (EditRequest("Ann lives in", "Peru"),), Question("What?", ("sol",))) for n in range(10 + 16)]
    rows, method = RowFile(tmp_path / "rows.jsonl"), Greedy()
    spec = replace(make_spec(method), cases_at_once=8)
    assert run_methods([spec], [DataSet("d", "data", cases)], rows, limit=None, seed=0, versions={}) == 0
    assert method.asked == [1] * 10 + [8, 4, 2, 2, 2, 2] + [2] * 4, "halved twice, once"
    assert [row.cases_at_once for row in rows.rows] == [1] * 10 + [2] * 16
    (entry,) = summarise(rows.rows)
    assert entry["n"] == 26 and entry["errors"] == 0 and entry["cases_at_once"] == 2 and entry["cases_per_second"] > 0
    assert "MetaFT on d: out of memory with 4 cases at once." in make_markdown([entry])
    assert "(2 at once)" in make_markdown([{**entry, "seconds_per_edit": 1.0}])
    assert "at once)" not in make_markdown([{**entry, "seconds_per_edit": None}]), "a row that edits nothing has no such rate"


class Slow(Spoken):
    """Every case takes two seconds by the clock of the runner."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def evaluate(self, case):
        self.clock[0] += 2.0
        return super().evaluate(case)


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("propmeta_edit.evaluation.runner.time.perf_counter", lambda: now[0])
    return now


def run_within(path, method, budget, datasets):
    rows = RowFile(path)
    run_methods([make_spec(method)], datasets, rows, limit=4, budget=budget, seed=0, versions={})
    return [(row.dataset, row.case_id) for row in rows.rows]


def test_a_budget_stops_a_method_having_gone_through_the_data_sets_by_turns(tmp_path, clock):
    datasets = [DataSet(name, "data", CASES) for name in ("one", "two")]
    method = Slow(clock)
    done = run_within(tmp_path / "rows.jsonl", method, 5.0, datasets)
    assert [dataset for dataset, _ in done] == ["one", "two", "one"], "6 s are more than 5, 4 s are not"
    assert run_within(tmp_path / "rows.jsonl", method, 5.0, datasets) == done, "what is on disk counts"
    more = run_within(tmp_path / "rows.jsonl", method, 9.0, datasets)
    assert more[:3] == done and [dataset for dataset, _ in more[3:]] == ["one", "two"]
    assert len(method.asked) == len(set(more)) == 5


def test_a_run_that_stops_early_has_seen_every_kind_of_case(tmp_path):
    """Cases with one and two edits by turns: batches come in the order of their first cases, not kind by kind."""
    edit = EditRequest("Ann lives in", "Peru")
    cases = [Case(f"k{n}", (edit,) * (1 + n % 2), Question("What?", ("sol",))) for n in range(30)]
    rows = RowFile(tmp_path / "rows.jsonl")
    spec = replace(make_spec(Spoken()), cases_at_once=2)
    run_methods([spec], [DataSet("d", "data", cases)], rows, limit=None, seed=0, versions={})
    kinds = [int(row.case_id[1:]) % 2 for row in rows.rows[10:]]
    assert kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True) and {0, 1} == set(kinds[:8])


def test_a_budget_leaves_no_data_set_without_a_case(tmp_path, clock):
    datasets = [DataSet(name, "data", CASES) for name in ("one", "two", "three")]
    assert len(run_within(tmp_path / "rows.jsonl", Slow(clock), 1.0, datasets)) == 3


def test_what_was_done_before_any_edit_is_in_the_rows_and_the_table(tmp_path):
    rows = RowFile(tmp_path / "rows.jsonl")
    spec = replace(make_spec(Spoken()), precomputation={"statistics": 61.2, "projections": 5.0})
    run_methods([spec], [DATA], rows, limit=4, seed=0, versions={})
    summary = summarise(RowFile(rows.path).rows)
    assert summary[0]["precomputation"] == {"statistics": 61.2, "projections": 5.0}
    assert "| statistics 61, projections 5 |" in make_markdown(summary)
    write_tables(summary, tmp_path)
    assert "precomputation.statistics" in (tmp_path / "table.csv").read_text()


def test_files_and_markdown(tmp_path):
    rows, _ = run(tmp_path / "rows.jsonl", Spoken())
    summary = summarise(rows.rows)
    markdown = write_tables(summary, tmp_path, ["a note"])
    assert (tmp_path / "table.md").read_text() == markdown == make_markdown(summary, ["a note"])
    cells = "5† | 60.0 [23.1, 88.2] | 40.0 | 100.0 | 40.0 [11.8, 76.9] | 60.0 [23.1, 88.2] | 60.0 | 25.0 | 0.0 | 2.50 | 1 |"
    assert f"| MetaFT | cre-id | {cells}" in markdown
    [entry] = summary
    assert entry["answers_too_long"] == 1 / 4 and entry["facts_too_long"] == 0, "ten tokens hold ten; c4 failed and was not counted"
    assert "†: fewer than 30 cases." in markdown and "- a note" in markdown
    assert json.loads((tmp_path / "table.json").read_text()) == summary
    assert (tmp_path / "table.csv").read_text().startswith("method,dataset,")
    assert not [p for p in tmp_path.iterdir() if p.suffix not in (".jsonl", ".md", ".json", ".csv")]


def test_wilson_against_the_formula():
    """(p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n) with z = 1.959964, for 7 of 20."""
    z, n, p = 1.959964, 20, 0.35
    centre, half = (p + z * z / (2 * n)) / (1 + z * z / n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5 / (1 + z * z / n)
    assert wilson_interval(7, 20) == pytest.approx((centre - half, centre + half), abs=1e-6)
    assert wilson_interval(0, 20)[0] == 0 and wilson_interval(20, 20)[1] == pytest.approx(1)


def test_a_failed_case_counts_as_wrong_in_every_share_of_further_questions(tmp_path):
    """Left out, failures would raise the shares; pairs and neighbours need what was said before, which nobody knows."""
    kinds = (SAME_FACT, PARAPHRASE, FACT, OTHER, REAL, TOGETHER, *WEIGHED)
    probes = tuple(Probe(kind, Question(f"{kind}?", ("sol",)), ("euro",)) for kind in kinds)
    rows = RowFile(tmp_path / "rows.jsonl")
    data = DataSet("cre-id", "data", [replace(CASES[4], probes=probes)])
    assert run_methods([make_spec(Spoken())], [data], rows, limit=None, seed=0, versions={}) == 1
    found = count(rows.rows, [*COUNTS, *told_apart_counts(2)])
    assert {name: found[name] for name in found if not name.endswith("_ci95")} == {
        **{"accuracy_all": 0.0, "accuracy_all_n": 2, "accuracy_paraphrase": 0.0, "accuracy_paraphrase_n": 1},
        **{"accuracy_fact_question": 0.0, "accuracy_fact_question_n": 1},
        **{"es": 0.0, "es_n": 1, "ps": 0.0, "ps_n": 1, "ns": 0.0, "ns_n": 1},
        **{"told_apart_2": 0.0, "told_apart_2_n": 1, "crossed_2": 0.0, "crossed_2_n": 1},
        **dict.fromkeys(("own", "leak", "net", "unchanged", "target_elsewhere", "locality_real")),
        **{f"{name}_n": 0 for name in ("own", "leak", "net", "unchanged", "target_elsewhere", "locality_real")},
    }
    assert RowFile(rows.path).rows == rows.rows
