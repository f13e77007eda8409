"""The rows of the comparison: which model each starts from, and what is done to it."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import version
from typing import Any

import torch
import transformers

import propmeta_edit
from propmeta_edit.baselines.cake import make_rephrasings, origin_of_rephrasings, origin_of_training_pairs
from propmeta_edit.config import build_config, read_yaml
from propmeta_edit.easyedit.algorithms import BASELINES, NEEDS_STATISTICS, fill_layers, find_algorithm, make_contexts, make_hparams
from propmeta_edit.easyedit.forms import find_form
from propmeta_edit.easyedit.hparams import MetaFTHyperParams, edit_settings_of
from propmeta_edit.easyedit.plugin import apply_metaft_to_model
from propmeta_edit.errors import ConfigError
from propmeta_edit.evaluation.companions import with_text_origins, with_wrong_facts
from propmeta_edit.evaluation.methods import LONG_EDIT, Editing, FineTuning, InContext, Unedited
from propmeta_edit.evaluation.runner import TIMED_CASES, Method, MethodSpec
from propmeta_edit.files import sha256_of_json
from propmeta_edit.models.artefacts import find_model_folder, resolve_model_folder
from propmeta_edit.models.devices import free_unused
from propmeta_edit.models.loading import load_model, model_sha256, read_checkpoint_card
from propmeta_edit.recipes.settings import has_hparams, hparams_file
from propmeta_edit.recipes.statistics import ensure_statistics
from propmeta_edit.records import Case, EditRequest

LOG = logging.getLogger(__name__)


def with_rephrasings(edit: EditRequest) -> list[EditRequest]:
    """A fact and the same fact in other words."""
    return [edit, *make_rephrasings(edit)]


TEXTS_VERSION = 2  # of what those rows train on besides the facts: the data's own wordings first; raise it when that changes
note_cake_texts = partial(with_text_origins, origin_of=origin_of_training_pairs)
note_rephrasings = partial(with_text_origins, origin_of=origin_of_rephrasings)


@dataclass(frozen=True)
class RowKind:
    """What a row is made of.

    Args:
        checkpoint: which model it starts from: ``""`` for the base, else ``<base>-<checkpoint>`` or what --checkpoints says.
        edit: MetaFT for the inner loop, an algorithm of EasyEdit's, "in-context", or "" for none.
        adapt: makes the row's cases from the data set's.
        settings: in which folder of hparams/ its YAML is; "" for the one named as ``edit``.
        write: the requests that stand for one fact.
        varies: what makes it a variant of FT, where there is no YAML of its own.
    """

    checkpoint: str
    edit: str
    adapt: Callable[[Sequence[Case]], Sequence[Case]] = list
    settings: str = ""
    write: Callable[[EditRequest], list[EditRequest]] = lambda edit: [edit]
    varies: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hparams_folder(self) -> str:
        return self.settings or self.edit


CORE = {  # the base's rows together: it is loaded once
    "unedited": RowKind("", ""),
    "in-context": RowKind("", "in-context"),
    "FT": RowKind("", "MetaFT", settings="FT"),
    "ROME": RowKind("", "ROME"),
    "MEMIT": RowKind("", "MEMIT"),
    "AlphaEdit": RowKind("", "AlphaEdit"),
    "CaKE": RowKind("", "CaKE", note_cake_texts),
    "MetaFT": RowKind("metaft", "MetaFT"),
}
CONTROLS = {
    "FT-as-MetaFT": RowKind("", "MetaFT"),
    "MetaFT-unedited": RowKind("metaft", ""),
    "MetaFT-in-context": RowKind("metaft", "in-context"),
    "MetaFT-wrong-fact": RowKind("metaft", "MetaFT", with_wrong_facts),
    "K0-FT": RowKind("k0", "MetaFT"),
    "shuffled-FT": RowKind("shuffled", "MetaFT"),
    "MetaFT-seed1": RowKind("seed1", "MetaFT"),
    "MetaFT-seed2": RowKind("seed2", "MetaFT"),
}
VARIANTS = {  # other ways to fine-tune
    "FT-paraphrases": RowKind(
        "",
        "MetaFT",
        note_rephrasings,
        settings="FT-paraphrases",
        write=with_rephrasings,
        varies={"batch_size": 4},  # all wordings in one update
    ),
    "FT-all-layers": RowKind("", "MetaFT", settings="FT-all-layers", varies={"layers": "all"}),
    "FT-L": RowKind("", "FT", settings="FT-L"),
    "FT-M": RowKind("", "FT", settings="FT-M"),
    "LoRA": RowKind("", "LoRA"),
}
METHODS: dict[str, RowKind] = {**CORE, **VARIANTS, **CONTROLS}
NOTES = [
    "accuracy: an accepted answer occurs in ten greedy tokens after `Question: ...\\nAnswer: The answer is`.",
    "efficacy: the edited fact itself occurs in ten greedy tokens after its prompt.",
    "second hop, other fact: single-hop questions about the new object, and about something else, still answered.",
    "neighbour same: the ten tokens after a question about another subject are those of before the edit.",
    f"s / edit: mean of the edit call alone over the cases that were edited one by one: the first {TIMED_CASES} of FT and MetaFT, "
    "whose other cases are edited side by side, and all of the others. Loading, a warm-up edit (where edits take less than "
    f"{LONG_EDIT:.0f} s; else the first edit reads the second moments), evaluation, restoring and the one-time meta-training are "
    "outside.",
    "FT is the inner loop on the base that was not meta-trained, with settings of its own; FT-as-MetaFT has MetaFT's settings.",
    "cases / s: of the cases that were edited side by side, edits and questions together.",
    "FT-L and FT-M are EasyEdit's FT in a clone of its repository; its PyPI release has one of the two losses under no name.",
    "once before: seconds spent before any edit (meta-training, second moments, projections), on the machine that spent them.",
    "CaKE and FT-paraphrases train on texts from fixed templates where the data has none of its own; each of their rows says which "
    "in its tag `augmentation`.",
    "K0-FT: FT after an outer loop without inner steps; shuffled-FT: after one on shuffled pairs; wrong-fact: another object is "
    "written, and the right consequence must not come out; seed1, seed2: other orders of the meta-training tasks.",
    "cre-* and mquake-standin* without a file are real facts put into those formats offline, not the released data.",
]


@dataclass(frozen=True)
class Setup:
    """What all rows share."""

    model: str
    checkpoints: Mapping[str, str]
    device: str
    dtype: str
    seed: int
    edits_at_once: int

    def model_of(self, kind: RowKind) -> str:
        """The model a row starts from."""
        if not kind.checkpoint:
            return self.model
        return self.checkpoints.get(kind.checkpoint, f"{self.model.rstrip('/')}-{kind.checkpoint}")

    def dtype_of(self, kind: RowKind) -> str:
        """Of the frozen rest; EasyEdit's algorithms do not mix dtypes, so their model is fp32."""
        return "float32" if kind.edit in BASELINES else self.dtype


