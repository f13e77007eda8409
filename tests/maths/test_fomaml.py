"""Eq. 2-4 against closed forms, finite differences and torch's own optimiser."""

from __future__ import annotations

import math
import weakref
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch
from exact_maml import compute_exact_task_gradients
from transformers import LlamaConfig

from propmeta_edit.easyedit.hparams import MetaFTHyperParams
from propmeta_edit.easyedit.plugin import apply_metaft_to_model
from propmeta_edit.edits.compute import compute_edit
from propmeta_edit.errors import ConfigError, ModelError
from propmeta_edit.finetune.buffers import buffer, kept_buffers
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.inner_loop import apply_inner_loop
from propmeta_edit.finetune.input_moments import give_input_moments
from propmeta_edit.finetune.losses import compute_answer_loss
from propmeta_edit.finetune.weights import apply_snapshot, only_trainable, snapshot
from propmeta_edit.metatrain import fomaml, trainer
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.fomaml import TaskGradients, apply_outer_step, compute_task_gradients
from propmeta_edit.metatrain.run import TrainingRun
from propmeta_edit.metatrain.task_texts import encode_step
from propmeta_edit.metatrain.trainer import compute_step_gradients, meta_train, outer_learning_rate
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.records import EditRequest, MetaTask, Question
from propmeta_edit.text.encoding import TextEncoder, encode_questions, encode_requests

REQUEST = EditRequest("Smith Innovation PLC was founded in", "Greece", "Smith Innovation PLC")
QUESTION = Question("What is the currency of the country that Smith Innovation PLC was founded in?", ("euro",))


@pytest.fixture
def setting(family, tokenizer):
    model = tiny.make_model(family)
    parameters = select_parameters(model, [1])
    return (
        model,
        parameters,
        encode_requests(TextEncoder(tokenizer), [[REQUEST]]),
        encode_questions(TextEncoder(tokenizer), [QUESTION]),
    )


def answer_loss(related, num_tasks=1):
    """The paper's outer loss, as the outer loop calls it."""
    return lambda model: compute_answer_loss(model, related, num_edits=num_tasks)


def adamw_by_hand(value, gradients, lr, decay, beta1=0.9, beta2=0.999, eps=1e-8):
    """AdamW written out, for a fixed sequence of gradients."""
    m = v = torch.zeros_like(value)
    for step, gradient in enumerate(gradients, start=1):
        value = value * (1 - lr * decay)
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        value = value - lr * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
    return value


def test_inner_loop_is_adamw_on_the_target_loss_step_by_step(setting):
    """The obvious loop (whole-model loss, AdamW by hand) reaches the same weights and sees the same losses."""
    model, parameters, target, _ = setting
    before, gradients, seen = snapshot(parameters), [], []
    settings = EditSettings(inner_lr=0.01, num_inner_steps=3, weight_decay=0.1)
    with only_trainable(model, parameters):
        for _ in range(3):
            for name, p in parameters.items():
                history = [g[name] for g in gradients]
                p.data.copy_(adamw_by_hand(before[name], history, 0.01, 0.1))
            loss = compute_answer_loss(model, target[0])
            grads = torch.autograd.grad(loss, list(parameters.values()))
            gradients.append(dict(zip(parameters, grads, strict=True)))
            seen.append(loss.item())
        expected = {name: adamw_by_hand(before[name], [g[name] for g in gradients], 0.01, 0.1) for name in parameters}
        for name, p in parameters.items():
            p.data.copy_(before[name])
        losses = apply_inner_loop(model, parameters, target, settings)
    assert [loss.item() for loss in losses] == pytest.approx(seen, rel=1e-9)
    for name, p in parameters.items():
        torch.testing.assert_close(p.data, expected[name], rtol=1e-9, atol=1e-10)  # a key bias has no gradient but rounding
    assert losses[-1] < losses[0]


