"""Every decoder of transformers with a list of blocks: found, edited, undone, asked, and refused where it is none."""

from __future__ import annotations

import architectures
import pytest
import tiny
import torch
from architectures import COMMON, NOT_CAUSAL, OTHERS, REFUSED

from propmeta_edit.edits.compute import compute_edit, edit_many
from propmeta_edit.edits.views import EditedModel, generate_with_edits
from propmeta_edit.errors import ModelError
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.inner_loop import apply_inner_loop
from propmeta_edit.finetune.losses import compute_answer_loss
from propmeta_edit.finetune.prefix import FrozenPrefix
from propmeta_edit.finetune.weights import copies_in_place, only_trainable
from propmeta_edit.models import packed
from propmeta_edit.models.forwards import has_usual_body
from propmeta_edit.models.generation import generate_greedily
from propmeta_edit.models.kept_states import keeps_states
from propmeta_edit.models.layers import (
    ARCHITECTURES,
    architecture_from_config,
    get_architecture,
    get_block_list,
    get_final_norm,
    key_module_name,
    select_parameters,
)
from propmeta_edit.models.layout import find_layout
from propmeta_edit.models.loading import load_model, save_model
from propmeta_edit.records import as_requests
from propmeta_edit.text.encoding import TextEncoder, encode_requests

REQUESTS = [{"prompt": "Ann Lee lives in", "target_new": "Peru"}, {"prompt": "The capital of France is", "target_new": "Lima"}]
PROMPTS = ["Ann Lee lives in", "The capital of France is it", "Smith"]
IDS = torch.tensor([[5, 9, 17, 33, 60]])
ALL = [*COMMON, *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)]


def make(kind, dtype=torch.float32):
    values = {**COMMON, **OTHERS, **REFUSED}[kind]
    try:
        return architectures.make_model(kind, values, dtype)
    except (KeyError, ValueError) as error:
        pytest.skip(f"this transformers has no such {kind}: {error}")


LAYOUTS = {  # blocks, final norm, and the matrices of a layer: attention, MLP, the last of them its output
    "gptj": ("transformer.h", "transformer.ln_f", "attn: k_proj v_proj q_proj out_proj", "mlp: fc_in fc_out"),
    "gpt_neox": (
        "gpt_neox.layers",
        "gpt_neox.final_layer_norm",
        "attention: query_key_value dense",
        "mlp: dense_h_to_4h dense_4h_to_h",
    ),
    "falcon": ("transformer.h", "transformer.ln_f", "self_attention: query_key_value dense", "mlp: dense_h_to_4h dense_4h_to_h"),
    "phi3": ("model.layers", "model.norm", "self_attn: o_proj qkv_proj", "mlp: gate_up_proj down_proj"),
    "olmo2": ("model.layers", "model.norm", "self_attn: q_proj k_proj v_proj o_proj", "mlp: gate_proj up_proj down_proj"),
    "gemma2": ("model.layers", "model.norm", "self_attn: q_proj k_proj v_proj o_proj", "mlp: gate_proj up_proj down_proj"),
    "codegen": ("transformer.h", "transformer.ln_f", "attn: qkv_proj out_proj", "mlp: fc_in fc_out"),
    "gpt_bigcode": ("transformer.h", "transformer.ln_f", "attn: c_attn c_proj", "mlp: c_fc c_proj"),
    "bloom": ("transformer.h", "transformer.ln_f", "self_attention: query_key_value dense", "mlp: dense_h_to_4h dense_4h_to_h"),
    "mpt": ("transformer.blocks", "transformer.norm_f", "attn: Wqkv out_proj", "ffn: up_proj down_proj"),
    "opt": ("model.decoder.layers", "model.decoder.final_layer_norm", "self_attn: k_proj v_proj q_proj out_proj", ": fc1 fc2"),
    "openai-gpt": ("transformer.h", "", "attn: c_attn c_proj", "mlp: c_fc c_proj"),
    "bert": ("bert.encoder.layer", "", "attention.self: query key value", ": intermediate.dense output.dense"),
}


def settings_for(model):
    modules = "attention+mlp" if get_architecture(model).mlp else "attention"
    return EditSettings([1], modules, inner_lr=0.005, num_inner_steps=4)


