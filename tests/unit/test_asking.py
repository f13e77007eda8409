"""Every prompt of a case in one call, what the unedited model says once, and texts that a model cannot hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from propmeta_edit.errors import RequestError
from propmeta_edit.evaluation import asking
from propmeta_edit.evaluation.asking import AT_ONCE, Examiner, check_case, prompts_of
from propmeta_edit.evaluation.methods import FineTuning, InContext, Unedited
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.models.generation import generate_greedily
from propmeta_edit.records import Case, EditRequest, Question
from propmeta_edit.text.encoding import TextEncoder

SETTINGS = EditSettings([1], inner_lr=1e-2, num_inner_steps=3)
CASES = [
    Case(
        f"c{i}",
        (EditRequest(f"Ann {i} lives in", "Peru"),),
        Question(f"What is the capital of the country Ann {i} lives in?", ("Lima",), cloze=f"Ann {i}'s capital is" if i else None),
        neighbour=Question(f"Where does Bob {i} live?", ("Greece",)),
    )
    for i in range(3)
]


@pytest.fixture
def model():
    return tiny.make_model("llama", dtype=torch.float32)


@pytest.fixture
def calls(monkeypatch):
    """How many prompts each call to the model had, edited and unedited."""
    found = []

    def note(name):
        real = getattr(asking, name)

        def call(model, tokenizer, prompts, *arguments, **options):
            found.append((name, len(prompts)))
            return real(model, tokenizer, prompts, *arguments, **options)

        monkeypatch.setattr(asking, name, call)

    note("continue_greedily")
    note("generate_greedily")
    return found


def test_a_case_is_one_call_and_what_comes_before_edits_is_asked_once_for_all(model, tokenizer, calls):
    examiner = Examiner(model, tokenizer)
    tuning, in_context = FineTuning(examiner, SETTINGS), InContext(examiner)
    tuning.expect(CASES)
    for case in CASES:
        tuning.evaluate_many([case])
    per_case = [len(prompts_of(case)) for case in CASES]
    assert calls == [("generate_greedily", 3), *(("continue_greedily", number) for number in per_case)]
    calls.clear()
    in_context.expect(CASES)
    tuning.evaluate_many(CASES)
    in_context.evaluate_many(CASES)
    assert calls == [("continue_greedily", 3 * max(per_case))] * 2, "another method of the same model asks nothing twice"
    calls.clear()
    Unedited(examiner).evaluate_many(CASES)
    assert [name for name, _ in calls] == ["continue_greedily"]


def test_no_more_is_asked_ahead_than_goes_together(model, tokenizer, calls):
    many = [replace(CASES[0], case_id=str(n), neighbour=Question(f"Where is {n}?", ("?",))) for n in range(AT_ONCE + 3)]
    examiner = Examiner(model, tokenizer)
    examiner.expect(many)
    examiner.ask_unedited(many[:1])
    examiner.ask_unedited(many[1:AT_ONCE])
    assert calls == [("generate_greedily", AT_ONCE)]
    examiner.ask_unedited(many[-1:])
    assert calls[1:] == [("generate_greedily", 3)]


def test_what_is_said_is_what_the_model_says_to_each_prompt(model, tokenizer):
    examiner = Examiner(model, tokenizer)
    for in_context in (False, True):
        examiner.ask_unedited(CASES)
        outcomes = examiner.ask(CASES, in_context=in_context)
        for case, said in zip(CASES, outcomes, strict=True):
            alone = {name: generate_greedily(model, tokenizer, [p])[0] for name, p in prompts_of(case, in_context).items()}
            assert said.generated == alone["question"] and said.fact_generated == (alone["fact 0"],)
            assert said.cloze_generated == alone.get("cloze") and said.neighbour_generated == alone["neighbour"]
            assert said.whole.startswith(said.generated) and said.facts_whole[0].startswith(said.fact_generated[0])
            plain = generate_greedily(model, tokenizer, [prompts_of(case)["neighbour"]])
            assert said.neighbour_before == plain[0], "without the facts"
    [said] = examiner.ask(CASES[:1], is_edited=False)
    assert said.neighbour_generated is None and said.neighbour_before is None, "nothing to compare"


def test_what_a_case_asks_twice_is_asked_once(model, tokenizer, calls):
    question = Question("Where does Bob 1 live?", ("Greece",))
    twice = replace(CASES[1], neighbour=question, other_fact=question)
    examiner = Examiner(model, tokenizer)
    examiner.ask_unedited([twice])
    calls.clear()
    [said] = examiner.ask([twice])
    assert calls == [("continue_greedily", len(prompts_of(twice)) - 1)]
    assert said.other_fact_generated == said.neighbour_generated == said.neighbour_before


def test_a_fact_is_asked_as_it_is_trained_on_without_the_space_after_it():
    edit = EditRequest("Ann lives in ", "Peru")
    assert prompts_of(replace(CASES[0], edits=(edit,)))["fact 0"] == "Ann lives in"


def test_the_number_of_tokens_is_the_protocols(model, tokenizer):
    case = replace(CASES[0], question=Question("Where?", ("Hangzhou, China", "Lima")))
    few, many = (Examiner(model, tokenizer, number).ask([case], is_edited=False)[0] for number in (3, 12))
    assert len(few.generated) < len(many.generated) and many.generated.startswith(few.generated)
    encoder = TextEncoder(tokenizer)
    assert few.answer_tokens == encoder.count_answer_tokens("Lima") < encoder.count_answer_tokens("Hangzhou, China")
    assert few.fact_tokens == encoder.count_answer_tokens("Peru") and few.max_new_tokens == 3


def test_a_case_that_does_not_fit_is_refused_by_its_name(model, tokenizer):
    encoder = TextEncoder(tokenizer, model.config)
    check_case(encoder, CASES[1], 10)
    long = replace(CASES[1], neighbour=Question("x" * (tiny.POSITIONS - 15), ("y",)))
    with pytest.raises(RequestError, match=r"^case c1: the prompt 'Question: xxx.* 10 more are asked for, .* 512 positions"):
        check_case(encoder, long, 10)
    facts = replace(CASES[1], edits=(EditRequest("y" * 490, "Peru"),))
    check_case(encoder, facts, 10)
    with pytest.raises(RequestError, match=r"^case c1: "):
        check_case(encoder, facts, 10, in_context=True)
    target = replace(CASES[1], edits=(EditRequest("Ann lives in", "y" * 600),))
    with pytest.raises(RequestError, match=r"^case c1: the text 'Ann lives in yyy"):
        check_case(encoder, target, 10)


def test_a_case_that_cannot_be_asked_does_not_fail_those_before_it(model, tokenizer):
    """Its prompts would be asked ahead, with theirs."""
    wrong = replace(CASES[1], neighbour=Question("x" * tiny.POSITIONS, ("?",)))
    examiner = Examiner(model, tokenizer)
    examiner.expect([CASES[0], wrong])
    examiner.ask_unedited(CASES[:1])
    assert examiner.ask(CASES[:1])[0].neighbour_before is not None
    with pytest.raises(RequestError, match=r"^case c1: the text .* positions"):
        examiner.ask_unedited([wrong])
