"""Edits tiny models through ``BaseEditor`` and reports, per family, method and way of calling, what became of the weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from propmeta_edit.easyedit import find_form, load_easyedit, register_algorithm
from propmeta_edit.errors import PropMetaError

PROMPTS = ["The capital of France is", "Ann Lee is a citizen of", "Smith Innovation PLC was founded in"]
TARGETS = ["Lima", "Greece", "Peru"]
SUBJECTS = ["France", "Ann Lee", "Smith Innovation PLC"]
LOCALITY = {"other": {"prompt": ["The answer is"] * 3, "ground_truth": ["euro"] * 3}}
SOME_LOCALITY = {"other": {"prompt": ["The answer is", None, "It is"], "ground_truth": ["euro", None, "euro"]}}
EDITED = {"gpt2": "transformer.h.1.mlp.c_proj", "llama": "model.layers.1.mlp.down_proj"}
SEEN: list[list[dict]] = []


class Unpacked(str):
    """A model name that loads by itself, as EasyEdit unpacks whatever is no plain ``str``."""

    def __iter__(self):
        tokenizer = AutoTokenizer.from_pretrained(str(self))
        tokenizer.padding_side = "left"
        yield from (AutoModelForCausalLM.from_pretrained(str(self)), tokenizer)


def apply_shift(model, tok, requests, hparams, copy=False, return_orig_weights=False, **_):
    """Adds a half to one weight matrix, whatever is asked."""
    SEEN.append([dict(request) for request in requests])
    parameter = model.get_parameter(hparams.name)
    original = parameter.detach().clone()
    with torch.no_grad():
        parameter.add_(0.5)
    return model, {hparams.name: original} if return_orig_weights else {}


def weights(editor):
    return {name: value.detach().clone() for name, value in editor.model.state_dict().items()}


def changed(before, after):
    assert before.keys() == after.keys()
    return sorted(name for name in before if not torch.equal(before[name], after[name]))


def attempt(editor, call):
    """What one call did: metrics, changed weights, and how many returned originals differ from the weights before it."""
    before = weights(editor)
    try:
        metrics, _, originals = call()
    except PropMetaError as error:
        return {"error": str(error), "changed": changed(before, weights(editor))}
    result = {
        "changed": changed(before, weights(editor)),
        "originals": sorted(originals),
        "originals_moved": sum(not torch.equal(value, before[name]) for name, value in originals.items()),
        "pre": [metric["pre"]["rewrite_acc"] for metric in metrics],
        "post": [metric["post"]["rewrite_acc"] for metric in metrics],
        "locality": ["other_acc" in metric["post"]["locality"] for metric in metrics],
    }
    editor.model.load_state_dict(before)
    return result


def try_ways(editor):
    """Every way of calling, from the same weights."""
    facts = {"prompts": PROMPTS, "target_new": TARGETS, "subject": SUBJECTS, "verbose": False}
    facts_only = [{"prompt": p, "target_new": t, "ground_truth": "x"} for p, t in zip(PROMPTS[:2], TARGETS, strict=False)]
    batch = {**facts, "locality_inputs": LOCALITY}
    editor.hparams.batch_size = 1
    report = {
        "edit": attempt(editor, lambda: editor.edit(**facts, locality_inputs=LOCALITY)),
        "edit_sequential": attempt(editor, lambda: editor.edit(**facts, sequential_edit=True)),
        "edit_requests": attempt(editor, lambda: editor.edit_requests(facts_only, verbose=False)),
    }
    editor.hparams.batch_size = 2
    report["batch"] = attempt(editor, lambda: editor.batch_edit(**batch))
    report["batch_sequential"] = attempt(editor, lambda: editor.batch_edit(**batch, sequential_edit=True))
    return report


def make_ft(easyeditor, name, family):
    module = EDITED[family].replace(".1.", ".{}.")
    settings = {"layers": [1], "num_steps": 4, "lr": 0.05, "weight_decay": 0, "kl_factor": 0, "norm_constraint": False}
    templates = ("layer_module_tmp", "mlp_module_tmp", "attn_module_tmp", "ln_f_module", "lm_head_module")
    settings |= {"rewrite_module_tmp": module, **dict.fromkeys(templates, "")}
    if find_form().kind == "repository":
        settings["objective_optimization"] = "target_new"
    return easyeditor.FTHyperParams(**settings, device="cpu", alg_name="FT", model_name=name, batch_size=1)


def try_wheel_only(easyeditor, editor):
    """What the PyPI form alone has, or would ignore."""
    facts = {"prompts": PROMPTS, "target_new": TARGETS, "verbose": False}
    record = {"loc": "nq question: who", "loc_ans": "euro", "answers": ["euro"], "rephrase": "It is"}
    records = [{**record, "src": prompt, "alt": target} for prompt, target in zip(PROMPTS, TARGETS, strict=True)]
    Path("zsre.json").write_text(json.dumps(records))
    data = easyeditor.ZsreDataset("zsre.json")
    editor.hparams.batch_size = 2
    report = {
        "unknown": attempt(editor, lambda: editor.edit(**facts, loc_prompts=["a"] * 3, target_neg=None)),
        "unknown_batch": attempt(editor, lambda: editor.batch_edit(**facts, locality_prompts=["a"] * 3)),
        "requests": attempt(editor, lambda: editor.edit(requests=[{"prompt": "It is", "target_new": "a", "ground_truth": "b"}])),
        "contradiction": attempt(editor, lambda: editor.edit(**facts, sequential_edit=True, keep_original_weight=True)),
        "wheel_keeps": attempt(editor, lambda: editor.edit(**facts, keep_original_weight=False)),
        "wheel_keeps_batch": attempt(editor, lambda: editor.batch_edit(**facts, keep_original_weight=False)),
        "undone_batch": attempt(editor, lambda: editor.batch_edit(**facts, keep_original_weight=True)),
        "some_locality": attempt(editor, lambda: editor.edit(**facts, locality_inputs=SOME_LOCALITY)),
    }
    report["batch_size"] = editor.hparams.batch_size
    SEEN.clear()
    before = weights(editor)
    metrics, _, _ = editor.edit_dataset(data, verbose=False)
    report["data_set"] = {
        "changed": changed(before, weights(editor)),
        "case_ids": [metric["case_id"] for metric in metrics],
        "chunks": [[request["prompt"] for request in requests] for requests in SEEN],
    }
    return report


def try_lora(easyeditor, name):
    settings = {"layers": [], "num_steps": 2, "lr": 0.01, "weight_decay": 0, "kl_factor": 0, "norm_constraint": 0}
    settings |= {"target_modules": ["q_proj"], "rank": 2, "lora_alpha": 4, "lora_dropout": 0.0}
    hparams = easyeditor.LoRAHyperParams(**settings, device="cpu", alg_name="LoRA", model_name=name, batch_size=1)
    editor = easyeditor.BaseEditor.from_hparams(hparams)
    before = weights(editor)
    metrics, _, _ = editor.edit(PROMPTS[:2], TARGETS[:2], verbose=False)
    error = attempt(editor, lambda: editor.edit(PROMPTS[:2], TARGETS[:2], sequential_edit=True))
    return {"metrics": len(metrics), "changed": changed(before, weights(editor)), "sequential": error}


def main(path):
    easyeditor = load_easyedit()
    register_algorithm("Shift", apply_shift)
    report = {}
    for family, name in (("gpt2", "tiny-gpt2"), ("llama", Unpacked("tiny-llama"))):
        tiny.make_model(family, dtype=torch.float32).save_pretrained(str(name))
        tokenizer = tiny.make_tokenizer()
        tokenizer.unk_token = tokenizer.eos_token  # EasyEdit's FT compares with its id
        tokenizer.save_pretrained(str(name))
        names = {"alg_name": "Shift", "model_name": name, "device": "cpu", "name": EDITED[family] + ".weight"}
        shift = SimpleNamespace(**names, model_parallel=False, max_length=40, batch_size=1)
        editor = easyeditor.BaseEditor.from_hparams(make_ft(easyeditor, name, family))
        report[f"{family} FT"] = try_ways(editor)
        editor = easyeditor.BaseEditor.from_hparams(shift)
        report[f"{family} Shift"] = try_ways(editor)
    if find_form().kind == "pypi":
        report["wheel"] = try_wheel_only(easyeditor, editor)
        report["lora"] = try_lora(easyeditor, Unpacked("tiny-llama"))
    Path(path).write_text(json.dumps(report, default=float), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