def say(model, tokenizer, prompt):
    """Greedy text from whole forward passes of the model itself, one prompt at a time."""
    ids, said = TextEncoder(tokenizer, model.config).encode_prompt(prompt), []
    with torch.no_grad():
        while len(said) < 10:
            token = int(model(input_ids=torch.tensor([ids + said]), use_cache=False).logits[0, -1].argmax())
            if token == 0:
                break
            said.append(token)
    return tokenizer.decode(said, skip_special_tokens=True)


def logits_with(model, edit):
    with edit.applied(model), torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("kind", ALL)
def test_an_edit_is_written_undone_and_asked(kind, tokenizer, tmp_path):
    model = make(kind)
    settings = settings_for(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    edits = [compute_edit(model, tokenizer, request, settings) for request in REQUESTS]
    [batch] = encode_requests(TextEncoder(tokenizer, model.config), [as_requests(REQUESTS[:1])])
    with torch.no_grad():
        at_first = compute_answer_loss(model, batch)
        texts, positions = batch.scored
        own = model(input_ids=batch.input_ids, use_cache=False).logits[texts, positions - 1]
        expected = torch.nn.functional.cross_entropy(own.float(), batch.labels[texts, positions])
        torch.testing.assert_close(at_first[0], expected, rtol=1e-4, atol=1e-5)
        with edits[0].applied(model):
            assert compute_answer_loss(model, batch) < at_first - 0.05
            said = [say(model, tokenizer, prompt) for prompt in PROMPTS]
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    for one, together in zip(edits, edit_many(model, tokenizer, REQUESTS, settings), strict=True):
        expected = logits_with(model, one)
        # AdamW makes whole steps of gradients that are nothing but rounding; what the model says hardly depends on those.
        torch.testing.assert_close(logits_with(model, together), expected, rtol=0, atol=2e-3 * float(expected.abs().max()))
    assert EditedModel(model, edits[0]).answer(tokenizer, PROMPTS) == said
    assert EditedModel(model, edits[0]).through(generate_greedily, tokenizer, PROMPTS, together=len(PROMPTS)) == said
    assert generate_with_edits(model, tokenizer, PROMPTS, [edits[0], None, edits[0]])[::2] == said[::2]
    save_model(model, tokenizer, tmp_path / "saved", select_parameters(model, [1], settings.modules))
    loaded, _ = load_model(str(tmp_path / "saved"), dtype="bfloat16", layers=[1], modules=settings.modules)
    assert compute_edit(loaded, tokenizer, REQUESTS[0], settings).weights.keys() == edits[0].weights.keys()


@pytest.mark.parametrize("kind", ALL)
def test_packed_products_and_skipped_layers_change_rounding_alone(kind, tokenizer, monkeypatch):
    model = make(kind)
    settings = settings_for(model)
    target = encode_requests(TextEncoder(tokenizer, model.config), [as_requests(REQUESTS[:1])])
    parameters = select_parameters(model, [1], settings.modules)
    monkeypatch.setattr(packed, "SMALLEST", 1)
    with copies_in_place(model, parameters) as copies, only_trainable(model, copies):
        losses = torch.stack(apply_inner_loop(model, copies, target, settings))
    monkeypatch.setattr(packed, "SMALLEST", 10**9)
    for module in ("finetune.prefix", "models.forwards", "models.kept_states"):
        monkeypatch.setattr(f"propmeta_edit.{module}.agrees", lambda *_: False)
    with copies_in_place(model, parameters) as copies, only_trainable(model, copies):
        assert FrozenPrefix(model, copies).compute_states(target[0]) is None
        plainly = torch.stack(apply_inner_loop(model, copies, target, settings))
    torch.testing.assert_close(losses, plainly, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_where_a_decoder_keeps_its_parts(kind):
    model = make(kind)
    blocks, final_norm, *parts = LAYOUTS[kind]
    found = get_architecture(model)
    assert (found.blocks, found.final_norm) == (blocks, final_norm)
    for modules, part in zip(("attention", "mlp"), parts, strict=True):
        holder, _, names = part.partition(": ")
        wanted = [".".join(filter(None, (blocks, "1", holder.strip(": "), name))) for name in names.split()]
        weights = [n.removesuffix(".weight") for n in select_parameters(model, [1], modules) if n.endswith(".weight")]
        assert weights == wanted or (kind == "bert" and set(wanted) < set(weights))
    assert key_module_name(found, 1) == wanted[-1]
    norm = get_final_norm(model)
    assert isinstance(norm, torch.nn.Identity) if not final_norm else norm is model.get_submodule(final_norm)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma3_text"])
def test_what_is_known_by_name_is_what_is_found(kind):
    model = make(kind)
    assert find_layout(model) == ARCHITECTURES[kind] == architecture_from_config(model.config)


@pytest.mark.parametrize("kind", ["gptj", "opt", "mixtral"])
def test_a_configuration_is_enough(kind):
    model = make(kind)
    assert architecture_from_config(model.config) == get_architecture(model)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_list_of_attention_and_mlp_is_refused(kind, tokenizer):
    model = make(kind)
    with pytest.raises(ModelError, match=f"architecture '{kind}' is not supported; supported are decoders"):
        compute_edit(model, tokenizer, REQUESTS[0], EditSettings([1]))


@pytest.mark.parametrize("kind", NOT_CAUSAL)
def test_what_looks_ahead_is_refused(kind, tokenizer):
    model = architectures.make_model(kind, NOT_CAUSAL[kind])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for call in (compute_edit, lambda *a: edit_many(a[0], a[1], [a[2]], a[3])):
        with pytest.raises(ModelError, match=f"this {kind} model is not causal.*is_decoder"):
            call(model, tokenizer, REQUESTS[0], EditSettings([1]))
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_are_not_edited(kind, tokenizer):
    model = make(kind)
    with pytest.raises(ModelError, match="mixtures of experts, which cannot be edited; set modules to attention"):
        compute_edit(model, tokenizer, REQUESTS[0], EditSettings([1]))
    with pytest.raises(ModelError, match="mixtures of experts, whose keys cannot be taken"):
        key_module_name(get_architecture(model), 1)


def test_shortcuts_are_taken_where_they_are_right():
    """A change here is one of speed: the tests above hold that nothing else depends on it."""
    usual = {kind: (has_usual_body(model), keeps_states(model)) for kind in COMMON if (model := make(kind))}
    assert {kind for kind, (body, _) in usual.items() if not body} == {"bert"}
    assert {kind for kind, (_, kept) in usual.items() if not kept} == {"bert", "bloom", "openai-gpt"}


def test_a_shortcut_that_is_wrong_is_not_taken(tokenizer, monkeypatch):
    """As with a decoder that does something to its embeddings that none does today."""
    model = make("gptj")
    with torch.no_grad():
        expected = [say(model, tokenizer, prompt) for prompt in PROMPTS]
    monkeypatch.setattr("propmeta_edit.models.forwards.compute_hidden_states", lambda *_: torch.zeros(2, 6, 32))
    monkeypatch.setattr("propmeta_edit.models.kept_states.compute_logits", lambda *_: torch.zeros(2, 300))
    assert not has_usual_body(model) and not keeps_states(model)
    assert EditedModel(model).answer(tokenizer, PROMPTS) == expected
    edit = compute_edit(model, tokenizer, REQUESTS[0], settings_for(model))
    with edit.applied(model):
        assert EditedModel(model).answer(tokenizer, PROMPTS) == [say(model, tokenizer, prompt) for prompt in PROMPTS] != expected


def test_beyond_a_window_nothing_is_kept():
    model = make("phi3")
    model.config.sliding_window = 40
    assert keeps_states(model, 40) and not keeps_states(model, 41)
    assert keeps_states(tiny.make_model("gemma3_text"), 10**6), "windows of those known by name are right"


@pytest.mark.parametrize("kind", ["gptj", "bloom", "codegen"])
def test_blocks_are_back_in_their_list_whatever_happens(kind, tokenizer, monkeypatch):
    model = make(kind)
    blocks = list(get_block_list(model))

    def fails(*_):
        raise RuntimeError("broken")

    for place in ("finetune.inner_loop.compute_answer_loss", "finetune.prefix.run_to_the_head"):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="broken"):
            patch.setattr(f"propmeta_edit.{place}", fails)
            patch.setattr("propmeta_edit.finetune.prefix.agrees", lambda *_: True)
            compute_edit(model, tokenizer, REQUESTS[0], settings_for(model))
        assert list(get_block_list(model)) == blocks and not any(block._forward_hooks for block in blocks)
