"""A script for EasyEdit's FT as its users have it, of which only the hyper-parameters' line was changed (and one import added).

Usage: existing_ft_script.py HPARAMS
"""

import sys

from easyeditor import BaseEditor

import propmeta_edit

# was: hparams = FTHyperParams.from_hparams('./hparams/FT/llama-7b.yaml')
hparams = propmeta_edit.MetaFTHyperParams.from_hparams(sys.argv[1])
prompts = ["The capital of France is", "Ann Lee is a citizen of"]
ground_truth = ["Paris", "Peru"]
target_new = ["Lima", "Greece"]
subject = ["France", "Ann Lee"]
portability_inputs = {
    "two_hop": {"prompt": ["The country of Lima is", "The currency of Ann Lee's country is"], "ground_truth": ["Peru", "euro"]}
}
locality_inputs = {"neighborhood": {"prompt": ["The answer is", "The answer is"], "ground_truth": ["euro", "euro"]}}
editor = BaseEditor.from_hparams(hparams)
metrics, edited_model, _ = editor.edit(
    prompts=prompts,
    ground_truth=ground_truth,
    target_new=target_new,
    subject=subject,
    portability_inputs=portability_inputs,
    locality_inputs=locality_inputs,
    sequential_edit=False,
)
print(metrics)
print(type(edited_model))
