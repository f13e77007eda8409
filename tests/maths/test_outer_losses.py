"""Every term of the outer loss by its definition, on whole-model logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from torch.nn import functional as F

from propmeta_edit.errors import ConfigError, ModelError
from propmeta_edit.finetune.losses import compute_answer_loss
from propmeta_edit.metatrain.config import OUTER_TERMS, MetaTrainConfig
from propmeta_edit.metatrain.outer_losses import TERMS, make_outer_loss
from propmeta_edit.metatrain.task_texts import encode_step
from propmeta_edit.metatrain.tasks import join_tasks, order_tasks
from propmeta_edit.metatrain.trainer import compute_step_gradients, meta_train
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.records import EditRequest, MetaTask, Question
from propmeta_edit.text.encoding import TextEncoder, encode_questions, encode_requests

PERU = MetaTask(
    "peru",
    EditRequest("Ann Lee lives in", "Peru"),
    Question("What does Ann Lee pay with?", ("sol",)),
    (Question("What is the capital of the country that Ann Lee lives in?", ("Lima in Peru",)),),
    Question("Where was Bob Day born?", ("Oslo",)),
    Question("What is the currency of Peru?", ("sol",)),
    bystander=Question("What does Eve Fox pay with?", ("lev",)),
)
GREECE = MetaTask(
    "greece",
    EditRequest("Smith Innovation PLC was founded in", "Greece"),
    Question("What is the currency of the country that Smith Innovation PLC was founded in?", ("euro",)),
    unrelated=Question("What does Ann Lee pay with?", ("sol",)),
    known=Question("What is the currency of Greece?", ("euro",)),
    bystander=Question("What is the currency of the country that Mill Ltd. was founded in?", ("krone",)),
)
TASKS = [PERU, GREECE]


@pytest.fixture
def model():
    return tiny.make_model("llama")


def moved(model):
    """The same model elsewhere, as an inner loop leaves it."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in select_parameters(model, [1]).values():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def config(**values):
    return MetaTrainConfig(model="tiny", layers=[1], **values)


def made(model, tokenizer, tasks, config):
    """The outer loss of tasks that are computed side by side."""
    [encoded] = encode_step(TextEncoder(tokenizer), tasks, config)
    return make_outer_loss(model, encoded, config)


def divergence_by_hand(before, after, tokenizer, given, asked, answer):
    """KL(before after ``given`` ‖ after after ``asked``), token by token of the answer, the mean."""
    tokens = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
    total = 0.0
    for position in range(len(tokens)):
        log_p, log_q = (
            F.log_softmax(m(torch.tensor([tokenizer(text)["input_ids"] + tokens[:position]])).logits[0, -1], dim=-1)
            for m, text in ((before, given), (after, asked))
        )
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / len(tokens)


def test_the_default_is_the_papers_loss(model, tokenizer):
    outer_loss = made(model, tokenizer, TASKS, config())
    related = encode_questions(TextEncoder(tokenizer), [task.related for task in TASKS])
    after = moved(model)
    torch.testing.assert_close(outer_loss(after), compute_answer_loss(after, related, num_edits=2), rtol=0, atol=0)