def test_task_gradient_is_the_plain_gradient_at_the_adapted_weights(setting):
    model, parameters, target, related = setting
    settings = EditSettings(inner_lr=0.02, num_inner_steps=2)
    before = snapshot(parameters)
    with only_trainable(model, parameters):
        task = compute_task_gradients(model, parameters, target, answer_loss(related), settings)
        assert all(torch.equal(p.data, before[name]) for name, p in parameters.items()), "θ must not be written, to the bit"
        at_theta = torch.autograd.grad(compute_answer_loss(model, related), list(parameters.values()))
        apply_inner_loop(model, parameters, target, settings)
        at_theta_tau = torch.autograd.grad(compute_answer_loss(model, related), list(parameters.values()))
    for got, expected, other in zip(task.gradients, at_theta_tau, at_theta, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(got, other, rtol=1e-3)


def test_many_tasks_at_once_are_the_single_tasks(family, tokenizer):
    """Three tasks of different length with separate adapted weights: the same losses and the same sum of gradients."""
    model = tiny.make_model(family)
    parameters = select_parameters(model, [0, 1])
    requests = [REQUEST, EditRequest("Ann Lee is a citizen of", "Peru"), EditRequest("The capital of France is", "Paris in Greece")]
    questions = [QUESTION, Question("What does Ann Lee speak?", ("Spanish",)), Question("Where?", ("Lima in Peru",))]
    settings = EditSettings(inner_lr=0.02, num_inner_steps=3)
    with only_trainable(model, parameters):
        single = [
            compute_task_gradients(
                model,
                parameters,
                encode_requests(TextEncoder(tokenizer), [[r]]),
                answer_loss(encode_questions(TextEncoder(tokenizer), [q])),
                settings,
            )
            for r, q in zip(requests, questions, strict=True)
        ]
        target, related = (
            encode_requests(TextEncoder(tokenizer), [[r] for r in requests]),
            encode_questions(TextEncoder(tokenizer), questions),
        )
        together = compute_task_gradients(model, parameters, target, answer_loss(related, 3), settings, num_tasks=3)
    torch.testing.assert_close(together.related_losses, torch.cat([s.related_losses for s in single]), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(together.target_losses, torch.cat([s.target_losses for s in single]), rtol=1e-6, atol=1e-7)
    for number, name in enumerate(parameters):
        expected = sum(s.gradients[number] for s in single)
        torch.testing.assert_close(together.gradients[number], expected, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("settings", [EditSettings(num_inner_steps=0), EditSettings(inner_lr=0.0, num_inner_steps=4)])
def test_without_inner_learning_the_gradient_is_the_ordinary_one(setting, settings):
    model, parameters, target, related = setting
    with only_trainable(model, parameters):
        task = compute_task_gradients(model, parameters, target, answer_loss(related), settings)
        ordinary = torch.autograd.grad(compute_answer_loss(model, related), list(parameters.values()))
    for got, expected in zip(task.gradients, ordinary, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_loss_gradient_agrees_with_central_differences(setting):
    """In float64 all through for GPT-2; Llama and Qwen compute norms and rotations in fp32, hence a wider step."""
    model, parameters, _, related = setting
    width, tolerance = (1e-5, 1e-5) if model.config.model_type == "gpt2" else (1e-3, 5e-3)
    with only_trainable(model, parameters):
        gradients = torch.autograd.grad(compute_answer_loss(model, related), list(parameters.values()))
    generator = torch.Generator().manual_seed(1)
    for (name, p), gradient in zip(parameters.items(), gradients, strict=True):
        noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        direction = gradient / gradient.norm() + 0.3 * noise / noise.norm()
        values = []
        for sign in (1, -1):
            p.data.add_(direction, alpha=sign * width)
            values.append(compute_answer_loss(model, related).item())
            p.data.sub_(direction, alpha=sign * width)
        slope = (values[0] - values[1]) / (2 * width)
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=tolerance, abs=1e-4), name


class Quadratic(torch.nn.Module):
    """One weight w, at the place of a Llama's projection."""

    def __init__(self):
        super().__init__()
        self.config = LlamaConfig()
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False, dtype=torch.float64))])
        self.w = self.model.layers[0][0].weight
        self.w.data.fill_(3.0)


