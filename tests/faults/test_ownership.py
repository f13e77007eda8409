"""Every surrounding of a model and state of torch by every kind of call: the plain edit or one error, and the model's bits."""

from __future__ import annotations

import importlib
import random
import sys
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import surroundings
import tiny
import torch

import propmeta_edit
from propmeta_edit import MetaFTHyperParams, apply_metaft_to_model
from propmeta_edit.edits.compute import compute_edit, edit_many
from propmeta_edit.edits.edit import standing_edits
from propmeta_edit.edits.views import EditedModel, generate_with_edits
from propmeta_edit.errors import ModelError
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.single_edit import put_in_place
from propmeta_edit.models.ownership import locked
from propmeta_edit.models.wrappers import require_whole

SETTINGS = EditSettings([1], inner_lr=0.02, num_inner_steps=3)
HPARAMS = MetaFTHyperParams(model_name="tiny", device="cpu", layers=[1], lr=0.02, num_steps=3)
REQUESTS = [
    {"prompt": "Ann Lee lives in", "target_new": "Peru"},
    {"prompt": "The capital of France is", "target_new": "Lima"},
]
PROMPTS = ["Ann Lee lives in", "The capital of France is", "Smith"]


def one_edit(model, tokenizer, given):
    return [compute_edit(model, tokenizer, REQUESTS[0], SETTINGS).weights]


def several_facts(model, tokenizer, given):
    return [compute_edit(model, tokenizer, REQUESTS, SETTINGS).weights]


def many_edits(model, tokenizer, given):
    return [edit.weights for edit in edit_many(model, tokenizer, REQUESTS, SETTINGS)]


def applied(model, tokenizer, given):
    with given(model).applied(model):
        return [standing_weights(model)]


def apply_and_undo(model, tokenizer, given):
    edit = given(model)
    edit.apply(model)
    found = standing_weights(model)
    edit.undo(model)
    return [found]


def view(model, tokenizer, given):
    return EditedModel(model, given(model)).answer(tokenizer, PROMPTS)


def rows_with_edits(model, tokenizer, given):
    edit = given(model)
    return generate_with_edits(model, tokenizer, PROMPTS, [edit, None, edit])


def metaft(model, tokenizer, given):
    _, before = apply_metaft_to_model(model, tokenizer, [REQUESTS[0]], HPARAMS, return_orig_weights=True)
    found = standing_weights(model)
    parameters = plainly_named(model)
    with torch.no_grad():
        for name, value in before.items():
            parameters[name].copy_(value)
    return [found]


COMPUTING = [one_edit, several_facts, many_edits, metaft]
CALLS = [one_edit, several_facts, many_edits, applied, apply_and_undo, view, rows_with_edits, metaft]


def plainly_named(model):
    """Parameters by the name they have in the plain model."""
    return {name.replace("_orig_mod.", "").replace("module.", ""): p for name, p in model.named_parameters()}


def standing_weights(model):
    return {name: p.detach().clone() for name, p in plainly_named(model).items() if name.startswith("model.layers.1.")}


def everything(*models):
    """All that a call must leave as it was: tensors with their bits, flags and gradients, and the modes of modules."""
    found = {}
    for model in models:
        if not isinstance(model, torch.nn.Module):
            continue
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            bits = None if value.is_meta else value.detach().clone()
            grad = None if value.grad is None else value.grad.detach().clone()
            found[name, id(model)] = (id(value), bits, value.requires_grad, grad)
        found |= {(name, id(module)): module.training for name, module in model.named_modules()}
    return found


def assert_same_state(before, after):
    assert before.keys() == after.keys()
    for key, was in before.items():
        now = after[key]
        if isinstance(was, bool):
            assert was == now, f"mode of {key}"
            continue
        assert was[0] == now[0] and was[2] == now[2], f"{key} is another tensor, or its flag another"
        for one, other in ((was[1], now[1]), (was[3], now[3])):
            assert (one is None) == (other is None) and (one is None or torch.equal(one, other)), key


