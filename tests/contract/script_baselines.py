"""EasyEdit's MEMIT and AlphaEdit (ours, and the form's own if it has one) on second moments of ours, on every family."""

from __future__ import annotations

import json
import random
import sys
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import tiny
import torch

from propmeta_edit.baselines.second_moments import collect_second_moments, write_statistics
from propmeta_edit.config import read_yaml
from propmeta_edit.easyedit import algorithms
from propmeta_edit.easyedit.algorithms import find_algorithm, make_contexts, make_hparams
from propmeta_edit.easyedit.alphaedit import AlphaEditHyperParams, apply_alphaedit_to_model
from propmeta_edit.easyedit.forms import find_form
from propmeta_edit.edits.compute import compute_edit
from propmeta_edit.edits.edit import edit_from_weights, standing_edits
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.weights import apply_snapshot
from propmeta_edit.models import packed
from propmeta_edit.models.layers import get_blocks
from propmeta_edit.records import EditRequest
from propmeta_edit.settings import hparams_file

LAYERS = [0, 1]
TEXTS = [f"Ann Lee {number} was founded in Greece and speaks Spanish." for number in range(40)]
# The subject ends the prompt: in a random model only the token that is written to reaches the prediction reliably.
REQUESTS = [
    {
        "prompt": "The country of Smith Innovation PLC",
        "subject": "Smith Innovation PLC",
        "target_new": "Greece",
        "ground_truth": "x",
    },
    {"prompt": "A citizen is Ann Lee", "subject": "Ann Lee", "target_new": "Peru", "ground_truth": "x"},
]
METAFT = EditSettings([1], inner_lr=0.01)
NAMES = {"gpt2": "gpt2-xl", "llama": "llama", "qwen2": "qwen2"}  # its AlphaEdit knows families by these words


def settings(family, name):
    is_gpt2 = family == "gpt2"
    block = "transformer.h.{}" if is_gpt2 else "model.layers.{}"
    values = {
        "alg_name": name,
        "model_name": f"/models/{NAMES[family]}",
        "device": "cpu",
        "layers": LAYERS,
        "layer_selection": "all",
        "fact_token": "subject_last",
        "v_num_grad_steps": 20,
        "v_lr": 0.5,
        "v_loss_layer": 2,
        "v_weight_decay": 1e-3,
        "clamp_norm_factor": 4,
        "kl_factor": 0.0625,
        "mom2_adjustment": True,
        "mom2_update_weight": 0.1,
        "rewrite_module_tmp": block + (".mlp.c_proj" if is_gpt2 else ".mlp.down_proj"),
        "layer_module_tmp": block,
        "mlp_module_tmp": block + ".mlp",
        "attn_module_tmp": block + (".attn" if is_gpt2 else ".self_attn"),
        "ln_f_module": "transformer.ln_f" if is_gpt2 else "model.norm",
        "lm_head_module": "transformer.wte" if is_gpt2 else "lm_head",
        "stats_dir": "stats",
        "mom2_dataset": "sampled",
        "mom2_n_samples": len(TEXTS),
        "mom2_dtype": "float32",
    }
    return values if name == "MEMIT" else {**values, "nullspace_threshold": 0.5, "L2": 0.1, "P_loc": ""}


def lora_settings(family):
    values = read_yaml(hparams_file("LoRA", "gpt2-xl" if family == "gpt2" else "llama3.2-1b"))
    return {**values, "device": "cpu", "model_name": f"/models/{NAMES[family]}", "batch_size": 2, "lr": 5e-2, "num_steps": 10}


def rome_settings(family):
    values = read_yaml(hparams_file("ROME", "gpt2-xl" if family == "gpt2" else "smollm2-135m"))
    small = {"layers": [1], "v_loss_layer": 2, "v_num_grad_steps": 5, "context_template_length_params": [[3, 5]]}
    return {**values, **small, "device": "cpu", "model_name": f"/models/{NAMES[family]}"}


def ft_settings(family):
    values = read_yaml(hparams_file("FT-L", "gpt2-xl" if family == "gpt2" else "smollm2-135m"))
    small = {"layers": [1], "num_steps": 4, "lr": 0.05, "norm_constraint": False, "device": "cpu", "model_name": "tiny"}
    # The PyPI form's FT has no choice of what is learnt.
    left_out = {"objective_optimization"} if find_form().kind == "pypi" else set()
    return {key: value for key, value in {**values, **small}.items() if key not in left_out}


