"""Perplexity against closed forms and transformers' own loss; edits looked at and undone; the harness as it is called."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from propmeta_edit.data.corpora import read_held_out
from propmeta_edit.errors import ConfigError, ModelError, RequestError
from propmeta_edit.evaluation import ability as measures
from propmeta_edit.evaluation.ability import Perplexity, compare_perplexities, compute_perplexity, require_tasks, run_task
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.records import EditRequest
from propmeta_edit.studies import ability as study
from propmeta_edit.studies.ability import collect_rows, make_table, visit_edits

TEXTS = ["Ann Lee lives in Lima.", "The capital of France is Paris, where people speak French.", "Peru", "euro and sol"]
FACTS = [EditRequest("Ann Lee lives in", "Peru"), EditRequest("Bob Day lives in", "Greece"), EditRequest("Cy Fox pays in", "euro")]
SETTINGS = EditSettings(layers=[1], inner_lr=0.02, num_inner_steps=3)


def set_logits(model, bias):
    """Let the model give the same logits everywhere, whatever it reads."""
    head = torch.nn.Linear(model.config.hidden_size, len(bias), dtype=torch.float64)
    torch.nn.init.zeros_(head.weight)
    head.bias.data = torch.tensor(bias, dtype=torch.float64)
    model.set_output_embeddings(head)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(family, tokenizer):
    model = tiny.make_model(family)
    set_logits(model, [0.0] * 300)
    found = compute_perplexity(model, tokenizer, TEXTS)
    assert [found.value, found.low, found.high] == pytest.approx([300] * 3, rel=1e-12)
    assert found.lengths == [len(tokenizer(text)["input_ids"]) - 1 for text in TEXTS] and found.num_tokens == sum(found.lengths)


def test_known_logits_give_the_perplexity_one_computes_by_hand(tokenizer):
    """Each token's probability is softmax of its own logit; the mean is over all tokens, not over texts."""
    model, bias = tiny.make_model("llama"), np.linspace(-2, 3, 300)
    set_logits(model, bias.tolist())
    predicted = [token for text in TEXTS for token in tokenizer(text)["input_ids"][1:]]
    log_probabilities = bias - math.log(np.exp(bias).sum())
    found = compute_perplexity(model, tokenizer, TEXTS, batch_size=3)
    assert found.value == pytest.approx(math.exp(-np.mean(log_probabilities[predicted])), rel=1e-12)
    assert found.low < found.value < found.high


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_it_is_transformers_own_loss_text_by_text(family, tokenizer, batch_size):
    """So that neither the padding nor the neighbours in a batch have a part in it."""
    model = tiny.make_model(family)
    found = compute_perplexity(model, tokenizer, TEXTS, batch_size)
    for text, loss, length in zip(TEXTS, found.losses, found.lengths, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        assert loss / length == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-6)  # transformers' is in fp32
    assert found.value == pytest.approx(math.exp(sum(found.losses) / sum(found.lengths)), rel=1e-12)


def test_a_half_precision_model_is_scored_in_fp32(tokenizer):
    """Logits of 5.0 and 0 in bf16: their softmax in bf16 would be off in the third digit."""
    model = tiny.make_model("llama").to(torch.bfloat16)
    set_logits(model, [5.0] + [0.0] * 299)
    model.get_output_embeddings().to(torch.bfloat16)
    assert compute_perplexity(model, tokenizer, TEXTS).value == pytest.approx(math.exp(5) + 299, rel=1e-6)


def test_no_gradient_is_kept_and_no_weight_touched(tokenizer):
    model = tiny.make_model("llama")
    before = [parameter.clone() for parameter in model.parameters()]
    compute_perplexity(model, tokenizer, TEXTS)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_what_cannot_be_scored_is_named(tokenizer):
    model = tiny.make_model("llama")
    with pytest.raises(ConfigError, match="at least one text, got none"):
        compute_perplexity(model, tokenizer, [])
    with pytest.raises(RequestError, match="text 1: 'P' has one token"):
        compute_perplexity(model, tokenizer, ["Peru is", "P"])
    with pytest.raises(RequestError, match=r"text 0: the text .* but the model has 512 positions"):
        compute_perplexity(model, tokenizer, ["xy" * 600])
    model.get_parameter("model.norm.weight").data.fill_(math.nan)
    with pytest.raises(ModelError, match="not finite"):
        compute_perplexity(model, tokenizer, TEXTS)


