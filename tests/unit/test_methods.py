"""Editing one by one, with the first edit made twice if it is short, and side by side."""

from __future__ import annotations

import pytest
import tiny
import torch

from propmeta_edit import MetaFTHyperParams, apply_metaft_to_model
from propmeta_edit.easyedit.algorithms import EditWith
from propmeta_edit.errors import ModelError
from propmeta_edit.evaluation.asking import Examiner
from propmeta_edit.evaluation.methods import LONG_EDIT, Editing, FineTuning
from propmeta_edit.finetune.many_edits import many_edits
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.records import Case, EditRequest, Question

CASES = [Case(f"c{i}", (EditRequest(f"Ann {i} lives in", "Peru"),), Question("Where?", ("Lima",))) for i in range(3)]


@pytest.mark.parametrize(("seconds", "calls"), [(LONG_EDIT / 2, 4), (LONG_EDIT * 2, 3)])
def test_a_short_first_edit_is_made_twice(tokenizer, monkeypatch, seconds, calls):
    model = tiny.make_model("llama", dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    written = []

    def apply(model, tokenizer, requests, *arguments, **options):
        written.append(requests[0]["prompt"])
        return apply_metaft_to_model(model, tokenizer, requests, *arguments, **options)

    clock = iter(n * seconds for n in range(100))
    hparams = MetaFTHyperParams("tiny", device="cpu", layers=[1], lr=1e-2, num_steps=1)
    editing = Editing(Examiner(model, tokenizer), EditWith(model, tokenizer, apply, hparams))
    monkeypatch.setattr(editing, "_clock", lambda: next(clock))
    outcomes = [outcome for case in CASES for outcome in editing.evaluate_many([case])]
    assert [outcome.seconds_per_edit for outcome in outcomes] == [seconds] * 3
    assert len(written) == calls and written[-3:] == [case.edits[0].prompt for case in CASES]
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_cases_of_more_and_of_fewer_requests_are_edited_in_groups(tokenizer):
    """As where the data has other wordings of some facts; the answers are those of one case at a time."""
    model = tiny.make_model("llama", dtype=torch.float32)
    hparams = MetaFTHyperParams("tiny", device="cpu", layers=[1], lr=1e-2, num_steps=2)

    def write(edit):
        return [edit] * (2 if edit.prompt.startswith("Ann 1") else 1)

    tuning = FineTuning(Examiner(model, tokenizer), hparams.edit, write)
    together = tuning.evaluate_many(CASES)
    for case, outcome in zip(CASES, together, strict=True):
        [alone] = tuning.evaluate_many([case])
        assert (outcome.generated, outcome.fact_generated) == (alone.generated, alone.fact_generated)


def test_as_many_cases_side_by_side_as_the_memory_allows(tokenizer, monkeypatch):
    """A CPU that runs out of memory takes everybody's programs down, so nothing is tried first."""
    model = tiny.make_model("llama", dtype=torch.float32)
    hparams = MetaFTHyperParams("tiny", device="cpu", layers=[1], lr=1e-2, num_steps=2)
    tuning = FineTuning(Examiner(model, tokenizer), hparams.edit)
    expected = tuning.evaluate_many(CASES)
    sizes = []

    def note(model, tokenizer, requests, settings):
        sizes.append(len(requests))
        return many_edits(model, tokenizer, requests, settings)

    monkeypatch.setattr("propmeta_edit.evaluation.methods.many_edits", note)
    size = 5 * sum(p.nbytes for p in select_parameters(model, [1]).values())
    for free, at_once in ((2 * 3 * size, [3]), (2 * 2 * size, [2]), (0, [])):
        sizes.clear()
        monkeypatch.setattr("propmeta_edit.evaluation.methods.free_memory", lambda device, free=free: free)
        found = tuning.evaluate_many(CASES)
        assert sizes == at_once, "a case that is left by itself is edited as EasyEdit calls it"
        assert [outcome.generated for outcome in found] == [outcome.generated for outcome in expected]


def test_an_edit_that_diverges_is_a_failure_however_many_are_made_together(tokenizer):
    """Alone it is refused; beside others it would be asked, and answer with whatever token stands first."""
    model = tiny.make_model("llama", dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    hparams = MetaFTHyperParams("tiny", device="cpu", layers=[1], lr=1e300, num_steps=3)
    for number in (1, len(CASES)):
        with pytest.raises(ModelError, match="the edit diverged"):
            FineTuning(Examiner(model, tokenizer), hparams.edit).evaluate_many(CASES[:number])
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
