"""EasyEdit's ROME and MEMIT on subjects that occur twice, and on braces."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import tiny
import torch
from script_baselines import LAYERS, TEXTS, rome_settings, settings

from propmeta_edit.baselines.second_moments import collect_second_moments, write_statistics
from propmeta_edit.easyedit.algorithms import EditWith, find_algorithm, make_contexts, make_hparams
from propmeta_edit.errors import PropMetaError
from propmeta_edit.finetune.weights import apply_snapshot
from propmeta_edit.records import EditRequest

REQUESTS = {
    "twice": EditRequest("Ann Lee, the sister of Ann Lee, lives in", "Peru", "Ann Lee"),
    "within a word": EditRequest("Annabel and Ann live in", "Peru", "Ann"),
    "braces": EditRequest("Ann Lee {of {} lives in", "Peru", "Ann Lee"),
    "braces in the target": EditRequest("Ann Lee lives in", "{Peru}", "Ann Lee"),
}


def main():
    model, tokenizer = tiny.make_model("llama", dtype=torch.float32), tiny.make_tokenizer()
    model.config._name_or_path = "/models/llama"
    write_statistics(collect_second_moments(model, tokenizer, TEXTS, LAYERS), Path("stats"), "llama", "sampled")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = {}
    for method, values in (("ROME", rome_settings("llama")), ("MEMIT", settings("llama", "MEMIT"))):
        hparams = make_hparams(method, values)
        make_contexts(method, model, tokenizer, hparams, seed=0)
        apply = EditWith(model, tokenizer, find_algorithm(method), hparams, one_by_one=method == "ROME")
        for name, request in REQUESTS.items():
            try:
                original = apply([request])
            except Exception as error:
                report[f"{method}, {name}"] = (
                    f"{type(error).__name__}: {error}" if isinstance(error, PropMetaError) else repr(error)
                )
            else:
                moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
                report[f"{method}, {name}"] = len(moved)
                apply_snapshot(dict(model.named_parameters()), original)
            assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()), (method, name)
    Path(sys.argv[1]).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
