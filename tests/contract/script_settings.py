"""Every YAML of every baseline, read by the form of EasyEdit at hand and held against a model of that shape."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tiny

from propmeta_edit.baselines.cake import target_weights
from propmeta_edit.config import read_yaml
from propmeta_edit.easyedit.algorithms import make_hparams
from propmeta_edit.errors import EasyEditError, PropMetaError
from propmeta_edit.settings import has_hparams, hparams_file

METHODS = ("ROME", "MEMIT", "AlphaEdit", "CaKE", "FT-L", "FT-M", "LoRA")
FILES = [(method, name) for name in tiny.SHAPES for method in METHODS if has_hparams(method, name)]


def check(method, name, model, depth):
    """What is wrong with one file; "" if nothing is."""
    path = hparams_file(method, name)
    if not path.read_text(encoding="utf-8").startswith("# "):
        return "its first line does not say where the values come from"
    values = {**read_yaml(path), "device": "cpu"}
    try:
        hparams = make_hparams(values["alg_name"], values)
    except PropMetaError as error:
        return str(error)
    modules = dict(model.named_modules())
    if method == "LoRA":
        absent = set(hparams.target_modules) - {name.rpartition(".")[2] for name in modules}
        return f"the model has no {absent}" if absent or not hparams.target_modules else ""
    if method == "CaKE":
        return "" if len(target_weights(model)) >= 2 * depth else "the model has no projections that CaKE knows"
    templates = [v for k, v in vars(hparams).items() if k.endswith("_module_tmp")]
    wanted = [template.format(layer) for template in templates for layer in hparams.layers]
    wanted += [hparams.ln_f_module, hparams.lm_head_module]
    missing = [module for module in wanted if module not in modules]
    if missing:
        return f"the model has no {missing}"
    if method in ("MEMIT", "AlphaEdit") and f"{hparams.lm_head_module}.weight" not in dict(model.named_parameters()):
        return f"{hparams.lm_head_module} has no parameter of its own"
    if getattr(hparams, "v_loss_layer", depth - 1) != depth - 1:
        return f"v_loss_layer {hparams.v_loss_layer} of {depth} layers"
    return ""


def fill(method, name, model_name):
    """The layers that the form's settings get if the file gives none; None where it has no such method."""
    values = {**read_yaml(hparams_file(method, name)), "device": "cpu", "model_name": model_name}
    bare = {key: value for key, value in values.items() if key != "v_loss_layer" and (key != "layers" or method == "LoRA")}
    try:
        hparams = make_hparams(values["alg_name"], bare)
    except EasyEditError:
        return None
    return [getattr(hparams, "layers", None), getattr(hparams, "v_loss_layer", None)]


def main(path):
    report = {"filled": {}}
    for name, (family, depth) in tiny.SHAPES.items():
        model = tiny.make_model(family, num_layers=depth)
        if name in tiny.TIED:
            model.config.tie_word_embeddings = True
            model.lm_head.weight = model.model.embed_tokens.weight
        report[name] = {method: check(method, name, model, depth) for method in METHODS if (method, name) in FILES}
        model.config.save_pretrained(name)
        report["filled"][name] = {method: fill(method, name, f"./{name}") for method in METHODS if (method, name) in FILES}
    values = {**read_yaml(hparams_file("ROME", "smollm2-135m")), "context_template_length_params": [[10, 5], [5, 3]]}
    try:
        make_hparams("ROME", values)
    except PropMetaError as error:
        report["openings"] = str(error)
    Path(path).write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