def test_first_order_and_not_second_order_on_a_quadratic(monkeypatch):
    """K SGD steps on a quadratic have an exact answer; exact MAML would carry the factor (1 - αa)^K, FOMAML must not.

    L_target = a/2 (w - t)² and L_related = b/2 (w - r)² for two tasks with different t and r at once.
    """
    a, targets, b, relateds, alpha, k = 0.7, (1.0, -4.0), 1.3, (-2.0, 0.5), 0.1, 4
    model = Quadratic()

    def loss(model, batch, reduction="mean", num_edits=1):
        scale, centres = batch
        w = model.model.layers[0](torch.ones(num_edits, 1, dtype=torch.float64)).flatten()
        return 0.5 * scale * (w - torch.tensor(centres)).square()

    class PlainSgd:
        def __init__(self, parameters, settings):
            self.optimizer = torch.optim.SGD(parameters.values(), lr=settings.inner_lr)

        def __call__(self, loss, batch):
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    monkeypatch.setattr("propmeta_edit.finetune.inner_loop.compute_answer_loss", loss)
    monkeypatch.setattr("propmeta_edit.finetune.inner_steps.AdamW", PlainSgd)
    settings = EditSettings(inner_lr=alpha, num_inner_steps=k, weight_decay=0.0)
    parameters = {"model.layers.0.0.weight": model.w}
    related = partial(loss, batch=(b, relateds), num_edits=2)
    task = compute_task_gradients(model, parameters, [(a, targets)], related, settings, num_tasks=2)
    adapted = [t + (1 - alpha * a) ** k * (3.0 - t) for t in targets]
    first_order = sum(b * (w - r) for w, r in zip(adapted, relateds, strict=True))
    assert task.gradients[0].item() == pytest.approx(first_order, rel=1e-12)
    assert task.gradients[0].item() != pytest.approx(first_order * (1 - alpha * a) ** k, rel=1e-3)


def test_exact_maml_carries_the_factor_on_a_quadratic(monkeypatch):
    """K SGD steps on the quadratic above: the exact gradient is (1 - αa)^K times the first-order one."""
    a, target, b, related, alpha, k = 0.7, 1.0, 1.3, -2.0, 0.1, 4
    model = Quadratic()

    def loss(model, centre, scale):
        w = model.model.layers[0](torch.ones(1, 1, dtype=torch.float64)).flatten()
        return 0.5 * scale * (w - centre).square()

    def plain_sgd(values, gradients, first, second, step, settings):
        return [v - settings.inner_lr * g for v, g in zip(values, gradients, strict=True)], first, second

    monkeypatch.setattr("exact_maml._adamw", plain_sgd)
    monkeypatch.setattr("exact_maml.compute_answer_loss", lambda m, batch, reduction: loss(m, batch, a))
    settings = EditSettings(inner_lr=alpha, num_inner_steps=k, weight_decay=0.0)
    parameters = {"model.layers.0.0.weight": model.w}
    task = compute_exact_task_gradients(model, parameters, [target], lambda m: loss(m, related, b), settings)
    adapted = target + (1 - alpha * a) ** k * (3.0 - target)
    assert task.gradients[0].item() == pytest.approx(b * (adapted - related) * (1 - alpha * a) ** k, rel=1e-12)
    assert task.related_losses.item() == pytest.approx(0.5 * b * (adapted - related) ** 2, rel=1e-12)