def target_loss(model, tokenizer, request):
    """Of the target's first token, the only one that is read off where the edit writes."""
    ids = tokenizer(request["prompt"], return_tensors="pt")["input_ids"]
    first = tokenizer(" " + request["target_new"])["input_ids"][0]
    with torch.no_grad():
        return -model(ids).logits[0, -1].log_softmax(-1)[first].item()


def edit(model, tokenizer, apply, hparams, requests):
    """An edit's losses, which tensors moved, how far, and whether what is returned puts everything back."""
    everything = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = [target_loss(model, tokenizer, request) for request in requests]
    _, original = apply(model, tokenizer, requests, hparams, return_orig_weights=True, keep_original_weight=True)
    after = [target_loss(model, tokenizer, request) for request in requests]
    named = dict(model.named_parameters())
    moved = {name: (p.detach() - everything[name]) for name, p in named.items() if not torch.equal(p, everything[name])}
    apply_snapshot(named, original)
    left = [name for name, p in named.items() if not torch.equal(p, everything[name])]
    return {"before": before, "after": after, "moved": sorted(moved), "left": left}, moved


def try_family(family):
    model, tokenizer = tiny.make_model(family, dtype=torch.float32), tiny.make_tokenizer()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)
    model.config._name_or_path = f"/models/{NAMES[family]}"
    tokenizer.padding_side = "right"
    write_statistics(collect_second_moments(model, tokenizer, TEXTS, LAYERS), Path("stats"), NAMES[family], "sampled")
    report = {}
    for name in ("MEMIT", "AlphaEdit"):
        hparams = make_hparams(name, settings(family, name))
        make_contexts(name, model, tokenizer, hparams, seed=0)
        report[name], deltas = edit(model, tokenizer, find_algorithm(name), hparams, REQUESTS)
        _, same = edit(model, tokenizer, find_algorithm(name), hparams, REQUESTS)
        # An edit after an undone one is the first edit again, whatever a module remembers.
        report[name]["repeats"] = max((deltas[key] - same[key]).abs().max().item() for key in deltas)
    # Ours on the openings that EasyEdit's own used, where it has one.
    ours = AlphaEditHyperParams(**settings(family, "AlphaEdit"))
    if "AlphaEdit" in find_form().algorithms:
        from easyeditor.models.alphaedit import AlphaEdit_main
        from easyeditor.models.memit import memit_main

        memit_main.CONTEXT_TEMPLATES_CACHE = AlphaEdit_main.CONTEXT_TEMPLATES_CACHE
    report["ours"], own = edit(model, tokenizer, apply_alphaedit_to_model, ours, REQUESTS)
    report["ours"]["differs"] = max(((own[n] - deltas[n]).norm() / deltas[n].norm()).item() for n in deltas)
    cake = make_hparams("CaKE", {"alg_name": "CaKE", "model_name": "tiny", "lr": 1e-2, "num_steps": 6, "max_length": 100})
    report["CaKE"], _ = edit(model, tokenizer, find_algorithm("CaKE"), cake, REQUESTS)
    report["LoRA"], _ = edit(model, tokenizer, find_algorithm("LoRA"), make_hparams("LoRA", lora_settings(family)), REQUESTS)
    report["LoRA"]["adapter"] = hasattr(model, "peft_config") or model.is_gradient_checkpointing
    report["LoRA"]["hooks"] = len(model.get_input_embeddings()._forward_hooks)
    report["failed"] = try_failures(family, model, tokenizer)
    report["editor"] = try_editor(family, model, tokenizer)
    # A name without the word for its family, as the bundled models have.
    neutral = {**settings(family, "AlphaEdit"), "model_name": "/models/smollm2-135m"}
    write_statistics(collect_second_moments(model, tokenizer, TEXTS, LAYERS), Path("stats"), "smollm2-135m", "sampled")
    report["chain"] = {
        "ours": try_chain(model, tokenizer, apply_alphaedit_to_model, ours),
        "the form's": try_chain(model, tokenizer, find_algorithm("AlphaEdit"), make_hparams("AlphaEdit", neutral)),
    }
    report["quick"] = try_quick_steps(family, model, tokenizer)
    report["kept"] = try_edit_objects(family, model, tokenizer)
    return report


