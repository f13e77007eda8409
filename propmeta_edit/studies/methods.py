"""The rows of Table 2, each one declaration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from propmeta_edit.baselines.cake import make_rephrasings, origin_of_rephrasings, origin_of_training_pairs
from propmeta_edit.errors import ConfigError, did_you_mean
from propmeta_edit.evaluation.companions import with_text_origins, with_wrong_facts
from propmeta_edit.evaluation.methods import LONG_EDIT
from propmeta_edit.evaluation.runner import TIMED_CASES
from propmeta_edit.records import EditRequest
from propmeta_edit.studies.variants import Variant

TEXTS_VERSION = 2  # of what those rows train on besides the facts: the data's own wordings first; raise it when that changes


def with_rephrasings(edit: EditRequest) -> list[EditRequest]:
    """A fact and the same fact in other words."""
    return [edit, *make_rephrasings(edit)]


CORE = (  # the base's rows together: it is loaded once
    Variant("unedited", edit=""),
    Variant("in-context", edit="in-context"),
    Variant("FT", hparams="FT"),
    Variant("ROME", edit="ROME"),
    Variant("MEMIT", edit="MEMIT"),
    Variant("AlphaEdit", edit="AlphaEdit"),
    Variant(
        "CaKE",
        edit="CaKE",
        adapt=partial(with_text_origins, origin_of=origin_of_training_pairs),
        texts_version=TEXTS_VERSION,
    ),
    Variant("MetaFT", checkpoint="metaft"),
)
BOUND = Variant("MetaFT-bound", checkpoint="bound", edits_as_trained=True, settings={"batch_size": 4})
BOUND_SEEDS = tuple(replace(BOUND, name=f"MetaFT-bound-seed{seed}", checkpoint=f"bound-seed{seed}") for seed in (1, 2))
GUESSES = (  # rows without a model
    Variant("newest-object", edit="newest object"),
    Variant("commonest-answer", edit="commonest answer"),
)
CONTROLS = (
    Variant("FT-as-MetaFT"),
    Variant("MetaFT-unedited", edit="", checkpoint="metaft"),
    Variant("MetaFT-in-context", edit="in-context", checkpoint="metaft"),
    Variant("MetaFT-wrong-fact", checkpoint="metaft", adapt=with_wrong_facts),
    Variant("K0-FT", checkpoint="k0"),
    Variant("shuffled-FT", checkpoint="shuffled"),
    Variant("MetaFT-seed1", checkpoint="seed1"),
    Variant("MetaFT-seed2", checkpoint="seed2"),
)
OTHERS = (  # other ways to fine-tune
    Variant(
        "FT-paraphrases",
        hparams="FT-paraphrases",
        settings={"batch_size": 4},  # all wordings in one update
        adapt=partial(with_text_origins, origin_of=origin_of_rephrasings),
        write=with_rephrasings,
        texts_version=TEXTS_VERSION,
    ),
    Variant("FT-all-layers", hparams="FT-all-layers", settings={"layers": "all"}),
    Variant("FT-subject", hparams="FT-subject", settings={"positions": "subject"}),
    Variant("FT-L", edit="FT", hparams="FT-L"),
    Variant("FT-M", edit="FT", hparams="FT-M"),
    Variant("LoRA", edit="LoRA"),
)
RECIPES = {  # meta-trained with three seeds
    "MetaFT, three seeds": ("MetaFT", "MetaFT-seed1", "MetaFT-seed2"),
    "MetaFT-bound, three seeds": (BOUND.name, *(variant.name for variant in BOUND_SEEDS)),
}
METHODS = {variant.name: variant for variant in (*CORE, BOUND, *OTHERS, *CONTROLS, *BOUND_SEEDS, *GUESSES)}
NOTES = (
    "accuracy: portability by ten-token containment: an accepted answer to the multi-hop question occurs in ten greedy tokens "
    "after `Question: ...\\nAnswer: The answer is`.",
    "efficacy: the edited fact itself occurs in ten greedy tokens after its prompt.",
    "locality, second hop and other fact: single-hop questions about the new object, and about something else, still answered.",
    "locality, neighbourhood: the ten tokens after the same kind of question about another subject are those of before the edit.",
    f"s / edit: mean of the edit call alone over the cases that were edited one by one: the first {TIMED_CASES} of FT and MetaFT, "
    "whose other cases are edited side by side, and all of the others. Loading, a warm-up edit (where edits take less than "
    f"{LONG_EDIT:.0f} s; else the first edit reads the second moments), evaluation, restoring and the one-time meta-training are "
    "outside.",
    "FT is the inner loop on the base that was not meta-trained, with settings of its own; FT-as-MetaFT has MetaFT's settings.",
    "FT-subject: FT at half its rate, with the gradients of the subject's tokens alone.",
    "MetaFT-bound: meta-trained on several facts at once, with whitened steps at the subject's tokens (docs/equations.md).",
    "cases / s: of the cases that were edited side by side, edits and questions together.",
    "FT-L and FT-M are EasyEdit's FT in a clone of its repository; its PyPI release has one of the two losses under no name.",
    "once before: seconds spent before any edit (meta-training, second moments, projections), on the machine that spent them.",
    "CaKE and FT-paraphrases train on texts from fixed templates where the data has none of its own; each of their rows says which "
    "in its tag `augmentation`.",
    "K0-FT: FT after an outer loop without inner steps; shuffled-FT: after one on shuffled pairs; wrong-fact: another object is "
    "written, and the right consequence must not come out; seed1, seed2: other orders of the meta-training tasks.",
    "newest-object, commonest-answer: no model; the edited object, and the answer that most cases of the relation have, whatever "
    "is asked.",
    "own, leak, net: over pairs of the edited subject and another one, neither of which had the edited consequence before: the "
    "share where the question about the edited subject now has it, where that about the other one does, and their difference.",
    "told apart: so many facts of one kind are written in one edit and each is asked; crossed: another one's answer comes.",
    "world-*: real facts put into the formats of CRE and MQuAKE offline, not the released data, which cre-* and mquake-* are.",
)


def find_methods(names: Sequence[str]) -> list[Variant]:
    """The rows of these names; ``all`` stands for the usual ones and the controls.

    Raises:
        ConfigError: no name, or an unknown one.
    """
    wanted = [variant.name for variant in (*CORE, *CONTROLS)] if list(names) == ["all"] else list(names)
    unknown = [name for name in wanted if name not in METHODS]
    if unknown or not wanted:
        hint = did_you_mean(unknown[0], METHODS) if unknown else ""
        raise ConfigError(f"unknown methods {', '.join(unknown) or 'none'}; choose from {', '.join(METHODS)}{hint}")
    return [METHODS[name] for name in wanted]
