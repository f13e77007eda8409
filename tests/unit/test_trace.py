"""The picture of an edit on its way through a question: its last row is what the model says."""

from __future__ import annotations

import pytest
import tiny
import torch

from propmeta_edit import EditRequest, MetaFTHyperParams, Question, compute_edit
from propmeta_edit.analysis.probes import content_token, make_question_probe
from propmeta_edit.cli import main
from propmeta_edit.errors import RequestError
from propmeta_edit.records import Case
from propmeta_edit.studies.trace import draw_trace, take_trace

FACT = EditRequest("Ann Lee lives in", "Peru", "Ann Lee")
ASKED = Question("Which currency is used where Ann Lee lives in?", ("sol",))


@pytest.fixture
def folder(tmp_path):
    return tiny.save_model_folder(tmp_path / "base", tiny.make_tokenizer())


@pytest.fixture
def hparams(folder):
    return MetaFTHyperParams(model_name=str(folder), device="cpu", layers=[1], lr=0.02, num_steps=5)


def test_the_last_row_is_what_the_model_says(hparams):
    model, tokenizer = hparams.load_model()
    case = Case("1", (FACT,), ASKED)
    trace = take_trace(model, tokenizer, case, hparams)
    probe = make_question_probe(tokenizer, case)
    depth = model.config.num_hidden_layers + 1
    assert trace.names == ("Peru", "sol") and trace.layers == [1]
    assert trace.ranks.shape == (2, 2, depth, len(trace.tokens))
    assert "".join(trace.tokens).strip().startswith("Ann Lee lives in"), "from the subject on"
    edit = compute_edit(model, tokenizer, FACT, hparams)
    for number, stands in enumerate((False, True)):
        with edit.applied(model) if stands else torch.no_grad():
            logits = model(torch.tensor([probe.input_ids])).logits[0, -1].detach()
        for row, name in enumerate(trace.names):
            token = content_token(tokenizer, name)
            assert trace.ranks[row, number, -1, -1] == (logits > logits[token]).sum()
    below = trace.ranks[:, :, :2]
    assert torch.equal(below[:, 0], below[:, 1]), "below the edited block nothing changes"
    assert not torch.equal(trace.ranks[:, 0], trace.ranks[:, 1])
    figure = draw_trace(trace)
    assert [axis.get_title() for axis in figure.axes[:2]] == ["1. “Peru”, before the edit", "2. “Peru”, after it"]


def test_the_command_draws_and_says_what_is_missing(folder, tmp_path, monkeypatch, capsys):
    arguments = ["trace", FACT.prompt, FACT.target_new, "--subject", "Ann Lee", "--question", ASKED.text, "--answer", "sol"]
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--model", str(folder), "--device", "cpu"]) == 2
    assert "no layer and rate are known" in capsys.readouterr().err
    assert main([*arguments[:-2], "--device", "cpu"]) == 2
    assert "give the fact, its object, --subject, --question and --answer" in capsys.readouterr().err
    assert main(["trace", "--output", "x.txt"]) == 2
    assert "--output must end in .png, .svg or .pdf, got 'x.txt'" in capsys.readouterr().err


def test_a_question_without_the_facts_prompt_is_refused(hparams):
    model, tokenizer = hparams.load_model()
    with pytest.raises(RequestError, match="must hold the edit's prompt 'Ann Lee lives in'"):
        take_trace(model, tokenizer, Case("1", (FACT,), Question("Where?", ("sol",))), hparams)
