"""Whitened edits through ``BaseEditor``, put back and one after another, beside the same facts written without EasyEdit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tiny
import torch
from script_editor import PROMPTS, SUBJECTS, TARGETS, weights

import propmeta_edit  # isort: skip
from propmeta_edit import EditRequest  # isort: skip
from propmeta_edit.easyedit import find_form  # isort: skip
from propmeta_edit.finetune import inner_steps  # isort: skip
from propmeta_edit.finetune.input_moments import InputMoments, find_whiteners, write_input_moments  # isort: skip
from propmeta_edit.finetune.single_edit import write_facts  # isort: skip
from propmeta_edit.models.layers import select_parameters  # isort: skip
from propmeta_edit.models.loading import load_model  # isort: skip
from easyeditor import BaseEditor  # isort: skip

FOLDER = "standing"
SETTINGS = "lr: 2e-2\nnum_steps: 4\ninner_step: whitened\npositions: subject\n"


def prepare():
    model, tokenizer = tiny.make_model("llama", dtype=torch.float32), tiny.make_tokenizer()
    model.save_pretrained(FOLDER)
    tokenizer.save_pretrained(FOLDER)
    names = [name.removesuffix(".weight") for name in select_parameters(model, [1])]
    moments = {name: 1e-3 * torch.eye(model.get_submodule(name).in_features) for name in names}
    write_input_moments(InputMoments(moments), Path(FOLDER))
    Path("hparams.yaml").write_text(f"alg_name: MetaFT\nmodel_name: {FOLDER}\ndevice: cpu\nlayers: [1]\n{SETTINGS}")
    return propmeta_edit.MetaFTHyperParams.from_hparams("hparams.yaml")


def without_easyedit(hparams, numbers):
    """The weights after these facts, one after another, on the model as it is in its folder."""
    model, tokenizer = load_model(FOLDER)
    for number in numbers:
        write_facts(model, tokenizer, [EditRequest(PROMPTS[number], TARGETS[number], SUBJECTS[number])], hparams.edit)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def distance(one, other):
    return max(float((value - other[name]).abs().max()) for name, value in one.items())


def main():
    hparams = prepare()
    editor = BaseEditor.from_hparams(hparams)
    facts = {"prompts": PROMPTS[:2], "target_new": TARGETS[:2], "subject": SUBJECTS[:2], "verbose": False}
    last = {name: value[1:2] if isinstance(value, list) else value for name, value in facts.items()}
    fresh = weights(editor)
    editor.edit(**facts)
    put_back = distance(fresh, weights(editor))
    editor.edit(**last, sequential_edit=True)
    after_put_back = distance(without_easyedit(hparams, [1]), weights(editor))
    editor = BaseEditor.from_hparams(hparams)
    editor.edit(**facts, sequential_edit=True)
    both = without_easyedit(hparams, [0, 1])
    moved = distance(fresh, both)
    one_after_another = distance(both, weights(editor))
    inner_steps.standing_whiteners = find_whiteners  # what steps that know of no edit would give
    forgetful = distance(both, without_easyedit(hparams, [0, 1]))
    report = {"forgetful": forgetful, "form": find_form().kind, "put_back": put_back, "after_put_back": after_put_back}
    Path(sys.argv[1]).write_text(json.dumps({**report, "one_after_another": one_after_another, "moved": moved}))


if __name__ == "__main__":
    main()