def test_exact_maml_is_the_derivative_of_the_whole_inner_loop(tokenizer):
    """Against central differences of L_related(θ_τ(θ)) by the engine's own inner loop, along the gradient and a random direction.

    GPT-2 in float64 all through. AdamW's first step is the sign of the gradient, so numbers whose gradient is near 0 make the
    function rough: eps is raised to smooth it.
    """
    model = tiny.make_model("gpt2")
    parameters = select_parameters(model, [1])
    target, related = encode_requests(TextEncoder(tokenizer), [[REQUEST]]), encode_questions(TextEncoder(tokenizer), [QUESTION])
    settings = EditSettings(inner_lr=0.02, num_inner_steps=3, eps=1e-2)
    exact = compute_exact_task_gradients(model, parameters, target, answer_loss(related), settings)
    with only_trainable(model, parameters):
        first_order = compute_task_gradients(model, parameters, target, answer_loss(related), settings)
    torch.testing.assert_close(exact.related_losses, first_order.related_losses, rtol=1e-9, atol=0)
    torch.testing.assert_close(exact.target_losses, first_order.target_losses, rtol=1e-9, atol=0)

    def related_loss():
        with only_trainable(model, parameters):
            return compute_task_gradients(model, parameters, target, answer_loss(related), settings).related_losses.item()

    generator = torch.Generator().manual_seed(1)
    noise = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters.values()]
    differs = False
    for direction in (exact.gradients, noise):
        norm = sum(float(d.square().sum()) for d in direction) ** 0.5
        values = []
        for sign in (1, -1):
            for p, d in zip(parameters.values(), direction, strict=True):
                p.data.add_(d / norm, alpha=sign * 1e-4)
            values.append(related_loss())
            for p, d in zip(parameters.values(), direction, strict=True):
                p.data.sub_(d / norm, alpha=sign * 1e-4)
        slope = (values[0] - values[1]) / 2e-4
        predicted = sum(float((g * d).sum()) for g, d in zip(exact.gradients, direction, strict=True)) / norm
        approximate = sum(float((g * d).sum()) for g, d in zip(first_order.gradients, direction, strict=True)) / norm
        assert slope == pytest.approx(predicted, rel=1e-4, abs=1e-7)
        differs |= abs(slope - approximate) > 1e-2 * abs(slope)
    assert differs, "the first-order gradient must be another one, or this shows nothing"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_exact_maml_runs_and_leaves_theta_alone(name, tokenizer):
    """Two tasks one after another, as an outer step of second order would take them."""
    model = tiny.make_model(name)
    parameters = select_parameters(model, [1])
    before = snapshot(parameters)
    settings = EditSettings(inner_lr=0.01, num_inner_steps=2)
    related = answer_loss(encode_questions(TextEncoder(tokenizer), [QUESTION]))
    targets = [
        encode_requests(TextEncoder(tokenizer), [[request]]) for request in (REQUEST, EditRequest("Ann Lee lives in", "Peru"))
    ]
    first, second = (compute_exact_task_gradients(model, parameters, target, related, settings) for target in targets)
    found = first.take_in(second)
    assert len(found.related_losses) == 2 and all(torch.isfinite(g).all() for g in found.gradients)
    assert all(torch.equal(p, before[n]) for n, p in parameters.items())


def test_outer_step_is_adamw_on_the_mean_task_gradient():
    parameter = torch.nn.Parameter(torch.tensor([0.5, -1.5], dtype=torch.float64))
    gradients = [torch.tensor([0.3, -0.1], dtype=torch.float64), torch.tensor([-0.5, 0.7], dtype=torch.float64)]
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.01)
    apply_outer_step(optimizer, {"p": parameter}, TaskGradients((sum(gradients),), torch.zeros(2), torch.zeros(2)))
    expected = adamw_by_hand(torch.tensor([0.5, -1.5], dtype=torch.float64), [sum(gradients) / 2], 0.1, 0.01)
    torch.testing.assert_close(parameter.data, expected, rtol=1e-12, atol=0)
    assert parameter.grad is None


