"""CounterFact files as they are distributed, and ROME's measures by probability, from the file to the table."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny
import torch

from propmeta_edit.data.counterfact import load_counterfact
from propmeta_edit.errors import DataError, RequestError
from propmeta_edit.evaluation import weighing
from propmeta_edit.evaluation.asking import Examiner, check_case, prompts_of
from propmeta_edit.evaluation.counts import COUNTS, count
from propmeta_edit.evaluation.measures import judge, judge_failed
from propmeta_edit.evaluation.methods import FineTuning, Guessing, InContext, Unedited, newest_object
from propmeta_edit.evaluation.rows import Row, RowFile
from propmeta_edit.evaluation.tables import make_markdown, summarise
from propmeta_edit.evaluation.weighing import texts_to_weigh, weigh
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.recipes.data_check import describe_file, find_format
from propmeta_edit.recipes.data_sets import load_dataset
from propmeta_edit.records import EDITED, NEIGHBOUR, PARAPHRASE, REAL, REWORDED, WEIGHED
from propmeta_edit.text.encoding import TextEncoder

record = tiny.counterfact_record
SETTINGS = EditSettings([1], inner_lr=1e-2, num_inner_steps=3)


def write(folder, records, name="multi_counterfact.json"):
    path = folder / name
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


@pytest.fixture
def cases(tmp_path):
    return load_counterfact(write(tmp_path, [record(0), record(1, neighbours=0)]))


@pytest.fixture
def model():
    return tiny.make_model("llama", dtype=torch.float32)


def test_a_record_is_a_case(cases):
    first, bare = cases
    [edit] = first.edits
    assert (edit.prompt, edit.target_new, edit.subject) == ("The home of Ann0 Lee is", "Lima", "Ann0 Lee")
    assert edit.rephrasings == (), "what is asked is not trained on"
    assert first.case_id == "counterfact-40" and first.tags == {"edits": "1", "relation": "P19"}
    assert first.question.text == first.question.cloze == "It was a day. Ann0 Lee lives in" and first.question.answers == ("Lima",)
    assert first.other_fact.text == "The home of Bob00 is" and first.other_fact.answers == ("Oslo",)
    kinds = [probe.kind for probe in first.probes]
    assert kinds == [PARAPHRASE, REAL, REAL, EDITED, REWORDED, REWORDED, NEIGHBOUR, NEIGHBOUR, NEIGHBOUR]
    weighed = [probe for probe in first.probes if probe.kind in WEIGHED]
    assert all((probe.question.answers, probe.against) == (("Lima",), ("Oslo",)) for probe in weighed)
    assert weighed[0].question.text == edit.prompt and weighed[-1].question.text == "The home of Bob02 is"
    assert first.probes[1].question.answers == ("Oslo",)
    assert bare.other_fact is None and [probe.kind for probe in bare.probes] == [PARAPHRASE, EDITED, REWORDED, REWORDED]


def test_the_format_is_found_and_a_set_of_that_name_is_read(tmp_path, monkeypatch):
    path = write(tmp_path, [record(n, f"City{n}") for n in range(3)])
    assert find_format(path) == "CounterFact"
    assert describe_file(path).startswith("multi_counterfact.json: CounterFact, 3 cases\nby edits       1: 3\nrelations     1\n")
    monkeypatch.setenv("PROPMETA_DATA", str(tmp_path))
    named, probed = load_dataset("counterfact", 0), load_dataset(str(path), 0, probed=True)
    assert named.name == "counterfact" and probed.name == "multi_counterfact"
    assert {probe.kind for probe in named.cases[0].probes} == set(WEIGHED), "they cost one pass, and are always asked"
    assert {"other", "elsewhere", PARAPHRASE, *WEIGHED} <= {probe.kind for probe in probed.cases[0].probes}


REWRITE = record(0)["requested_rewrite"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"requested_rewrite": {**REWRITE, "prompt": "The home is"}}, r"'requested_rewrite\.prompt' must hold exactly one \{\}"),
        ({"requested_rewrite": {**REWRITE, "target_new": "Lima"}}, r"'requested_rewrite\.target_new' must be a JSON object"),
        ({"requested_rewrite": {**REWRITE, "target_new": {"str": None}}}, r"'requested_rewrite\.target_new\.str' must be a string"),
        ({"requested_rewrite": {**REWRITE, "target_true": {}}}, r"missing key 'str' in 'requested_rewrite\.target_true'"),
        ({"requested_rewrite": {**REWRITE, "subject": ["Ann"]}}, r"'requested_rewrite\.subject' must be a string, got \[\"Ann\"\]"),
        ({"requested_rewrite": [REWRITE]}, "'requested_rewrite' must be a JSON object"),
        ({"paraphrase_prompts": "Ann lives in"}, "'paraphrase_prompts' must be a list, got \"Ann lives in\""),
        ({"paraphrase_prompts": []}, "'paraphrase_prompts' must not be an empty list"),
        ({"neighborhood_prompts": [5]}, r"'neighborhood_prompts\[0\]' must be a string, got 5"),
        ({"neighborhood_prompts": ["\ud800"]}, r"'neighborhood_prompts\[0\]' holds \\ud800, half of a character"),
        ({"case_id": {}}, r"'case_id' must be a string or a whole number, got \{\}"),
    ],
)
def test_a_broken_record_names_its_field(tmp_path, changes, message):
    with pytest.raises(DataError, match=rf"multi_counterfact\.json: record 1( \(case_id 40\))?: {message}"):
        load_counterfact(write(tmp_path, [record(1), {**record(0), **changes}]))


def weigh_alone(model, tokenizer, prompt, answer):
    """Mean nats a token of an object, as ROME's code has it, one text at a time and by the whole model."""
    context, whole = tokenizer(prompt)["input_ids"], tokenizer(f"{prompt} {answer}")["input_ids"]
    with torch.no_grad():
        scores = torch.log_softmax(model(torch.tensor([whole])).logits[0], dim=-1)
    return -sum(float(scores[place - 1, whole[place]]) for place in range(len(context), len(whole))) / (len(whole) - len(context))