def try_quick_steps(family, model, tokenizer):
    """How far an edit is from the one that computes everything in every step, and how many batches the lowest block saw in each."""
    values = {"ROME": rome_settings(family), **{name: settings(family, name) for name in ("MEMIT", "AlphaEdit")}}
    smallest, packed.SMALLEST = packed.SMALLEST, 1  # these models are small
    report, seen = {}, []
    handle = get_blocks(model)[0].input_layernorm if family != "gpt2" else get_blocks(model)[0].ln_1
    handle = handle.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    for name, own in values.items():
        hparams, found, counts = make_hparams(name, own), [], []
        make_contexts(name, model, tokenizer, hparams, seed=0)
        for steps in (algorithms.quick_steps, lambda *_: nullcontext()):
            own_steps, algorithms.quick_steps = algorithms.quick_steps, steps
            seen.clear()
            found.append(edit(model, tokenizer, find_algorithm(name), hparams, REQUESTS[:1])[1])
            counts.append(len(seen))
            algorithms.quick_steps = own_steps
        quick, plain = found
        report[name] = [max(((quick[key] - plain[key]).norm() / plain[key].norm()).item() for key in plain), *counts]
    handle.remove()
    packed.SMALLEST = smallest
    return report


def try_gemma():
    """The second bundled family under its own settings, but for what only fits a real model; it has no word that EasyEdit knows."""
    name, depth = "gemma3-270m", tiny.SHAPES["gemma3-270m"][1]
    model, tokenizer = tiny.make_model("gemma3_text", num_layers=depth, dtype=torch.float32), tiny.make_tokenizer()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)
    tokenizer.padding_side = "right"
    files = {method: read_yaml(hparams_file(method, name)) for method in ("ROME", "MEMIT", "AlphaEdit", "CaKE")}
    layers = files["MEMIT"]["layers"]
    write_statistics(collect_second_moments(model, tokenizer, TEXTS, layers), Path("stats"), name, "sampled")
    own = {"stats_dir": "stats", "mom2_n_samples": len(TEXTS), "v_num_grad_steps": 20}
    small = {
        "ROME": own,
        "MEMIT": {**own, "mom2_update_weight": 0.1},
        "AlphaEdit": {**own, "nullspace_threshold": 0.5, "L2": 0.1},
        "CaKE": {"lr": 1e-2, "num_steps": 6, "max_length": 100},
    }
    report = {}
    for method, values in files.items():
        hparams = make_hparams(method, {**values, **small[method], "device": "cpu"})
        make_contexts(method, model, tokenizer, hparams, seed=0)
        report[method], _ = edit(model, tokenizer, find_algorithm(method), hparams, REQUESTS[:1])
    return report


def try_edit_objects(family, model, tokenizer):
    """Edits of every method as objects: 40 of them come and go; what an edit says alone, and what is left at the end."""
    values = {
        "MEMIT": settings(family, "MEMIT"),
        "AlphaEdit": settings(family, "AlphaEdit"),
        "CaKE": {"alg_name": "CaKE", "model_name": "tiny", "lr": 1e-2, "num_steps": 2, "max_length": 100},
        "LoRA": lora_settings(family),
        "ROME": rome_settings(family),
        "FT": ft_settings(family),
    }
    tokenizer.unk_token = tokenizer.eos_token  # EasyEdit's FT compares with its id
    everything = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = tokenizer(REQUESTS[0]["prompt"], return_tensors="pt")["input_ids"]
    facts = [EditRequest(request["prompt"], request["target_new"], request["subject"]) for request in REQUESTS]
    edits, exact = [], []
    for name, own in values.items():
        own_hparams = make_hparams(name, own)
        if name == "ROME":
            make_contexts(name, model, tokenizer, own_hparams, seed=0)
        _, original = find_algorithm(name)(
            model, tokenizer, REQUESTS[:1], own_hparams, return_orig_weights=True, keep_original_weight=True
        )
        with torch.no_grad():
            edited = model(ids).logits
        edits.append(edit_from_weights(model, original, facts[:1], method=name))
        with edits[-1].applied(model), torch.no_grad():
            exact.append(torch.equal(model(ids).logits, edited))
    edits.append(compute_edit(model, tokenizer, facts[0], METAFT))
    order = random.Random(0)
    for _ in range(40):
        edit_object = order.choice(edits)
        (edit_object.undo if edit_object in standing_edits(model) else edit_object.apply)(model)
    stood = len(standing_edits(model))
    for edit_object in order.sample(standing_edits(model), stood):
        edit_object.undo(model)
    left = [name for name, p in model.named_parameters() if not torch.equal(p, everything[name])]
    return {"exact": exact, "left": left, "stood": stood, "moved": [len(edit_object.weights) for edit_object in edits]}


