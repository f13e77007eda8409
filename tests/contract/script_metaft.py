"""MetaFT through ``BaseEditor`` on every family, in folders whose names tell EasyEdit nothing, or something wrong."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import tiny
import torch
from script_editor import LOCALITY, PROMPTS, SUBJECTS, TARGETS, attempt, changed, weights

import propmeta_edit  # isort: skip
from propmeta_edit import EditRequest, PropMetaError, edit_from_weights  # isort: skip
from propmeta_edit.easyedit import find_form  # isort: skip
from easyeditor import BaseEditor  # isort: skip

PORTABILITY = {"two_hop": {"prompt": ["The currency is"] * 3, "ground_truth": ["euro"] * 3}}


def write_hparams(family, folder):
    path = Path(f"{family}.yaml")
    path.write_text(f"alg_name: MetaFT\nmodel_name: {folder}\ndevice: cpu\nlayers: [1]\nlr: 2e-2\nnum_steps: 60\n")
    return path


def try_family(family):
    folder = f"t5-{family}-plain"
    model = tiny.make_model(family, dtype=torch.float32)
    with torch.no_grad():  # behind its last norm a random head of this size could not prefer any token clearly
        model.get_output_embeddings().weight.mul_(8)
    model.save_pretrained(folder)
    tokenizer = tiny.make_tokenizer()
    tokenizer.save_pretrained(folder)
    hparams = propmeta_edit.MetaFTHyperParams.from_hparams(str(write_hparams(family, folder)))
    editor = BaseEditor.from_hparams(hparams)
    facts = {"prompts": PROMPTS, "target_new": TARGETS, "verbose": False}
    inputs = {"portability_inputs": PORTABILITY, "locality_inputs": LOCALITY}
    requests = [
        {"prompt": p, "target_new": t, "ground_truth": "x", "portability": {}, "locality": {}}
        for p, t in zip(PROMPTS, TARGETS, strict=True)
    ]
    report = {
        "edit": attempt(editor, lambda: editor.edit(**facts, **inputs, subject=SUBJECTS)),
        "no_subject": attempt(editor, lambda: editor.edit(**facts, **inputs)),
        "edit_sequential": attempt(editor, lambda: editor.edit(**facts, **inputs, sequential_edit=True)),
        "given_requests": run_requests(editor, requests),
        "padding_side": editor.tok.padding_side,
        "dtypes": sorted({str(p.dtype) for p in editor.model.parameters()}),
        "empty_target": attempt(editor, lambda: editor.edit(**{**facts, "target_new": ["Lima", " ", "Peru"]})),
    }
    if family == "llama":
        places = [{**r, "prompt": r["prompt"].replace(s, "{}"), "subject": s} for r, s in zip(requests, SUBJECTS, strict=True)]
        report["places"] = attempt(editor, lambda: editor.edit_requests(places, verbose=False))
        report["filled"] = attempt(editor, lambda: editor.edit_requests(requests, verbose=False))
    report["kept"] = keep_edit(editor)
    if hasattr(editor, "generate_edit") and family == "llama":  # it always writes 512 tokens
        report["generate_edit"] = try_generate_edit(editor)
    editor.hparams.batch_size = 2
    report["batch"] = attempt(editor, lambda: editor.batch_edit(**facts, **inputs))
    return report


def keep_edit(editor):
    """An ``Edit`` from what the editor returns: after a sequential edit, and after one that was put back."""
    facts = {"prompts": PROMPTS[:1], "target_new": TARGETS[:1], "subject": SUBJECTS[:1], "verbose": False}
    requests = [EditRequest(PROMPTS[0], TARGETS[0], SUBJECTS[0])]
    before = weights(editor)
    _, edited, originals = editor.edit(**facts, sequential_edit=True)
    after = weights(editor)
    edit = edit_from_weights(edited, originals, requests, method="MetaFT", base_model=str(editor.hparams.model_name))
    left = changed(before, weights(editor))
    with edit.applied(editor.model):
        exact = changed(after, weights(editor)) == []
    edit.save(f"{editor.hparams.model_name}-edit")
    named = BaseEditor.from_hparams(replace(editor.hparams, model_name=f"{editor.hparams.model_name}-edit"))
    as_model = changed(after, weights(named)) == []
    _, edited, originals = editor.edit(**facts)
    try:
        edit_from_weights(edited, originals, requests, method="MetaFT")
        said = "no error"
    except PropMetaError as error:
        said = str(error)
    return {"left": left, "exact": exact, "as_model": as_model, "put_back": said}


def try_generate_edit(editor):
    """Texts before and after; its chat template is the question alone here, as the model was trained on nothing else."""
    editor.tok.chat_template = "{{ messages[-1]['content'] }}"
    before = weights(editor)
    results, _, originals = editor.generate_edit(
        prompts=PROMPTS[:1],
        target_new=TARGETS[:1],
        subject=SUBJECTS[:1],
        rephrase_prompts=["France has the capital"],
        portability_inputs={"por_hop": {"prompt": [["The currency is"]], "ground_truth": [["euro"]]}},
        verbose=False,
    )
    return {
        "changed": changed(before, weights(editor)),
        "originals": sorted(originals),
        "texts": {when: results[0][when]["rewrite_ans"] for when in ("pre", "post")},
        "asked": sorted(results[0]["post"]),
    }


def run_requests(editor, requests):
    """``edit_requests`` is in both forms; ``edit(requests=...)`` works in the PyPI form only (see docs/architecture.md)."""
    before = json.dumps(requests)
    metrics, _, _ = editor.edit_requests(requests, verbose=False)
    if "requests" in find_form().supports:
        metrics, _, _ = editor.edit(requests=requests, verbose=False)
    return {"count": len(metrics), "untouched": json.dumps(requests) == before}


def main(path):
    report = {family: try_family(family) for family in tiny.FAMILIES}
    sys.argv = ["existing_ft_script.py", "llama.yaml"]
    script = runpy.run_path(str(Path(__file__).parent / "existing_ft_script.py"))
    report["script"] = {"post": [metric["post"]["rewrite_acc"] for metric in script["metrics"]]}
    Path(path).write_text(json.dumps(report, default=float), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