def make_specs(names: list[str], setup: Setup, hparams_name: str) -> list[MethodSpec]:
    """The chosen rows, nothing loaded yet (the models are prepared if they have to be)."""
    return [make_spec(name, METHODS[name], read_settings(METHODS[name], setup, hparams_name), setup) for name in names]


def make_spec(name: str, kind: RowKind, settings: Mapping[str, Any], setup: Setup) -> MethodSpec:
    """One row under a name of its own, with settings that need not be those of its YAML."""
    model = setup.model_of(kind)
    settings = fill_layers(kind.edit, settings, model)
    precomputation = read_training_time(model) if kind.checkpoint else {}
    identity = {**settings, "model_name": model, "device": setup.device, "dtype": setup.dtype_of(kind)}
    if kind.adapt in (note_cake_texts, note_rephrasings):
        identity["texts"] = TEXTS_VERSION
    if kind.edit in BASELINES:
        identity["easyedit"] = find_form().kind
        if kind.edit in NEEDS_STATISTICS:
            statistics = ensure_statistics(model, settings, setup.device)
            settings["stats_dir"], identity["stats_dir"] = statistics.folder, statistics.sha256
            precomputation |= statistics.seconds
    return MethodSpec(
        name=name,
        model=model,
        model_sha256=hash_of_model(model),
        hparams_sha256=sha256_of_json(identity),
        build=partial(build_method, kind, settings, model, setup),
        check=partial(check_settings, kind, settings, model, setup),
        dtype=setup.dtype_of(kind),
        device=setup.device,
        adapt=kind.adapt,
        precomputation=precomputation,
        base_sha256=_base_of(model) if kind.checkpoint else "",
        cases_at_once=1 if kind.edit in BASELINES else setup.edits_at_once,
        settings=identity,
    )


def _base_of(model: str) -> str:
    """The hash of the model from which a checkpoint was meta-trained, as its card knows it."""
    return str(read_checkpoint_card(resolve_model_folder(model)).get("base_sha256", ""))


def read_training_time(model: str) -> dict[str, float]:
    """Seconds of a checkpoint's meta-training, if its card knows them."""
    seconds = read_checkpoint_card(resolve_model_folder(model)).get("seconds")
    return {} if seconds is None else {"meta-training": seconds}


def read_settings(kind: RowKind, setup: Setup, hparams_name: str) -> dict[str, Any]:
    """A row's settings: of its YAML, but as the meta-tuned checkpoint was trained where a row edits like MetaFT.

    Without YAMLs of their own, FT edits as the checkpoint was trained too, and FT's variants as FT does, but for what makes them
    variants.

    Raises:
        ConfigError: no YAML for an algorithm of EasyEdit's.
        ModelError: no checkpoint where one is needed, or one without its card.
    """
    if kind.edit not in ("MetaFT", *BASELINES):
        return {}
    if kind.edit in BASELINES or (kind.hparams_folder != "MetaFT" and has_hparams(kind.hparams_folder, hparams_name)):
        return read_yaml(hparams_file(kind.hparams_folder, hparams_name))
    if kind.varies:
        return {**read_settings(METHODS["FT"], setup, hparams_name), **kind.varies}
    return _settings_of_metaft(setup.model_of(METHODS["MetaFT"]), hparams_name)