def test_objects_are_weighed_by_the_mean_over_their_tokens_in_one_pass(cases, model, tokenizer, monkeypatch):
    passes = []
    real = weighing.compute_token_losses
    monkeypatch.setattr(
        weighing, "compute_token_losses", lambda model, batch: passes.append(len(batch.labels)) or real(model, batch)
    )
    for in_context in (False, True):
        passes.clear()
        found = weigh(model, tokenizer, cases, in_context)
        assert passes == [2 * len(texts_to_weigh(cases[0]))], "both cases, filled up, in one pass"
        for case, pairs in zip(cases, found, strict=True):
            texts = texts_to_weigh(case, in_context)
            assert len(pairs) == len(texts) / 2
            flat = [value for pair in pairs for value in pair]
            alone = [weigh_alone(model, tokenizer, *text) for text in texts]
            assert flat == pytest.approx(alone, abs=2e-5), "rounding of fp32 alone"
    assert texts_to_weigh(cases[0], True)[0][0].startswith("The home of Ann0 Lee is Lima.\n")


def test_cases_without_such_prompts_cost_nothing(cases, model, tokenizer, monkeypatch):
    monkeypatch.setattr(weighing, "compute_token_losses", lambda *_: pytest.fail("nothing is to be weighed"))
    plain = [replace(case, probes=()) for case in cases]
    assert weigh(model, tokenizer, plain) == [[], []]
    assert Unedited(Examiner(model, tokenizer)).evaluate_many(plain)[0].probes == ()


def test_a_text_that_does_not_fit_is_refused_before_anything_runs(tmp_path, model, tokenizer):
    [case] = load_counterfact(write(tmp_path, [{**record(0), "neighborhood_prompts": ["x" * tiny.POSITIONS]}]))
    spoken = replace(case, other_fact=None, probes=tuple(probe for probe in case.probes if probe.kind in WEIGHED))
    with pytest.raises(RequestError, match=r"^case counterfact-40: the text 'xxx"):
        check_case(TextEncoder(tokenizer, model.config), spoken, 10)