def test_a_gradient_that_is_not_finite_reaches_no_weight(tokenizer, monkeypatch, tmp_path):
    """Its losses may well be finite: the second step's gradient is spoilt here, the first one's stands."""
    model = tiny.make_model("llama")
    config = MetaTrainConfig(model="tiny", layers=[1], num_inner_steps=1, inner_lr=0.01, outer_lr=0.01)
    tasks = [MetaTask(f"t{i}", REQUEST, QUESTION) for i in range(3)]
    reference = tiny.make_model("llama")
    meta_train(reference, tokenizer, tasks[:1], config)

    def spoil(model, parameters, parts, config):
        found = compute_step_gradients(model, parameters, parts, config)
        if parts[0].tasks[0].task_id == "t1":
            found.gradients[0][0, 0] = math.nan
        return found

    monkeypatch.setattr("propmeta_edit.metatrain.trainer.compute_step_gradients", spoil)
    with pytest.raises(ModelError, match=r"outer gradient is not finite over tasks 2 to 2 \(t1\); lower inner_lr"):
        meta_train(model, tokenizer, tasks, config, TrainingRun(tmp_path, {}))
    assert not (tmp_path / "state.safetensors").exists()
    expected = dict(reference.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())


def test_outer_rate_is_constant_or_falls_linearly_to_zero():
    constant = MetaTrainConfig(model="tiny", outer_lr=0.5)
    linear = MetaTrainConfig(model="tiny", outer_lr=0.5, outer_schedule="linear")
    assert [outer_learning_rate(constant, done, 4) for done in range(4)] == [0.5] * 4
    assert [outer_learning_rate(linear, done, 4) for done in range(4)] == [0.5, 0.375, 0.25, 0.125]
    with pytest.raises(ConfigError, match="outer_schedule must be constant or linear, got 'cosine'"):
        MetaTrainConfig(model="tiny", outer_schedule="cosine")


def test_second_of_two_linear_steps_goes_half_as_far(tokenizer):
    """The first steps are the same, so the second ones have the same gradient and differ by the rate alone."""

    def weights_after(num_tasks, schedule):
        model = tiny.make_model("llama")
        config = MetaTrainConfig(
            model="tiny", layers=[1], num_inner_steps=0, outer_lr=0.01, outer_schedule=schedule, weight_decay=0.0
        )
        meta_train(model, tokenizer, [MetaTask(f"t{i}", REQUEST, QUESTION) for i in range(num_tasks)], config)
        return snapshot(select_parameters(model, [1]))

    one, constant, linear = weights_after(1, "linear"), weights_after(2, "constant"), weights_after(2, "linear")
    for name, first in one.items():
        assert not torch.equal(constant[name], first)
        torch.testing.assert_close(linear[name] - first, (constant[name] - first) / 2, rtol=1e-6, atol=1e-12)


def test_tasks_in_the_memory_of_those_before_have_the_same_bits(family, tokenizer, monkeypatch):
    """A run of three steps of two tasks; the copies and both moments lie where the first step's did, and nowhere else."""
    tasks = [MetaTask(f"t{n}", EditRequest(f"Ann Lee number {n} lives in", "Peru"), QUESTION) for n in range(6)]
    found, places = [], []
    usual = fomaml.adapted_copies

    @contextmanager
    def noted(*arguments):
        with usual(*arguments) as (adapted, losses):
            places.append([p.data_ptr() for p in adapted.parameters.values()])
            yield adapted, losses

    monkeypatch.setattr(fomaml, "adapted_copies", noted)
    for keep in (True, False):
        model = tiny.make_model(family)
        settings = {"layers": [1], "inner_lr": 0.01, "outer_lr": 0.01, "num_inner_steps": 3, "tasks_per_step": 2}
        progress = meta_train(model, tokenizer, tasks, MetaTrainConfig(model="tiny", keep_buffers=keep, **settings))
        found.append([*select_parameters(model, [1]).values(), torch.tensor([x.related_loss for x in progress.losses])])
    assert all(torch.equal(kept, new) for kept, new in zip(*found, strict=True))
    assert places[0] == places[1] == places[2]