def _settings_of_metaft(model: str, hparams_name: str) -> dict[str, Any]:
    """What the checkpoint's card says, and what a YAML says besides."""
    own = read_yaml(hparams_file("MetaFT", hparams_name)) if has_hparams("MetaFT", hparams_name) else {}
    folder = find_model_folder(model) if own else resolve_model_folder(model)
    if folder is None:  # a row of the base, where the checkpoint is not at hand
        return own
    trained = edit_settings_of(read_checkpoint_card(folder)["settings"])
    differing = [f"{name} {value!r}, not {own[name]!r}" for name, value in trained.items() if own.get(name, value) != value]
    if differing:
        LOG.warning(
            "%s was meta-trained with %s: it is edited so, whatever hparams/MetaFT/%s.yaml says",
            model,
            "; ".join(differing),
            hparams_name,
        )
    return {**own, **trained}


def require_same_base(setup: Setup, kind: RowKind) -> None:
    """Rows differ by the meta-training alone, so every checkpoint must come from the base of the other rows.

    Raises:
        ConfigError: it comes from another one.
    """
    model = setup.model_of(kind)
    card = read_checkpoint_card(resolve_model_folder(model))
    if card.get("base_sha256") != hash_of_model(setup.model):
        raise ConfigError(
            f"{model} was meta-trained from other weights ({card['base_model']}) than {setup.model} has; "
            "meta-train it anew from this base (a bundled one is rebuilt after removing its folder in the cache)"
        )


def check_settings(kind: RowKind, settings: dict[str, Any], model: str, setup: Setup) -> None:
    """Refuse what the form of EasyEdit at hand cannot do, before hours are spent on other rows.

    Raises:
        ConfigError, EasyEditError: as ``make_hparams``.
    """
    if kind.edit in BASELINES:
        make_hparams(kind.edit, {**settings, "model_name": model, "device": setup.device})


def build_method(kind: RowKind, settings: dict[str, Any], model: str, setup: Setup) -> Method:
    """Load what a row needs; the tensors it will edit are fp32 whatever the rest is."""
    if kind.edit == "MetaFT":
        values = {**settings, "model_name": model, "device": setup.device, "dtype": setup.dtype}
        hparams = build_config(MetaFTHyperParams, values, f"the settings of {model}")
        loaded = _loaded(model, hparams.layers, setup, setup.dtype_of(kind))
        one = Editing(*loaded, apply_metaft_to_model, hparams, write=kind.write)
        return FineTuning(*loaded, one, hparams.edit)
    if kind.edit in BASELINES:
        hparams = make_hparams(kind.edit, {**settings, "model_name": model, "device": setup.device})
        loaded = _loaded(model, None, setup, setup.dtype_of(kind))
        make_contexts(kind.edit, *loaded, hparams, setup.seed)
        return Editing(*loaded, find_algorithm(kind.edit), hparams, one_by_one=kind.edit == "ROME", padding_side="right")
    loaded = _loaded(model, None, setup, setup.dtype)
    return InContext(*loaded) if kind.edit == "in-context" else Unedited(*loaded)


def _loaded(model: str, layers: list[int] | str | None, setup: Setup, dtype: str) -> tuple[Any, Any]:
    """In fp32 every row of a model can share it, since each edit is undone to the bit; else the edited layers differ."""
    edited = json.dumps(layers) if dtype != "float32" else "null"
    return _load_one(model, edited, setup.device, dtype)


_HELD: dict[tuple[str, str, str, str], tuple[Any, Any]] = {}  # at most one: the model that is in memory


def _load_one(model: str, layers: str, device: str, dtype: str) -> tuple[Any, Any]:
    key = (model, layers, device, dtype)
    if key not in _HELD:
        _HELD.clear()  # before the next one is loaded: two of 8B fit into few machines
        free_unused()
        _HELD[key] = load_model(model, device=device, dtype=dtype, layers=json.loads(layers))
    return _HELD[key]


@cache
def hash_of_model(model: str) -> str:
    """The hash of a model's weights, read once."""
    return model_sha256(resolve_model_folder(model))


def collect_versions(methods: list[str]) -> dict[str, str]:
    """What a row depends on besides its settings."""
    versions = {"python": platform.python_version(), "propmeta_edit": propmeta_edit.__version__}
    versions |= {"torch": torch.__version__, "transformers": transformers.__version__}
    if not any(METHODS[name].edit in BASELINES for name in methods):
        return versions
    return {**versions, "easyedit": find_form().version, "peft": version("peft")}
