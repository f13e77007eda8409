"""Every rule of the inner loop by its equation, on a single edit and on edits side by side."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from safetensors.torch import load_file

from propmeta_edit.edits.compute import compute_edit, edit_many
from propmeta_edit.edits.views import generate_with_edits
from propmeta_edit.errors import ConfigError, ModelError
from propmeta_edit.finetune.edit_settings import INNER_STEPS, EditSettings
from propmeta_edit.finetune.inner_loop import apply_inner_loop
from propmeta_edit.finetune.inner_steps import AdamW
from propmeta_edit.finetune.input_moments import (
    FILE,
    InputMoments,
    find_whiteners,
    give_input_moments,
    require_input_moments,
    write_input_moments,
)
from propmeta_edit.finetune.losses import compute_answer_loss
from propmeta_edit.finetune.many_edits import many_edits
from propmeta_edit.finetune.single_edit import put_in_place, write_facts
from propmeta_edit.finetune.stacking import stacked_weights
from propmeta_edit.finetune.weights import only_trainable
from propmeta_edit.models.artefacts import INPUT_MOMENTS, MAKERS
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.records import EditRequest
from propmeta_edit.text.encoding import TextEncoder, encode_requests

REQUESTS = [EditRequest("Ann Lee lives in", "Peru"), EditRequest("Smith Innovation PLC was founded in", "Greece")]
WHITENED = EditSettings(layers=[1], inner_lr=0.02, num_inner_steps=3, inner_step="whitened", damping=0.1)


def moments_of(model, seed=5):
    """Of every projection of layer 1, as no two texts give them."""
    generator = torch.Generator().manual_seed(seed)
    moments = {}
    for name in select_parameters(model, [1]):
        if name.endswith(".weight"):
            module = model.get_submodule(name.removesuffix(".weight"))
            width = module.weight.shape[0 if type(module).__name__ == "Conv1D" else 1]
            root = torch.randn(width, width, generator=generator, dtype=torch.float64)
            moments[name.removesuffix(".weight")] = root @ root.T / width
    return moments


def by_hand(model, tokenizer, requests, moments, settings):
    """The equation, fact by fact and matrix by matrix, with gradients of the whole model's loss; of all tokens."""
    parameters = {name: p for name, p in select_parameters(model, [1]).items() if name.endswith(".weight")}
    batches = [encode_requests(TextEncoder(tokenizer), [[request]])[0] for request in requests]
    size = sum(float(p.detach().square().sum()) for p in parameters.values()) ** 0.5
    for update in range(settings.num_inner_steps):
        moved = [torch.zeros_like(p) for p in parameters.values()]
        for batch in batches:  # learnt in one update: all gradients are those at the same weights
            gradients = torch.autograd.grad(compute_answer_loss(model, batch).sum(), list(parameters.values()))
            steps = []
            for name, gradient in zip(parameters, gradients, strict=True):
                moment = moments[name.removesuffix(".weight")]
                damped = moment + settings.damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
                is_conv = type(model.get_submodule(name.removesuffix(".weight"))).__name__ == "Conv1D"
                wide = gradient.T if is_conv else gradient  # [out, in]
                step = torch.linalg.solve(damped, wide.T).T
                steps.append(step.T if is_conv else step)
            norm = sum(float(step.square().sum()) for step in steps) ** 0.5
            rate = 2 * settings.inner_lr * (1 - update / settings.num_inner_steps)
            moved = [whole + rate * size / norm * step for whole, step in zip(moved, steps, strict=True)]
        with torch.no_grad():
            for parameter, step in zip(parameters.values(), moved, strict=True):
                parameter -= step
    return {name: p.detach() for name, p in parameters.items()}