def test_perplexities_are_compared_text_by_text():
    """Twice as uncertain about every token: exactly 2, without any width, however different the texts are."""
    before = Perplexity(1, 1, 1, [3.0, 50.0, 8.0], [2, 10, 4])
    after = replace(before, losses=[loss + n * math.log(2) for loss, n in zip(before.losses, before.lengths, strict=True)])
    assert compare_perplexities(after, before) == pytest.approx((2, 2, 2))
    with pytest.raises(ValueError, match="same texts and tokens"):
        compare_perplexities(after, replace(before, lengths=[2, 10, 5]))


def test_the_held_out_text_is_sixty_paragraphs_that_name_nobody_of_the_world():
    texts = read_held_out()
    assert len(texts) == len(set(texts)) == 60 and all(40 <= len(text.split()) <= 80 for text in texts)
    stems = ("train_data_id", "test_data_id", "test_data_ood")
    names = {record["subject"] for stem in stems for record in tiny.world_records(stem, 350)}
    assert len(names) > 1000 and not [name for name in names if any(name in text for text in texts)]


def test_edits_are_one_after_another_and_undone_to_the_bit(tokenizer):
    model = tiny.make_model("llama", dtype=torch.float32)
    edited = select_parameters(model, [1])
    before, seen = {name: p.detach().clone() for name, p in model.named_parameters()}, {}
    visit_edits(
        model,
        tokenizer,
        FACTS,
        SETTINGS,
        [0, 1, 3],
        lambda count: seen.update({count: {name: p.detach().clone() for name, p in model.named_parameters()}}),
    )
    assert list(seen) == [0, 1, 3]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and torch.equal(seen[0][name], before[name]), name
        assert (not torch.equal(seen[1][name], before[name])) == (name in edited), name
        assert (not torch.equal(seen[3][name], seen[1][name])) == (name in edited), name
    again = {}
    visit_edits(
        model, tokenizer, FACTS, SETTINGS, [3], lambda count: again.update({n: p.clone() for n, p in model.named_parameters()})
    )
    assert all(torch.equal(again[name], seen[3][name]) for name in again), "what is looked at on the way changes nothing"


@pytest.mark.parametrize("failing", ["look", "edit"])
def test_weights_come_back_after_an_error_too(tokenizer, failing):
    model = tiny.make_model("llama", dtype=torch.float32)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    facts = [FACTS[0], EditRequest("x" * 600, "Peru")] if failing == "edit" else FACTS

    def look(count):
        if failing == "look":
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, RequestError)):
        visit_edits(model, tokenizer, facts, SETTINGS, [2], look)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def entry(measure, result, **row):
    return {"model": "m", "kind": "", "method": "", "edits": 0, "measure": measure, "result": result, **row}


def test_the_table_has_a_row_for_each_state_and_a_column_for_each_task():
    before = {"value": 2.0, "low": 1.5, "high": 2.5, "losses": [1.0, 3.0], "lengths": [2, 4]}
    scores = {"acc,none": 0.25, "acc_stderr,none": 0.125, "f1,strict": 0.5, "n": 4}
    rows = collect_rows(
        [
            entry("perplexity", before),
            entry("quiz", {"quiz": scores}),
            entry("perplexity", {**before, "value": 4.0, "losses": [3.0, 7.0]}, method="FT", edits=10),
            entry("perplexity", {**before, "lengths": [2, 5]}, model="other|tokens"),
        ]
    )
    assert [row["edits"] for row in rows] == [0, 10, 0]
    assert rows[1]["ratio"] == pytest.approx(math.exp(6 / 6)) and rows[2]["ratio"] is None
    lines = make_table(rows).splitlines()
    assert lines[2] == "| m | – | 0 | 2.00 [1.50, 2.50] | 1.000 [1.000, 1.000] | 6 | acc 0.250 ± 0.125, f1 0.500 (strict) |"
    assert lines[3].startswith("| m | FT | 10 | 4.00 [1.50, 2.50] | 2.718 [") and lines[3].endswith("| 6 | – |")
    assert study._with_interval(2486585.55, (999.994, 1000.4), 2) == "2,486,586 [999.99, 1,000]"
    assert "| – | 7 | – |" in lines[4] and "one after another" in make_table(rows)