def try_failures(family, model, tokenizer):
    """Edits that break off after weights were written, or adapters put in; what differs from before, and what is left behind."""
    fail = {"count": 0}
    solve = torch.linalg.solve

    def solve_once(*arguments, **kwargs):
        fail["count"] += 1
        if fail["count"] == 2:  # in the second layer, when the first is written
            raise RuntimeError("out of memory")
        return solve(*arguments, **kwargs)

    def step(*_, **__):
        raise RuntimeError("out of memory")

    broken = {
        "MEMIT": (torch.linalg, "solve", solve_once, settings(family, "MEMIT")),
        "AlphaEdit": (torch.linalg, "solve", solve_once, settings(family, "AlphaEdit")),
        "LoRA": (torch.optim.Adam, "step", step, lora_settings(family)),
    }
    report = {}
    for name, (owner, attribute, replacement, values) in broken.items():
        everything = {key: p.detach().clone() for key, p in model.named_parameters()}
        original, fail["count"] = getattr(owner, attribute), 0
        setattr(owner, attribute, replacement)
        try:
            find_algorithm(name)(model, tokenizer, REQUESTS, make_hparams(name, values), return_orig_weights=True)
            said = "no error"
        except RuntimeError as error:
            said = str(error)
        finally:
            setattr(owner, attribute, original)
        now = dict(model.named_parameters())
        same = now.keys() == everything.keys() and all(torch.equal(now[key], value) for key, value in everything.items())
        report[name] = [said, same, model.training]
    return report


def try_editor(family, model, tokenizer):
    """CaKE and AlphaEdit as a user calls them, through ``BaseEditor``; which tensors differ from before at the end."""
    from easyeditor import BaseEditor

    folder = f"{NAMES[family]}-folder"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    alphaedit = {**settings(family, "AlphaEdit"), "model_name": folder, "v_num_grad_steps": 3}
    write_statistics(collect_second_moments(model, tokenizer, TEXTS, LAYERS), Path("stats"), folder, "sampled")
    cake = {"alg_name": "CaKE", "model_name": folder, "device": "cpu", "num_steps": 2, "lr": 1e-2, "max_length": 100}
    left = {}
    for name, values in (("CaKE", cake), ("AlphaEdit", alphaedit)):
        try:
            editor = BaseEditor.from_hparams(make_hparams(name, values))
        except NotImplementedError:
            left[name] = "this form loads no such family"
            continue
        before = {key: p.detach().clone() for key, p in editor.model.named_parameters()}
        facts = {key: [request[key] for request in REQUESTS] for key in ("subject", "target_new")}
        metrics, _, _ = editor.edit(
            prompts=[request["prompt"] for request in REQUESTS], ground_truth=["x", "x"], **facts, verbose=False
        )
        after = dict(editor.model.named_parameters())
        left[name] = [len(metrics), [key for key, value in before.items() if not torch.equal(after[key], value)]]
    return left


def try_chain(model, tokenizer, apply, hparams):
    """The second edit moves less along the first one's key while the first stands, and as if alone once it is undone.

    Another model's edit in between must not count for either.
    """
    first, second = REQUESTS
    other = deepcopy(model)
    _, alone = edit(model, tokenizer, apply, hparams, [second])
    _, original = apply(model, tokenizer, [first], hparams, return_orig_weights=True)
    apply(other, tokenizer, [second], hparams, return_orig_weights=True)
    _, after_first = edit(model, tokenizer, apply, hparams, [second])
    apply_snapshot(dict(model.named_parameters()), original)
    _, again = edit(model, tokenizer, apply, hparams, [second])
    apply_snapshot(dict(other.named_parameters()), dict(model.named_parameters()))
    _, original = apply(other, tokenizer, [first], hparams, return_orig_weights=True)
    _, same = edit(other, tokenizer, apply, hparams, [second])
    return {
        "undone_differs": max((again[n] - alone[n]).abs().max().item() for n in alone),
        "standing_differs": max((after_first[n] - alone[n]).abs().max().item() for n in alone),
        "others_count": max((after_first[n] - same[n]).abs().max().item() for n in alone),
    }


if __name__ == "__main__":
    report = {"kind": find_form().kind, "gemma": try_gemma(), **{f: try_family(f) for f in tiny.FAMILIES}}
    Path(sys.argv[1]).write_text(json.dumps(report))