def test_several_questions_are_averaged_and_fewer_are_asked_again(model, tokenizer):
    outer_loss = made(model, tokenizer, TASKS, config(questions_per_task=2))
    [pay, capital, euro] = (
        compute_answer_loss(model, encode_questions(TextEncoder(tokenizer), [q]))[0]
        for q in (PERU.related, *PERU.more_related, GREECE.related)
    )
    torch.testing.assert_close(outer_loss(model), torch.stack([(pay + capital) / 2, euro]), rtol=1e-6, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize(("term", "question"), [("locality", "unrelated"), ("bystander", "bystander")])
def test_locality_is_the_divergence_from_theta_on_another_subject(model, tokenizer, term, question):
    outer_loss = made(model, tokenizer, TASKS, config(outer_terms={term: 1.0}))
    torch.testing.assert_close(outer_loss(model), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    before, after = tiny.make_model("llama"), moved(model)
    asked = [getattr(task, question) for task in TASKS]
    prompts = [f"Question: {one.text}\nAnswer: The answer is" for one in asked]
    expected = [
        divergence_by_hand(before, after, tokenizer, prompt, prompt, one.answers[0])
        for prompt, one in zip(prompts, asked, strict=True)
    ]
    assert outer_loss(after).tolist() == pytest.approx(expected, rel=1e-5)
    assert min(expected) > 0.01


@torch.no_grad()
def test_in_context_term_compares_with_theta_given_the_fact(model, tokenizer):
    outer_loss = made(model, tokenizer, TASKS, config(outer_terms={"in-context": 1.0}))
    before, after = tiny.make_model("llama"), moved(model)
    expected = []
    for task in TASKS:
        prompt = f"Question: {task.related.text}\nAnswer: The answer is"
        fact = f"{task.target.prompt} {task.target.target_new}.\n"
        expected.append(divergence_by_hand(before, after, tokenizer, fact + prompt, prompt, task.related.answers[0]))
    assert outer_loss(after).tolist() == pytest.approx(expected, rel=1e-5)


def test_known_term_is_the_loss_of_the_true_answers(model, tokenizer):
    known = encode_questions(TextEncoder(tokenizer), [task.known for task in TASKS])
    terms = config(outer_terms={"known": 1.0})
    torch.testing.assert_close(made(model, tokenizer, TASKS, terms)(model), compute_answer_loss(model, known, num_edits=2))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_tasks_of_several_facts_are_learnt_in_one_loop_and_asked_about_each(tokenizer, batch_size):
    """By hand: all facts of a task by one optimiser, then the mean loss of all their questions at the adapted weights."""
    model = tiny.make_model("llama").double()
    several = config(inner_lr=0.01, num_inner_steps=3, batch_size=batch_size, questions_per_task=2, facts_per_task=[1, 2])
    pair, single = replace(PERU, together=(GREECE,)), GREECE
    encoder = TextEncoder(tokenizer)
    parameters = select_parameters(model, [1])
    step = compute_step_gradients(model, parameters, encode_step(encoder, [pair, single], several), several)
    expected = []
    for task in (single, pair):  # those of fewer facts are computed first
        adapted = tiny.make_model("llama").double()
        own = select_parameters(adapted, [1])
        optimizer = torch.optim.AdamW(own.values(), lr=0.01)
        for _ in range(3):
            for batch in encode_requests(encoder, [[fact.target for fact in task.facts]], batch_size):
                optimizer.zero_grad()
                compute_answer_loss(adapted, batch).sum().backward()
                optimizer.step()
        asked = [question for fact in task.facts for question in (fact.related, (fact.more_related or (fact.related,))[0])]
        loss = torch.stack([compute_answer_loss(adapted, encode_questions(encoder, [question])) for question in asked]).mean()
        expected.append((loss.item(), torch.autograd.grad(loss, list(own.values()))))
    assert step.related_losses.tolist() == pytest.approx([loss for loss, _ in expected])
    for found, *gradients in zip(step.gradients, *(gradients for _, gradients in expected), strict=True):
        torch.testing.assert_close(found, sum(gradients))


def test_terms_are_weighted_and_summed(model, tokenizer):
    weights = {"related": 1.0, "efficacy": 0.5}
    [facts] = encode_requests(TextEncoder(tokenizer), [[task.target] for task in TASKS])
    related = encode_questions(TextEncoder(tokenizer), [task.related for task in TASKS])
    expected = compute_answer_loss(model, related, num_edits=2) + 0.5 * compute_answer_loss(model, facts, num_edits=2)
    torch.testing.assert_close(made(model, tokenizer, TASKS, config(outer_terms=weights))(model), expected)


def test_every_term_has_a_gradient_that_agrees_with_differences(model, tokenizer):
    parameters = select_parameters(model, [1])
    outer_loss = made(model, tokenizer, TASKS, config(outer_terms=dict.fromkeys(OUTER_TERMS, 1.0)))
    moved(model)
    gradients = torch.autograd.grad(outer_loss(model).sum(), list(parameters.values()))
    norm = sum(float(g.square().sum()) for g in gradients) ** 0.5
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, g in zip(parameters.values(), gradients, strict=True):
                p.add_(g / norm, alpha=sign * 1e-3)
            values.append(float(outer_loss(model).sum()))
            for p, g in zip(parameters.values(), gradients, strict=True):
                p.sub_(g / norm, alpha=sign * 1e-3)
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(norm, rel=5e-3)


def test_a_step_with_all_terms_leaves_theta_alone_and_finds_other_gradients(model, tokenizer):
    parameters = select_parameters(model, [1])
    before = {name: p.detach().clone() for name, p in parameters.items()}
    settings = {"inner_lr": 0.01, "num_inner_steps": 2}
    plain = compute_step_gradients(
        model, parameters, encode_step(TextEncoder(tokenizer), TASKS, config(**settings)), config(**settings)
    )
    everything = config(**settings, outer_terms=dict.fromkeys(OUTER_TERMS, 1.0))
    full = compute_step_gradients(model, parameters, encode_step(TextEncoder(tokenizer), TASKS, everything), everything)
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())
    assert not torch.allclose(plain.gradients[0], full.gradients[0])


def test_order_gives_every_task_the_question_of_the_next_as_unrelated():
    tasks = [replace(PERU, task_id=str(n), related=Question(f"{n}?", ("a",)), unrelated=None) for n in range(5)]
    ordered = order_tasks(tasks, seed=0, num_tasks=None)
    assert [task.unrelated for task in ordered] == [task.related for task in (*ordered[1:], ordered[0])]


def test_joined_tasks_have_all_questions_of_their_fact():
    single = [MetaTask(str(n), PERU.target, Question(f"{n}?", ("a",))) for n in range(3)]
    [joined] = join_tasks(single, seed=0)
    assert {joined.related, *joined.more_related} == {task.related for task in single}
    assert join_tasks(single, 0) == [joined]


def test_bad_terms():
    assert tuple(TERMS) == OUTER_TERMS
    with pytest.raises(ConfigError, match=r"outer_terms must be weights of related, .*known, got"):
        config(outer_terms={"relatd": 1.0})


def test_a_text_that_cannot_be_used_ends_a_run_before_its_first_step(model):
    """However late its task comes; here one whose answer is cut otherwise with the fact before it."""

    class Cutting:
        """One token a word, and two for the last one where a certain fact stands before the question."""

        is_fast, pad_token_id = False, 0

        def __call__(self, text, **options):
            return {"input_ids": [1] * (len(text.split()) + ("Greece" in text and text.endswith("euro")))}

    before, validated = {name: p.detach().clone() for name, p in model.named_parameters()}, []
    settings = config(outer_terms={"in-context": 1.0}, validate_every=1, outer_lr=0.1)
    with pytest.raises(ModelError, match="cuts the answer 'euro' of task greece differently with the fact before it"):
        meta_train(model, Cutting(), [PERU, GREECE], settings, validate=lambda: validated.append(1) or {})
    assert not validated and all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_locality_without_another_subject(tokenizer):
    with pytest.raises(ModelError, match="task peru has none"):
        encode_step(TextEncoder(tokenizer), [replace(PERU, unrelated=None)], config(outer_terms={"locality": 1.0}))