def test_buffers_fit_or_are_made_anew():
    """By shape and dtype; without a place to keep them always."""
    three, four = torch.zeros(3), torch.zeros(4)
    kept = {}
    with kept_buffers(kept):
        first = buffer("a", three)
        assert buffer("a", three) is first and buffer("b", three) is not first
        assert buffer("a", four).shape == (4,) and buffer("a", four.double()).dtype == torch.float64
    assert buffer("a", three) is not first and set(kept) == {"a", "b"}


def test_the_outer_gradient_of_edits_of_low_rank_is_that_at_their_matrices(family, tokenizer):
    """Two tasks beside each other on one θ against each one's edited weights in a model of its own."""
    model = tiny.make_model(family)
    parameters = select_parameters(model, [1])
    before = snapshot(parameters)
    paths = [name.removesuffix(".weight") for name in parameters if name.endswith(".weight")]
    widths = {path: model.get_submodule(path).weight.shape[0 if family == "gpt2" else 1] for path in paths}
    give_input_moments(model, {path: torch.eye(width).double() for path, width in widths.items()})
    settings = EditSettings([1], inner_lr=0.02, num_inner_steps=3, inner_step="whitened", positions="subject")
    requests = [REQUEST, EditRequest("Ann Lee lives in", "Peru", "Ann Lee")]
    encoder = TextEncoder(tokenizer)
    target = encode_requests(encoder, [[request] for request in requests], positions="subject")
    related = answer_loss(encode_questions(encoder, [QUESTION, QUESTION]), num_tasks=2)
    with only_trainable(model, parameters):
        found = compute_task_gradients(model, parameters, target, related, settings, num_tasks=2)
    expected = [torch.zeros_like(p) for p in parameters.values()]
    for request in requests:
        edited = compute_edit(model, tokenizer, request, settings).weights
        other = tiny.make_model(family)
        own = select_parameters(other, [1])
        apply_snapshot(own, edited)
        loss = answer_loss(encode_questions(encoder, [QUESTION]))(other).sum()
        expected = [e + g for e, g in zip(expected, torch.autograd.grad(loss, list(own.values())), strict=True)]
    for gradient, other in zip(found.gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other)
    assert all(torch.equal(p, before[name]) for name, p in parameters.items())


def test_meta_training_and_editing_share_one_inner_loop(family, tokenizer, monkeypatch):
    """The editor's weights equal those at which the meta-trainer takes its outer gradient, tensor for tensor."""
    model = tiny.make_model(family)
    parameters = select_parameters(model, [1])
    before = snapshot(parameters)
    config = MetaTrainConfig(model="tiny", layers=[1], inner_lr=0.01, num_inner_steps=4, outer_lr=0.0)
    seen = {}

    def record(model, adapted, *arguments):
        losses = apply_inner_loop(model, adapted, *arguments)
        seen.update({name: value[0].T if value.dim() == 3 and family != "gpt2" else value[0] for name, value in adapted.items()})
        return losses

    monkeypatch.setattr("propmeta_edit.finetune.adapted.apply_inner_loop", record)
    meta_train(model, tokenizer, [MetaTask("t", REQUEST, QUESTION)], config)
    assert all(torch.equal(p.data, before[name]) for name, p in parameters.items())
    hparams = MetaFTHyperParams(model_name="tiny", device="cpu", layers=[1], lr=0.01, num_steps=4)
    request = {"prompt": REQUEST.prompt, "target_new": REQUEST.target_new, "subject": REQUEST.subject}
    edited, original = apply_metaft_to_model(model, tokenizer, [request], hparams, return_orig_weights=True)
    assert edited is model and seen.keys() == parameters.keys()
    for name, p in parameters.items():
        torch.testing.assert_close(p.data, seen[name].data, rtol=1e-9, atol=1e-9, msg=name)
        assert torch.equal(original[name], before[name]) and not torch.equal(p.data, before[name])


