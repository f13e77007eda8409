"""What meta-training says of itself on validation cases: accuracy, leak and net, as the tables count them."""

from __future__ import annotations

import pytest
import tiny

from propmeta_edit.evaluation.counts import COUNTS, count
from propmeta_edit.evaluation.measures import as_record
from propmeta_edit.evaluation.rows import Row
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.recipes import meta_training
from propmeta_edit.records import OTHER, REAL, Case, EditRequest, Probe, Question
from propmeta_edit.text.prompts import format_question

SETTINGS = EditSettings(layers=[1], num_inner_steps=1)


def make_case(number, others):
    subject = f"Ann {number}"
    probes = [Probe(REAL, Question("What is paid in Oslo?", ("krone",)))]
    probes += [Probe(OTHER, Question(f"What does Bob {number}{n} pay with?", ("lev",)), ("sol",)) for n in range(others)]
    edit = EditRequest(f"{subject} lives in", "Peru", subject)
    return Case(str(number), (edit,), Question(f"What does {subject} pay with?", ("sol",)), probes=tuple(probes))


CASES = [make_case(number, others) for number, others in enumerate((2, 1, 0, 2, 2))]
SAID = {  # of each question, before and after: whether the edited consequence comes
    "Ann 0": (False, True), "Bob 00": (False, True), "Bob 01": (False, False),
    "Ann 1": (False, True), "Bob 10": (True, True),  # no pair: the other had it before
    "Ann 2": (False, True),
    "Ann 3": (True, True), "Bob 30": (False, True), "Bob 31": (False, False),  # no pair: it had it before
    "Ann 4": (False, False), "Bob 40": (False, True), "Bob 41": (False, False),
}  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    state = {"edited": 0, "prompts": []}

    class Edited:
        def __enter__(self):
            state["edited"] = 1

        def __exit__(self, *error):
            state["edited"] = 0

    def say(model, tokenizer, prompts, batch_size, together):
        state["prompts"] += prompts
        [names] = [[next(name for name in SAID if f"does {name} pay" in prompt) for prompt in prompts]]
        return [" the sol." if SAID[name][state["edited"]] else " the yen." for name in names]

    monkeypatch.setattr(meta_training, "many_edits", lambda *args: Edited())
    monkeypatch.setattr(meta_training, "generate_greedily", say)
    return state


@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_leak_and_net_are_those_of_the_tables(asked, monkeypatch, at_once):
    monkeypatch.setattr(meta_training, "EDITS_AT_ONCE", at_once)
    found = meta_training.compute_validation(tiny.make_model("llama"), None, SETTINGS, {"valid-id": CASES})
    rows = [as_row(case) for case in CASES]
    expected = count(rows, [one for one in COUNTS if one.column in ("leak", "net")])
    assert found == pytest.approx({"valid-id": 4 / 5, "valid-id leak": expected["leak"], "valid-id net": expected["net"]})
    assert (expected["leak"], expected["net"], expected["net_n"]) == (0.5, 0.0, 4)


@pytest.mark.parametrize("count_of", [2, 3, 5])
def test_processes_share_the_cases(asked, count_of):
    """Each asks its own, and every one of them has the same numbers, those of one process alone."""
    model = tiny.make_model("llama")
    expected = meta_training.compute_validation(model, None, SETTINGS, {"valid-id": CASES})
    said = []  # by each process, in every call of join
    for rank in range(count_of):
        said.append([])
        meta_training.compute_validation(model, None, SETTINGS, {"valid-id": CASES}, Stub(rank, count_of, said[-1].append))
    assert [len(own[0]) for own in said] == [len(CASES[rank::count_of]) for rank in range(count_of)]
    joined = iter([[item for own in said for item in own[call]] for call in range(2)])
    found = meta_training.compute_validation(
        model, None, SETTINGS, {"valid-id": CASES}, Stub(0, count_of, lambda own: next(joined))
    )
    assert found == expected


class Stub:
    """What is used of ``Processes``."""

    def __init__(self, rank, count, join):
        self.rank, self.count = rank, count
        self.join = lambda own: join(own) or own


def as_row(case):
    probes = [
        as_record(probe, *(" the sol." if has else " the yen." for has in SAID[probe.question.text.removeprefix("What does ")[:6]]))
        for probe in case.probes
        if probe.kind == OTHER
    ]
    before, after = SAID[case.edits[0].subject]
    return Row(
        **{name: "x" for name in ("method", "dataset", "model", "model_sha256", "data_sha256", "hparams_sha256", "base_sha256")},
        **{"case_id": case.case_id, "seed": 0, "answers": case.question.answers, "probes": tuple(probes), "correct": after},
        before=" the sol." if before else " the yen.",
    )


def test_cases_without_other_subjects_are_asked_their_own_question_alone(asked):
    alone = [CASES[2]]
    found = meta_training.compute_validation(tiny.make_model("llama"), None, SETTINGS, {"valid-ood": alone})
    assert found == {"valid-ood": 1.0}
    assert asked["prompts"] == [format_question(alone[0].question.text)]