@pytest.mark.parametrize("num_edits", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gemma3_text"])
def test_a_step_inside_the_backward_pass_is_one_after_it_to_the_bit(tokenizer, architecture, dtype, num_edits):
    """torch's optimiser over all tensors at once, on a model of its own; two batches a pass, two layers."""
    settings = EditSettings(layers=[0, 1], inner_lr=0.01, num_inner_steps=3)
    target = encode_requests(TextEncoder(tokenizer), [REQUESTS] * num_edits)
    found = []
    for loop in (apply_inner_loop, step_after_the_pass):
        model = tiny.make_model(architecture, dtype=dtype)
        with stacked_weights(model, select_parameters(model, settings.layers), num_edits) as adapted:
            with only_trainable(model, adapted.parameters):
                losses = loop(model, adapted.parameters, target, settings, num_edits)
            found.append([*losses, *(p.detach() for p in adapted.parameters.values())])
    assert len(found[0]) > 10 and all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def step_after_the_pass(model, parameters, target, settings, num_edits):
    """The plain loop: the frozen prefix aside, which has tests of its own."""
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.inner_lr, weight_decay=settings.weight_decay, fused=True)
    losses = []
    for _ in range(settings.num_inner_steps):
        for batch in target:
            loss = compute_answer_loss(model, batch, num_edits=num_edits)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            losses.append(loss.detach())
    return losses


def test_weights_and_moments_stay_where_they_are_from_step_to_step(tokenizer):
    """As a CUDA graph of the step would need them: each step writes into the tensors of the one before."""
    model = tiny.make_model("llama", dtype=torch.float32)
    batch = encode_requests(TextEncoder(tokenizer), [[EditRequest("Ann Lee lives in", "Peru")]] * 2)[0]
    with stacked_weights(model, select_parameters(model, [1]), 2) as adapted, only_trainable(model, adapted.parameters):
        step = AdamW(adapted.parameters, EditSettings(layers=[1], inner_lr=0.01))
        places = []
        for _ in range(3):
            step(compute_answer_loss(model, batch, num_edits=2).sum(), batch)
            held = [t for p, state in step._state.items() for t in (p, state.mean, state.square, state.count)]
            places.append([tensor.data_ptr() for tensor in held])
    assert places[0] == places[1] == places[2] and len(set(places[0])) == 4 * len(adapted.parameters)


def test_no_two_gradients_are_held_at_once(tokenizer, monkeypatch):
    """Nor one after the loop, nor a hook on a model's own parameters."""
    model = tiny.make_model("llama")
    parameters = select_parameters(model, [0, 1])
    held = []
    monkeypatch.setattr(
        AdamW, "_move", watched(AdamW._move, lambda: held.append(sum(p.grad is not None for p in parameters.values())))
    )
    with only_trainable(model, parameters):
        apply_inner_loop(model, parameters, encode_requests(TextEncoder(tokenizer), [REQUESTS]), EditSettings(num_inner_steps=2))
    assert held == [1] * len(parameters) * 2 * len(REQUESTS)
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in parameters.values())


def watched(function, look):
    def watching(*arguments):
        look()
        return function(*arguments)

    return watching


@pytest.mark.parametrize("requests", [REQUESTS[:1], REQUESTS])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_whitened_step_is_its_equation(tokenizer, architecture, requests):
    """Of one fact, and of two in one update, each with a step of its own."""
    model, other = (tiny.make_model(architecture).double() for _ in range(2))
    moments, settings = moments_of(model), replace(WHITENED, batch_size=len(requests))
    give_input_moments(model, moments)
    biases = {name: p.detach().clone() for name, p in select_parameters(model, [1]).items() if name.endswith(".bias")}
    write_facts(model, tokenizer, requests, settings)
    found = dict(model.named_parameters())
    for name, expected in by_hand(other, tokenizer, requests, moments, settings).items():
        torch.testing.assert_close(found[name].detach(), expected)
    assert all(torch.equal(found[name], value) for name, value in biases.items())