def make_row(case, said, method="FT"):
    fixed = {"model": "m", "model_sha256": "a", "base_sha256": "a", "data_sha256": "b", "hparams_sha256": "c", "seed": 0}
    results = judge(case, said) if said is not None else judge_failed(case)
    return Row(method=method, dataset="counterfact", case_id=case.case_id, tags=case.tags, **fixed, **results)


def test_an_edit_moves_the_objects_and_rows_keep_it(cases, model, tokenizer, tmp_path):
    examiner = Examiner(model, tokenizer)
    assert all("The home of Bob02 is" not in prompt for prompt in prompts_of(cases[0]).values()), "nothing is generated after it"
    [before, _] = Unedited(examiner).evaluate_many(cases)
    tuning = FineTuning(examiner, SETTINGS)
    together, [alone], [told, _] = (
        tuning.evaluate_many(cases),
        tuning.evaluate_many(cases[:1]),
        InContext(examiner).evaluate_many(cases),
    )
    nats = {name: [p["nats"] for p in said.probes if p["kind"] in WEIGHED] for name, said in
            (("before", before), ("edited", together[0]), ("alone", alone), ("told", told))}  # fmt: skip
    assert nats["edited"] == [pytest.approx(pair, abs=1e-3) for pair in nats["alone"]], "each case has its own edit"
    (new, true), (edited_new, _) = nats["before"][0], nats["edited"][0]
    assert edited_new < new and nats["told"][0] != [new, true]
    rows = RowFile(tmp_path / "rows.jsonl")
    for case, said in zip(cases, together, strict=True):
        rows.append(make_row(case, said))
    [read, bare] = RowFile(tmp_path / "rows.jsonl").rows
    assert read.probes == rows.rows[0].probes and read.probes[3]["after"] is None
    found = count([read, bare], COUNTS)
    assert (found["es_n"], found["ps_n"], found["ns_n"]) == (2, 4, 3)


def probe(kind, nats):
    return {"kind": kind, "question": "", "answers": ["Lima"], "against": ["Oslo"], "before": None, "after": None, "nats": nats}


def test_es_and_ps_ask_for_the_new_object_and_ns_for_the_one_before(cases):
    fixed = {"model": "m", "model_sha256": "a", "base_sha256": "a", "data_sha256": "b", "hparams_sha256": "c", "seed": 0}
    probes = [probe(EDITED, [1.0, 2.0]), probe(REWORDED, [3.0, 2.0]), probe(REWORDED, [1.0, 1.5]), probe(REWORDED, [1.0, 1.0])]
    probes += [
        probe(NEIGHBOUR, [2.0, 1.0]),
        probe(NEIGHBOUR, [1.0, 2.0]),
        probe(NEIGHBOUR, [4.0, 0.5]),
        probe(NEIGHBOUR, [2.0, 2.0]),
    ]
    row = Row(method="FT", dataset="counterfact", case_id="a", tags={"relation": "P19"}, probes=tuple(probes), **fixed)
    failed = make_row(cases[0], None)
    assert failed.probes[3]["nats"] is None
    found = count([row], COUNTS)
    assert (found["es"], found["ps"], found["ns"]) == (1.0, pytest.approx(1 / 3), 0.5), "even is neither"
    assert found["accuracy_all"] is None, "nothing further was asked in words"
    both = count([row, failed], COUNTS)
    assert (both["es"], both["ns_n"]) == (0.5, 7), "what failed is wrong, not missing"
    other = replace(row, dataset="cre", probes=())
    with_it, without = summarise([row, replace(failed, tags={"relation": "P36"}), other])
    assert with_it["es_n"] == 2 and with_it["ps_ci95"] is not None
    assert all(
        without[name] is None and without[f"{name}_n"] == 0 and without[f"{name}_ci95"] is None for name in ("es", "ps", "ns")
    )
    assert "ES %" in make_markdown([with_it, without]) and "ES %" not in make_markdown([without])


def test_without_a_model_nothing_has_a_probability(cases):
    [said, _] = Guessing(newest_object).evaluate_many(cases)
    assert not [p for p in said.probes if p["kind"] in WEIGHED]
    assert count([make_row(cases[0], said)], COUNTS)["es"] is None