def make_model():
    return tiny.make_model("llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def references(tokenizer):
    """What each call gives on a plain model."""
    found = {}

    def get(name, call):
        change = surroundings.KINDS[name].reference
        key = ("plain" if change is surroundings.Kind().reference else name, call.__name__)
        if key not in found:
            model = change(make_model())
            found[key] = call(model, tokenizer, lambda model: compute_edit(model, tokenizer, REQUESTS[0], SETTINGS))
        return found[key]

    return get


@pytest.fixture(scope="module")
def edit_of_plain(tokenizer):
    """Made on another model of the same weights, so that it is none of any model's own."""
    return compute_edit(make_model(), tokenizer, REQUESTS[0], SETTINGS)


def assert_same_results(expected, found):
    assert len(expected) == len(found)
    for one, other in zip(expected, found, strict=True):
        if isinstance(one, str):
            assert one == other
            continue
        for name in expected[0]:
            if name in other:  # a frozen tensor of a changed module has another name
                torch.testing.assert_close(other[name], one[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
@pytest.mark.parametrize("name", surroundings.KINDS)
def test_the_plain_edit_or_one_error_and_the_same_bits(name, call, tokenizer, references, edit_of_plain):
    kind, plain = surroundings.KINDS[name], make_model()
    expected = None if kind.refused else references(name, call)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with kind.state():
            model = kind.change(plain)
            before = everything(plain, model)
            if kind.refused is None:
                found = call(model, tokenizer, lambda model: compute_edit(model, tokenizer, REQUESTS[0], SETTINGS))
                assert_same_results(expected, found)
                assert standing_edits(plain) == []
            else:
                # An edit of the plain model may be refused for what it finds: other tensors, or none of its names.
                reason = kind.refused if call in COMPUTING else f"{kind.refused}|made on other weights|does not fit this model"
                with pytest.raises(ModelError, match=reason):
                    call(model, tokenizer, lambda model: edit_of_plain)
            assert_same_state(before, everything(plain, model))


def views_in_threads(model, tokenizer, num_threads):
    """What the views of different edits, and plain calls between them, say when they are asked from several threads at once."""
    targets = ["Peru", "Lima", "Spanish"][:num_threads]
    edits = [compute_edit(model, tokenizer, {**REQUESTS[0], "target_new": target}, SETTINGS) for target in targets]
    expected = [EditedModel(model, edit).answer(tokenizer, PROMPTS) for edit in edits]
    assert len({tuple(texts) for texts in expected}) == num_threads, "each edit is to be heard"
    start, found, errors = threading.Barrier(num_threads), [[] for _ in edits], []

    def ask(number):
        start.wait()
        try:
            for _ in range(15):
                found[number].append(EditedModel(model, edits[number]).answer(tokenizer, PROMPTS))
                compute_edit(model, tokenizer, REQUESTS[1], SETTINGS)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return expected, found, errors


def test_views_in_three_threads_take_turns(tokenizer):
    model = make_model()
    before = everything(model)
    expected, found, errors = views_in_threads(model, tokenizer, 3)
    assert errors == [] and standing_edits(model) == []
    assert found == [[own] * 15 for own in expected]
    assert_same_state(before, everything(model))


def test_an_applied_edit_keeps_other_threads_waiting(tokenizer, monkeypatch, caplog):
    monkeypatch.setattr("propmeta_edit.models.ownership.PATIENCE", 0.05)
    model, answers = make_model(), []
    edit = compute_edit(model, tokenizer, REQUESTS[0], SETTINGS)
    plain = EditedModel(model).answer(tokenizer, PROMPTS)
    thread = threading.Thread(target=lambda: answers.append(EditedModel(model).answer(tokenizer, PROMPTS)))
    with edit.applied(model):
        thread.start()
        thread.join(timeout=0.3)
        assert thread.is_alive() and answers == []
        assert EditedModel(model).answer(tokenizer, PROMPTS) != plain, "the thread that has it may ask"
    thread.join()
    assert answers == [plain] and "another thread has had this model" in caplog.text


class Broken(BaseException):
    """What no handler of ours can know."""


FAULTS = {  # where it goes wrong, and in which call from the first on
    "a step of the loop": ("propmeta_edit.finetune.inner_loop.compute_answer_loss", 2),
    "the first step of the loop": ("propmeta_edit.finetune.inner_loop.compute_answer_loss", 1),
    "the look at what came out": ("propmeta_edit.finetune.single_edit.require_finite", 1),
    "putting tensors in place": ("propmeta_edit.edits.edit.put_in_place", 1),
    "putting them back": ("propmeta_edit.edits.edit.put_in_place", 2),
    "the last fingerprint": ("propmeta_edit.edits.edit.take_fingerprint", 7),
    "fingerprints of what stands": ("propmeta_edit.edits.edit.take_fingerprints", 1),
    "the base": ("propmeta_edit.edits.edit.take_base", 1),
    "a forward pass": ("propmeta_edit.models.kept_states.compute_logits", 3),
}


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_goes_wrong_the_model_comes_back(fault, call, tokenizer, monkeypatch):
    model = make_model()
    edit = compute_edit(model, tokenizer, REQUESTS[0], SETTINGS)
    before, calls = everything(model), []
    place, number = FAULTS[fault]
    module, _, name = place.rpartition(".")
    right = getattr(importlib.import_module(module), name)

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise Broken
        return right(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(place, fails)
        with suppress(Broken):
            call(model, tokenizer, lambda model: edit)
    for standing in standing_edits(model):  # taking it out is what failed: it stands whole, and can be taken out
        assert all(torch.equal(model.get_parameter(name), value) for name, value in standing.weights.items())
        standing.undo(model)
    assert_same_state(before, everything(model))
    assert_same_results(call(make_model(), tokenizer, lambda _: edit), call(model, tokenizer, lambda _: edit))


def test_several_devices_that_nothing_connects_are_refused():
    here = torch.nn.Parameter(torch.zeros(2))
    there = SimpleNamespace(device="cuda:1", data=here.data, is_floating_point=lambda: True, is_inference=lambda: False)
    model = SimpleNamespace(named_modules=lambda: [], named_parameters=lambda: [("a", here), ("b", there)])
    with pytest.raises(ModelError, match=r"spread over several devices \(a on cpu, b on cuda:1\).*device_map='auto'"):
        require_whole(model)
    model.hf_device_map = {"a": "cpu", "b": 1}  # transformers spread it, and accelerate brings its states from one to the other
    require_whole(model)


def interrupt(call, line):
    """Run a call until so many lines of this package have run, and no further; returns how many there were."""
    folder, lines = str(Path(propmeta_edit.__file__).parent), 0

    def of_a_line(frame, event, argument):
        nonlocal lines
        lines += event == "line"
        if event == "line" and lines == line:
            raise Broken
        return of_a_line

    before = sys.gettrace()
    sys.settrace(lambda frame, event, argument: of_a_line if frame.f_code.co_filename.startswith(folder) else None)
    try:
        with suppress(Broken):
            call()
    finally:
        sys.settrace(before)
    return lines


def test_an_interruption_while_a_model_is_taken_stops_no_other_models_calls():
    """At every line on the way in and out; what waits for ever is seen by its being there still."""

    def take(model):
        with locked(model):
            pass

    model = make_model()
    number = interrupt(lambda: take(model), line=-1)
    assert number >= 5, "as many lines as it has"
    for line in range(1, number + 1):
        interrupt(lambda: take(model), line)
        another = threading.Thread(target=take, args=(make_model(),), daemon=True)
        another.start()
        another.join(timeout=30)
        assert not another.is_alive(), line


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_an_interruption_at_any_line_leaves_all_or_nothing(call, tokenizer):
    """As Ctrl-C may come anywhere, also while something is put back."""
    model = make_model()
    edit = compute_edit(model, tokenizer, REQUESTS[0], SETTINGS)
    before = everything(model)
    number = interrupt(lambda: call(model, tokenizer, lambda _: edit), line=-1)
    for line in sorted(random.Random(0).sample(range(1, number), 25)):
        original = {name: p.data for name, p in model.named_parameters()}
        interrupt(lambda: call(model, tokenizer, lambda _: edit), line)
        for standing in standing_edits(model):
            assert call is apply_and_undo, "what a context or a view applies, it takes out"
            assert all(torch.equal(model.get_parameter(name), value) for name, value in standing.weights.items())
            standing.undo(model)
        if call is metaft:  # what it writes into the model stays; this one is either there or not
            moved = [name for name, value in original.items() if not torch.equal(model.get_parameter(name), value)]
            assert len(moved) in (0, 7), line
            put_in_place(dict(model.named_parameters()), original)
        assert_same_state(before, everything(model))