@pytest.mark.parametrize("num_edits", [1, 2])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_steps_at_every_token_are_the_plain_ones(tokenizer, architecture, num_edits):
    """Put together from what each token writes, a gradient is the backward pass's: of all tokens named, the same edit."""
    found = []
    for is_named in (False, True):
        model = tiny.make_model(architecture, dtype=torch.float64)
        settings = EditSettings(layers=[1], inner_lr=0.01, num_inner_steps=3, positions="subject" if is_named else "all", eps=1e-4)
        target = encode_requests(TextEncoder(tokenizer), [REQUESTS] * num_edits, 2)
        if is_named:
            everywhere = torch.arange(target[0].input_ids.shape[1]).expand_as(target[0].input_ids).contiguous()
            object.__setattr__(target[0], "written", everywhere)
        with (
            stacked_weights(model, select_parameters(model, [1]), num_edits) as adapted,
            only_trainable(model, adapted.parameters),
        ):
            apply_inner_loop(model, adapted.parameters, target, settings, num_edits)
        found.append(list(adapted.parameters.values()))
    assert len(found[0]) >= 7 or architecture == "gpt2"
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("inner_step", ["adamw", "whitened"])
def test_only_the_subjects_tokens_are_written_at(tokenizer, architecture, inner_step):
    """One step's change answers to what entered at the subject's tokens, and to nothing that is orthogonal to it."""
    model = tiny.make_model(architecture).double()
    name = next(name for name in select_parameters(model, [1], "mlp") if name.endswith(".weight"))  # the MLP's first
    path = name.removesuffix(".weight")
    give_input_moments(model, {module: torch.eye(len(value)).double() for module, value in moments_of(model).items()})
    settings = EditSettings([1], "mlp", 0.02, 1, inner_step, positions="subject")
    request = EditRequest("In brief, Ann Lee lives in", "Peru", "Ann Lee")
    [batch] = encode_requests(TextEncoder(tokenizer), [[request]], positions="subject")
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    with torch.no_grad():
        model(batch.input_ids)
    handle.remove()
    inputs = seen[0][0]
    before = model.get_parameter(name).detach().clone()
    edited = compute_edit(model, tokenizer, request, settings).weights[name]
    change = edited - before if model.config.model_type != "gpt2" else (edited - before).T  # [out, in]
    own = inputs[batch.written[0]]
    assert 0 < len(own) < len(inputs) - 2
    if inner_step == "whitened":  # AdamW's first step is a sign, which has no such span
        basis = torch.linalg.qr(own.T)[0]
        torch.testing.assert_close(change @ basis @ basis.T, change)
    plain = compute_edit(model, tokenizer, request, replace(settings, positions="all")).weights[name]
    assert not torch.allclose(plain, edited, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("inner_step", ["adamw", "whitened"])
def test_edits_at_their_subjects_side_by_side_are_those_one_by_one(tokenizer, architecture, inner_step):
    """Subjects of one and of several tokens; a fact without a subject beside them."""
    model = tiny.make_model(architecture).double()
    give_input_moments(model, moments_of(model))
    requests = [
        EditRequest("Ann Lee lives in", "Peru", "Ann Lee"),
        EditRequest("Smith Innovation PLC was founded in", "Greece", "Smith Innovation PLC"),
        EditRequest("Ann Lee works in", "Chile"),
    ]
    settings = EditSettings([1], inner_lr=0.02, num_inner_steps=3, inner_step=inner_step, positions="subject", eps=1e-4)
    alone = [compute_edit(model, tokenizer, request, settings).weights for request in requests]
    with many_edits(model, tokenizer, [[request] for request in requests], settings) as adapted:
        for number, expected in enumerate(alone):
            for name, value in adapted.take(number).items():
                torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("positions", ["all", "subject"])
@pytest.mark.parametrize("num_steps", [1, 3])
def test_edits_of_low_rank_that_diverge_are_refused_alone_and_side_by_side(tokenizer, positions, num_steps):
    model = tiny.make_model("llama", dtype=torch.float32)
    give_input_moments(model, {name: value.float() for name, value in moments_of(model).items()})
    settings = replace(WHITENED, inner_lr=1e38, positions=positions, num_inner_steps=num_steps)
    with pytest.raises(ModelError, match=r"the edit diverged: model\.layers\.1\.\S+ is no longer finite"):
        compute_edit(model, tokenizer, REQUESTS[0], settings)
    with pytest.raises(ModelError, match=r"the edit diverged: model\.layers\.1\.\S+ is no longer finite"):
        edit_many(model, tokenizer, REQUESTS, settings)


def test_no_step_of_low_rank_moves_nothing(tokenizer):
    model = tiny.make_model("llama")
    give_input_moments(model, moments_of(model))
    settings = replace(WHITENED, num_inner_steps=0)
    for edit in (compute_edit(model, tokenizer, REQUESTS[0], settings), *edit_many(model, tokenizer, REQUESTS, settings)):
        assert edit.weights and all(torch.equal(value, model.get_parameter(name)) for name, value in edit.weights.items())
        assert generate_with_edits(model, tokenizer, ["Ann"], [edit]) == generate_with_edits(model, tokenizer, ["Ann"], [None])


def test_many_facts_in_one_edit_are_a_matrix_once_that_is_smaller(tokenizer, monkeypatch):
    """The factors of many updates outgrow what they change; the edit is the same."""
    model = tiny.make_model("llama").double()
    give_input_moments(model, moments_of(model))
    settings = replace(WHITENED, num_inner_steps=12, modules="mlp")
    edits = [[EditRequest(f"Ann Lee number {n} lives in", "Peru") for n in range(4)]]
    with many_edits(model, tokenizer, edits, settings) as changes:
        folded = changes.take(0)
    monkeypatch.setattr("propmeta_edit.finetune.low_rank._most_factors", lambda *widths: 10**9)
    with many_edits(model, tokenizer, edits, settings) as changes:
        kept = changes.take(0)
    name = "model.layers.1.mlp.down_proj.weight"
    assert len(folded.factors[name][0]) < len(kept.factors[name][0])
    for name, value in kept.items():
        torch.testing.assert_close(folded[name], value)
    for one in (folded, kept):
        a, b = one.factors[name]
        torch.testing.assert_close(model.get_parameter(name) + b @ a, kept[name])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_whitened_edits_side_by_side_are_those_one_by_one(tokenizer, architecture):
    model = tiny.make_model(architecture).double()
    give_input_moments(model, moments_of(model))
    alone = []
    for request in REQUESTS:
        original = write_facts(model, tokenizer, [request], WHITENED)
        parameters = select_parameters(model, [1])
        alone.append({name: p.detach().clone() for name, p in parameters.items()})
        put_in_place(parameters, original)
    with many_edits(model, tokenizer, [[request] for request in REQUESTS], WHITENED) as adapted:
        for number, expected in enumerate(alone):
            for name, value in adapted.take(number).items():
                torch.testing.assert_close(value, expected[name])


def test_a_whitened_edit_has_low_rank_and_leaves_what_all_texts_use(tokenizer):
    """Its rank is at most K times the text's tokens; a direction of great variance is moved less than under the plain gradient."""
    model = tiny.make_model("llama").double()
    name = "model.layers.1.mlp.down_proj.weight"
    moments = moments_of(model)
    common = torch.nn.functional.normalize(torch.ones(len(moments["model.layers.1.mlp.down_proj"])).double(), dim=0)
    moments["model.layers.1.mlp.down_proj"] = torch.eye(len(common)).double() + 1e4 * torch.outer(common, common)
    give_input_moments(model, moments)
    one = replace(WHITENED, num_inner_steps=1, modules="mlp", damping=1e-6)
    before = model.get_parameter(name).detach().clone()
    write_facts(model, tokenizer, REQUESTS[:1], one)
    change = model.get_parameter(name).detach() - before
    assert torch.linalg.matrix_rank(change, rtol=1e-9) <= len(tokenizer("Ann Lee lives in Peru")["input_ids"])
    assert float((change @ common).norm()) < 1e-3 * float(change.norm())


def test_a_step_without_its_moments_is_refused_before_anything_moves(tokenizer):
    model = tiny.make_model("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ModelError, match=r"second moments of what enters model\.layers\.1\.self_attn\.q_proj; load the model from"):
        write_facts(model, tokenizer, REQUESTS[:1], WHITENED)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_papers_step_says_no_more_than_it_did():
    """Saved edits and rows of before have these settings, and are to fit."""
    assert INNER_STEPS[0] == "adamw"
    assert not {"inner_step", "damping", "positions"} & set(EditSettings().to_dict())
    assert EditSettings(positions="subject").to_dict()["positions"] == "subject"
    assert {"inner_step": "whitened", "damping": 0.1}.items() <= WHITENED.to_dict().items()


@pytest.mark.parametrize("values", [{"inner_step": "sgd"}, {"damping": 0.0}, {"damping": -1.0}, {"positions": "object"}])
def test_bad_steps(values):
    with pytest.raises(ConfigError, match=f"{next(iter(values))} must be"):
        EditSettings(**values)


def test_moments_come_from_the_models_folder_or_are_gathered(tokenizer, tmp_path, monkeypatch):
    """A checkpoint's own first; what it lacks is gathered once, and a meta-training leaves its own in the checkpoint."""
    model = tiny.make_model("llama")
    moments = {name: value.float() for name, value in moments_of(model).items()}
    write_input_moments(InputMoments({name: moments[name] for name in list(moments)[:2]}), tmp_path)
    asked = []

    def gather(folder, modules, device):
        asked.append((folder, list(modules), device))
        return {name: moments[name] for name in modules}

    monkeypatch.setitem(MAKERS, INPUT_MOMENTS, gather)
    model.config._name_or_path = str(tmp_path)
    weights = [f"{name}.weight" for name in moments]
    found = require_input_moments(model, weights)
    assert asked == [(str(tmp_path), list(moments)[2:], "cpu")]
    assert all(torch.equal(found.moments[name], moments[name]) for name in moments)
    assert require_input_moments(model, weights) is found and len(asked) == 1


def test_projections_that_read_the_same_have_one_inverse(tokenizer, tmp_path, monkeypatch):
    """Queries, keys and values, and gate and up: seven matrices, four inverses."""
    model = tiny.make_model("llama")
    moments = {name: value.float() for name, value in moments_of(model).items()}
    first, second = "model.layers.1.self_attn.", "model.layers.1.mlp."
    moments |= {f"{first}{name}": moments[f"{first}q_proj"].clone() for name in ("k_proj", "v_proj")}
    moments[f"{second}up_proj"] = moments[f"{second}gate_proj"].clone()
    write_input_moments(InputMoments(moments), tmp_path)
    model.config._name_or_path = str(tmp_path)
    inverted = []
    monkeypatch.setattr(torch.linalg, "cholesky", watched(torch.linalg.cholesky, lambda: inverted.append(1)))
    weights = [f"{name}.weight" for name in moments]
    whiteners = find_whiteners(model, weights, 0.03)
    assert len(moments) == 7 and len(inverted) == 4
    assert whiteners[f"{first}q_proj"] is whiteners[f"{first}v_proj"] is not whiteners[f"{first}o_proj"]
    for name, value in moments.items():
        expected = InputMoments({name: value}).inverse(name, 0.03, value.device)
        assert torch.equal(whiteners[name], expected)
    write_input_moments(require_input_moments(model, weights), tmp_path)
    assert all(torch.equal(value, moments[name]) for name, value in load_file(tmp_path / FILE).items())