def test_meta_training_learns_and_leaves_every_other_tensor_alone(family, tokenizer):
    model = tiny.make_model(family, dtype=torch.float32)
    everything = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    config = MetaTrainConfig(model="tiny", layers=[1], inner_lr=0.003, num_inner_steps=2, outer_lr=0.01)
    losses = meta_train(model, tokenizer, [MetaTask(f"t{i}", REQUEST, QUESTION) for i in range(12)], config).losses
    assert losses[-1].related_loss < 0.7 * losses[0].related_loss
    trained = select_parameters(model, [1])
    for name, p in model.named_parameters():
        assert torch.equal(p.data, everything[name]) == (name not in trained), name
        assert p.requires_grad == flags[name] and p.grad is None


def test_half_precision_is_refused(tokenizer):
    """Steps of 2e-5 would vanish in it."""
    model = tiny.make_model("llama", dtype=torch.bfloat16)
    config = MetaTrainConfig(model="tiny", layers=[1], num_inner_steps=1)
    with pytest.raises(ModelError, match=r"must be fp32, but model\.layers\.1\..* is torch\.bfloat16"):
        meta_train(model, tokenizer, [MetaTask("t", REQUEST, QUESTION)], config)


def test_a_step_in_parts_holds_one_sum_of_gradients(tokenizer, monkeypatch):
    """However many parts there are; their sum is the gradient of all at once."""
    model = tiny.make_model("llama")
    parameters = select_parameters(model, [1])
    tasks = [MetaTask(name, EditRequest("Ann Lee lives in", name), QUESTION) for name in ("Peru", "Greece", "France", "Lima")]
    config = MetaTrainConfig(model="tiny", layers=[1], inner_lr=0.01, num_inner_steps=2, tasks_per_step=4)
    compute, made, alive = trainer._compute_gradients, [], []

    def watch(*arguments):
        alive.append(sum(reference() is not None for reference in made))
        part = compute(*arguments)
        made.append(weakref.ref(part.gradients[0]))
        return part

    monkeypatch.setattr(trainer, "_compute_gradients", watch)
    parts = encode_step(TextEncoder(tokenizer), tasks, replace(config, tasks_at_once=1))
    in_parts = compute_step_gradients(model, parameters, parts, config)
    assert alive == [0, 1, 1, 1]
    singly = [compute(model, parameters, part, config) for part in parts]
    expected = [sum(column) for column in zip(*(task.gradients for task in singly), strict=True)]
    [whole] = encode_step(TextEncoder(tokenizer), tasks, config)
    together = compute(model, parameters, whole, config).gradients
    for own, one_by_one, at_once in zip(in_parts.gradients, expected, together, strict=True):
        assert own.is_contiguous()
        torch.testing.assert_close(own, one_by_one, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(own, at_once, rtol=1e-5, atol=1e-7)
    assert in_parts.related_losses.tolist() == [task.related_losses.item() for task in singly]
    assert in_parts.target_losses.tolist() == [task.target_losses.item() for task in singly]


def test_tasks_per_step_averages_gradients_at_the_same_weights(tokenizer):
    """Two tasks a step: both see the same θ, so swapping them changes nothing but rounding."""
    other = MetaTask("b", EditRequest("Ann Lee is a citizen of", "Peru"), Question("What does Ann Lee speak?", ("Spanish",)))
    tasks = [MetaTask("a", REQUEST, QUESTION), other]
    results = []
    for order in (tasks, tasks[::-1]):
        model = tiny.make_model("llama")
        config = MetaTrainConfig(model="tiny", layers=[1], inner_lr=0.01, num_inner_steps=2, outer_lr=0.01, tasks_per_step=2)
        meta_train(model, tokenizer, order, config)
        results.append(snapshot(select_parameters(model, [1])))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-7, atol=1e-9)