@pytest.fixture
def stub(monkeypatch):
    """A stand-in for lm-evaluation-harness that knows one task, and remembers what it is asked."""
    asked = []

    def simple_evaluate(**given):
        asked.append(given)
        if given["limit"] == 13:
            raise FileNotFoundError("no data file")
        scores = {"alias": "quiz", "acc,none": 0.5, "acc_stderr,none": "N/A"}
        return {"results": {"quiz": scores}, "n-samples": {"quiz": {"original": 9, "effective": 4}}}

    class TaskManager:
        def __init__(self, include_path=None):
            self.include_path, self.all_tasks = include_path, ["quiz"]

    modules = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface", "lm_eval.tasks")}
    modules["lm_eval"].simple_evaluate = simple_evaluate
    modules["lm_eval.tasks"].TaskManager = TaskManager
    modules["lm_eval.models.huggingface"].HFLM = lambda **given: SimpleNamespace(**given)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(measures, "version", lambda name: "0")
    return asked


def test_the_harness_gets_the_model_in_memory_and_the_folder(stub, tokenizer):
    model = tiny.make_model("llama")
    assert run_task(model, tokenizer, "quiz", "mine", limit=4, batch_size=2) == {"quiz": {"acc,none": 0.5, "n": 4}}
    [given] = stub
    assert given["model"].pretrained is model and given["model"].tokenizer is tokenizer and given["model"].batch_size == 2
    assert given["tasks"] == ["quiz"] and given["task_manager"].include_path == "mine" and given["limit"] == 4
    with pytest.raises(ConfigError, match="cannot run quiz: FileNotFoundError: no data file"):
        run_task(model, tokenizer, "quiz", limit=13)
    require_tasks(["quiz"])
    with pytest.raises(ConfigError, match=r"knows no task riddle; .*--task-folder"):
        require_tasks(["quiz", "riddle"])


def test_without_the_harness_one_is_told_how_to_install_it(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r'pip install "lm-eval\[hf\]"'):
        run_task(tiny.make_model("llama"), tokenizer, "quiz")


def test_a_task_of_ones_own_runs_in_the_harness_itself(tmp_path, tokenizer):
    """Where lm-eval is installed; local files alone, no hub. The model prefers the first choice, whatever is asked."""
    pytest.importorskip("lm_eval")
    model = tiny.make_model("llama", dtype=torch.float32)
    before = [parameter.clone() for parameter in model.parameters()]
    questions = [{"question": f"Is {n} even?", "choices": ["yes", "no"], "label": n % 2} for n in range(4)]
    file = tiny.write_records(tmp_path / "questions.jsonl", questions)
    task = {
        "task": "parity",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "parity.yaml").write_text(json.dumps(task))
    found = run_task(model, tokenizer, "parity", str(tmp_path), limit=3)
    assert set(found) == {"parity"} and found["parity"]["n"] == 3 and 0 <= found["parity"]["acc,none"] <= 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_task_folder_that_changes_is_another_one(tmp_path):
    (tmp_path / "a.yaml").write_text("task: a")
    first = study._hash_of_folder(str(tmp_path))
    assert first == study._hash_of_folder(str(tmp_path)) and study._hash_of_folder(None) is None
    (tmp_path / "a.yaml").write_text("task: b")
    assert study._hash_of_folder(str(tmp_path)) != first
