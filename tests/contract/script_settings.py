"""Every YAML of every baseline, read by the form of EasyEdit at hand and held against a model of that shape."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tiny

from propmeta_edit.config import read_yaml
from propmeta_edit.easyedit.algorithms import make_hparams
from propmeta_edit.errors import PropMetaError
from propmeta_edit.recipes.settings import hparams_file

DEPTHS = {
    "llama3-8b": ("llama", 32),
    "llama3.2-3b": ("llama", 28),
    "llama3.2-1b": ("llama", 16),
    "llama2-7b": ("llama", 32),
    "qwen2.5-7b": ("qwen2", 28),
    "gpt2-xl": ("gpt2", 48),
    "smollm2-135m": ("llama", 30),
}
METHODS = ("ROME", "MEMIT", "AlphaEdit", "CaKE", "FT-L", "FT-M", "LoRA")


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
    templates = [v for k, v in vars(hparams).items() if k.endswith("_module_tmp")] if method not in ("CaKE", "LoRA") else []
    wanted = [template.format(layer) for template in templates for layer in hparams.layers]
    wanted += [hparams.ln_f_module, hparams.lm_head_module] if templates else []
    missing = [module for module in wanted if module not in modules]
    if missing:
        return f"the model has no {missing}"
    if method in ("MEMIT", "AlphaEdit") and f"{hparams.lm_head_module}.weight" not in dict(model.named_parameters()):
        return f"{hparams.lm_head_module} has no parameter of its own"
    if getattr(hparams, "v_loss_layer", depth - 1) != depth - 1:
        return f"v_loss_layer {hparams.v_loss_layer} of {depth} layers"
    return ""


def main(path):
    report = {}
    for name, (family, depth) in DEPTHS.items():
        model = tiny.make_model(family, num_layers=depth)
        if name in ("llama3.2-3b", "llama3.2-1b", "smollm2-135m"):  # their head is the embedding
            model.config.tie_word_embeddings = True
            model.lm_head.weight = model.model.embed_tokens.weight
        report[name] = {method: check(method, name, model, depth) for method in METHODS}
    try:
        rome = read_yaml(hparams_file("ROME", "smollm2-135m"))
        make_hparams("ROME", {**rome, "context_template_length_params": [[10, 5], [5, 3]]})
    except PropMetaError as error:
        report["openings"] = str(error)
    Path(path).write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
