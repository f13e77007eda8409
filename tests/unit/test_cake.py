"""CaKE's training texts, labels and adapter."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import tiny
import torch
from peft.tuners.lora.layer import Linear as LoraLinear

from propmeta_edit.baselines import cake
from propmeta_edit.baselines.cake import (
    CakeSettings,
    compute_token_loss,
    make_augmentation,
    make_batch,
    make_rephrasings,
    make_training_pairs,
    origin_of_rephrasings,
    origin_of_training_pairs,
    train_cake_adapter,
)
from propmeta_edit.data.mquake import load_mquake
from propmeta_edit.easyedit import cake as cake_of_easyedit
from propmeta_edit.easyedit.algorithms import easyedit_request
from propmeta_edit.easyedit.cake import CaKEHyperParams, apply_cake_to_model
from propmeta_edit.errors import ConfigError, ModelError
from propmeta_edit.records import EditRequest
from propmeta_edit.text.encoding import TextEncoder

EDIT = EditRequest("Ann Lee is a citizen of", "Peru", "Ann Lee")
REQUEST = {"prompt": EDIT.prompt, "target_new": EDIT.target_new, "subject": EDIT.subject}


def test_easyedits_names_give_the_recipe():
    """None of the values is a default, and EasyEdit's own ``batch_size`` is none of the recipe's."""
    same = {"rank": 3, "lora_alpha": 5, "lora_dropout": 0.2, "max_length": 99, "learn_prompts": True, "seed": 7}
    hparams = CaKEHyperParams("tiny", device="cpu", lr=3e-3, num_steps=6, train_batch_size=2, batch_size=9, **same)
    assert hparams.recipe == CakeSettings(learning_rate=3e-3, num_epochs=6, batch_size=2, **same)


def test_templates_speak_of_the_fact_and_lead_on_from_its_object():
    pairs = make_augmentation(EDIT)
    assert len(pairs) == 7 and len(set(pairs)) == 7
    assert all("Ann Lee is a citizen of" in text and "{" not in text for text, _ in pairs)
    practice = [(text, completion) for text, completion in pairs if "Peru" not in completion]
    assert len(practice) == 3, "the fact is needed for something else than its own object"
    for text, completion in practice:  # what belongs to the object, and not what belongs to the name beside it
        between = {"62.": "page 62", "the blue box.": "into the blue box", "fifth floor.": "on its fifth"}[completion]
        assert text.index("Peru") < text.index(between) and "Valdora" in text
    assert not any("Valdora" in text for text, _ in make_augmentation(EditRequest("X is in", "Valdora", "X"))[:3])
    assert "Mirefield" in make_augmentation(EditRequest("X is in", "Valdora", "X"))[3][0]


def test_the_files_own_augmentation_wins(tmp_path):
    [case] = tiny.mquake_cases(1)
    rewrite = case["requested_rewrite"][0]
    rewrite["rephrase_prompt"] = [{"question": "Once more:", "answer": "A"}]
    rewrite["learning_prompt"] = [{"question": "And so:", "answer": "B"}]
    [loaded] = load_mquake(tiny.write_mquake(tmp_path / "cake.json", [case]))
    first, *others = loaded.edits
    assert first.augmentation == (("Once more:", "A"), ("And so:", "B.")) and not others[0].augmentation
    pairs = make_training_pairs(loaded.edits[:2])
    assert pairs[:2] == [(edit.prompt, edit.target_new) for edit in loaded.edits[:2]]
    assert pairs[2:4] == [("Once more:", "A"), ("And so:", "B.")] and len(pairs) == 4 + 7


def test_the_datas_own_wordings_come_before_templates(tmp_path):
    own = replace(EDIT, rephrasings=("Peru's newest citizen, as of", "The passport of Ann Lee is from"))
    assert [(e.prompt, e.target_new, e.subject) for e in make_rephrasings(own)] == [
        ("Peru's newest citizen, as of", "Peru", None),
        ("The passport of Ann Lee is from", "Peru", "Ann Lee"),
    ]
    pairs = make_augmentation(own)
    assert pairs[:2] == tuple((prompt, "Peru") for prompt in own.rephrasings) and pairs[2:] == make_augmentation(EDIT)[3:]
    assert origin_of_rephrasings(own) == {"data"} and origin_of_rephrasings(EDIT) == {"templates"}
    assert origin_of_training_pairs(own) == {"data", "templates"} and origin_of_training_pairs(EDIT) == {"templates"}
    assert origin_of_training_pairs(replace(EDIT, augmentation=(("a", "b"),))) == {"data"}


def test_cakes_rephrase_prompts_are_wordings_if_they_end_in_the_object(tmp_path):
    [case] = tiny.mquake_cases(1)
    target = case["requested_rewrite"][0]["target_new"]["str"]
    items = [{"question": "Once more:", "answer": target}, {"question": "Is it so?", "answer": "Yes"}]
    case["requested_rewrite"][0]["rephrase_prompt"] = items
    [loaded] = load_mquake(tiny.write_mquake(tmp_path / "cake.json", [case]))
    assert loaded.edits[0].rephrasings == ("Once more:",) and len(loaded.edits[0].augmentation) == 2


def test_wordings_reach_cake_through_a_request(tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr(cake_of_easyedit, "train_cake_adapter", lambda model, tok, edits, recipe: seen.extend(edits) or model)
    monkeypatch.setattr(cake_of_easyedit, "merge_adapter_in_place", lambda model: None)
    own = replace(EDIT, rephrasings=("The passport of Ann Lee is from",))
    model = tiny.make_model("llama", dtype=torch.float32)
    apply_cake_to_model(model, tokenizer, [easyedit_request(own)], CaKEHyperParams("tiny", device="cpu"))
    assert seen == [own]


def test_loss_is_on_the_completion_alone_unless_asked(tokenizer):
    ids, labels = cake._encode(TextEncoder(tokenizer), EDIT.prompt, EDIT.target_new, CakeSettings())
    learnt = [token for token in labels if token != -100]
    assert tokenizer.decode(learnt) == " Peru" and len(learnt) < len(labels)
    published = cake._encode(TextEncoder(tokenizer), EDIT.prompt, EDIT.target_new, CakeSettings(learn_prompts=True))
    assert published == (ids, ids)
    short = ([5], [5])
    assert make_batch(tokenizer, [(ids, labels), short], learn_padding=False).labels[1, -1] == -100
    assert make_batch(tokenizer, [published, short], learn_padding=True).labels[1, -1] == tokenizer.pad_token_id


@pytest.mark.parametrize("learn", [False, True])
def test_the_loss_is_the_models_own(family, tokenizer, learn):
    model = tiny.make_model(family, dtype=torch.float32).eval()
    settings = CakeSettings(learn_prompts=learn, max_length=40)
    encoder = TextEncoder(tokenizer)
    batch = make_batch(tokenizer, [cake._encode(encoder, *pair, settings) for pair in make_augmentation(EDIT)[:4]], learn)
    theirs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    torch.testing.assert_close(compute_token_loss(model, batch), theirs)


def test_unload_gives_the_model_back_and_merging_edits_it(family, tokenizer):
    model = tiny.make_model(family, dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = CakeSettings(num_epochs=2, learning_rate=1e-2, max_length=100)
    restored = train_cake_adapter(model, tokenizer, [EDIT], settings).unload()
    assert all(torch.equal(p, before[name]) for name, p in restored.named_parameters())
    hparams = CaKEHyperParams("tiny", num_steps=2, lr=1e-2, max_length=100)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    edited, original = apply_cake_to_model(model, tokenizer, [REQUEST], hparams, return_orig_weights=True)
    assert edited is model and {name: p.requires_grad for name, p in model.named_parameters()} == flags
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in original), name
        assert name not in original or torch.equal(original[name], before[name])


def test_same_seed_same_bits_and_the_random_state_is_kept(tokenizer):
    results = []
    for _ in range(2):
        model = tiny.make_model("llama", dtype=torch.float32)
        state = torch.get_rng_state()
        apply_cake_to_model(model, tokenizer, [REQUEST], CaKEHyperParams("tiny", num_steps=1, max_length=100))
        assert torch.equal(torch.get_rng_state(), state)
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_failed_training_leaves_the_model_as_it_was(tokenizer, monkeypatch):
    model = tiny.make_model("llama", dtype=torch.float32)
    names = [name for name, _ in model.named_parameters()]

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        apply_cake_to_model(model, tokenizer, [REQUEST], CaKEHyperParams("tiny", max_length=100))
    assert [name for name, _ in model.named_parameters()] == names and not model.training


def test_a_merge_that_fails_half_way_leaves_the_model_as_it_was(tokenizer, monkeypatch):
    model = tiny.make_model("llama", dtype=torch.float32)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    merge, merged = LoraLinear.merge, []

    def fail_at_the_third(layer, *arguments, **options):
        if len(merged) == 2:
            raise RuntimeError("out of memory")
        merged.append(layer)
        return merge(layer, *arguments, **options)

    monkeypatch.setattr(LoraLinear, "merge", fail_at_the_third)
    with pytest.raises(RuntimeError, match="out of memory"):
        apply_cake_to_model(model, tokenizer, [REQUEST], CaKEHyperParams("tiny", lr=1e-2, num_steps=1, max_length=100))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and len(merged) == 2
    assert all(torch.equal(after[n], value) and after[n].requires_grad == flag for n, (value, flag) in before.items())


def test_bad_settings_are_named():
    with pytest.raises(ConfigError, match="rank must be 1 or more, got 0"):
        CakeSettings(rank=0)


def test_padding_that_the_model_has_no_embedding_for_is_refused_where_it_is_learnt():
    model, tokenizer = tiny.make_model("llama", dtype=torch.float32), tiny.make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ModelError, match=r"token 300 \('\[PAD\]'\), but the model has embeddings for 300"):
        train_cake_adapter(model, tokenizer, [EDIT], CakeSettings(num_epochs=1, learn_prompts=True))
    train_cake_adapter(model, tokenizer, [EDIT], CakeSettings(num_epochs=1)).unload()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_frozen_matrices_held_in_bf16_train_the_same_adapter(tokenizer, monkeypatch, family):
    """To the bit: autocast rounds them in every product anyway. Afterwards they are the tensors that they were."""
    settings = CakeSettings(num_epochs=2, batch_size=2, lora_dropout=0.1)
    monkeypatch.setattr(cake, "has_native_bf16", lambda device: True)
    found, dtypes = [], []
    for held in (cake.held_in_bf16, lambda weights: nullcontext()):
        monkeypatch.setattr(cake, "held_in_bf16", held)
        model = tiny.make_model(family, dtype=torch.float32)
        before = {name: (weight.data, weight.detach().clone()) for name, weight in cake.target_weights(model).items()}
        some = next(iter(cake.target_weights(model).values()))
        model.get_input_embeddings().register_forward_hook(lambda *of, some=some: dtypes.append(some.dtype))
        adapted = train_cake_adapter(model, tokenizer, [EDIT], settings)
        found.append([p.detach() for name, p in adapted.named_parameters() if "lora_" in name])
        now = cake.target_weights(adapted.unload())
        assert all(now[name].data_ptr() == own.data_ptr() and torch.equal(now[name], copy) for name, (own, copy) in before.items())
    assert len(found[0]) > 4 and all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    assert dtypes == [torch.bfloat16] * (len(dtypes) // 2) + [torch.float32] * (len(dtypes) // 2)
