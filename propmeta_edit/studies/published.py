"""Numbers that were published, for standing beside our own on the same models and files. The paper's figures give none.

It compares with no number of PropMEND, and has none of CaKE's but its own run of it. What the two say of themselves is of other
models and verdicts, so it stands apart, with where it is from.
"""

from __future__ import annotations

from propmeta_edit.evaluation.tables import markdown_table

# The paper's Table 1 is of Llama3-8B-Instruct. Its Table 2 says "Llama3-8B" and no more, so both are taken for it.
TABLE_1_MODEL = "llama3-8b-instruct"
TABLE_2_MODELS = ("llama3-8b", "llama3-8b-instruct")

# Modules -> accuracy % on CRE: ID, OOD, and the same without meta-learning (accuracy minus the printed gain).
TABLE_1 = {"attention": (18.6, 2.1, 6.8, 0.5), "mlp": (71.6, 6.3, 5.7, 0.0), "attention+mlp": (52.5, 5.7, 5.9, 0.0)}
TABLE_1_PROTOCOL = (
    "published: cited from the paper's Table 1 (Llama3-8B-Instruct, all layers, CRE's test files; an answer occurs in ten greedy "
    "tokens). Its shares fit two verdicts an instance; here there is one."
)
_TABLE_1_PLACES = {("cre-id", True): 0, ("cre-ood", True): 1, ("cre-id", False): 2, ("cre-ood", False): 3}

# Method -> CRE OOD, MQuAKE, MQuAKE-subset (accuracy %), seconds an edit, and how the paper ran it.
_RECOMMENDED = "EasyEdit with its recommended settings"
TABLE_2 = {
    "ROME": (12.9, 16.2, 50.2, 9.13, _RECOMMENDED),
    "MEMIT": (1.7, 7.7, 9.4, 9.51, f"{_RECOMMENDED}, of which it has none for this model: what was used is not said"),
    "AlphaEdit": (5.1, 9.7, 37.6, 16.2, _RECOMMENDED),
    "CaKE": (None, 52.4, 23.9, 45.8, "its own texts for every fact, which CRE has not"),
    "FT": (17.4, 28.6, 36.2, 1.61, "AdamW 2e-5, ten steps, layer 9 attention+MLP, on the untuned model"),
    "MetaFT (the paper's method)": (47.1, 49.2, 73.2, 1.68, "the same after meta-training on CRE's 4,000 training instances"),
}
TABLE_2_PROTOCOL = (
    "Cited from the paper's Table 2, not run here: Llama3-8B (base or Instruct is not said); an answer is in ten greedy tokens, "
    "one verdict a case; 350 CRE OOD instances, 3,000 cases of MQuAKE, 213 of its subset; the hardware is not named. "
    "The layer was chosen on the OOD test set. It gives no interval, seed, efficacy or locality, and no number of PropMEND."
)

# Name -> what its abstract states, and of what. Their tables are of other models and protocols and are to be read there.
OTHERS = {
    "PropMEND (arXiv 2506.08920)": (
        "almost twice the accuracy on multi-hop questions whose answer the injected fact does not state",
        "RippleEdit; a hypernetwork that transforms the gradient of an edit. On its CRE it is ahead on unseen entities and "
        "relations too, by much less",
    ),
    "CaKE (arXiv 2503.16356)": (
        "20 % more multi-hop accuracy than existing methods, on average",
        "MQuAKE; a LoRA trained on texts written for every fact",
    ),
}


def table_1_of(model: str, modules: str, dataset: str, is_meta_trained: bool) -> float | None:
    """What the paper's Table 1 has for a variant, in percent; None if it has none."""
    place = _TABLE_1_PLACES.get((dataset, is_meta_trained))
    return TABLE_1[modules][place] if model == TABLE_1_MODEL and place is not None else None


def table_2_markdown() -> str:
    """The paper's Table 2 as cited rows with their protocols."""
    header = ["published", "CRE OOD %", "MQuAKE %", "MQuAKE-subset %", "s / edit", "as run there"]
    rows = [[name, *("–" if number is None else f"{number:g}" for number in row[:4]), row[4]] for name, row in TABLE_2.items()]
    others = markdown_table(["by themselves", "stated", "of"], [[name, *said] for name, said in OTHERS.items()])
    return f"## Published numbers\n\n{markdown_table(header, rows)}\n{TABLE_2_PROTOCOL}\n\n{others}\nCited from their abstracts.\n"
