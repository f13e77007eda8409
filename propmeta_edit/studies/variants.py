"""A variant: which model, how it was meta-trained, how it is edited, and which cases it is asked; and how it is made ready."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from propmeta_edit.config import build_config, read_yaml
from propmeta_edit.easyedit.algorithms import (
    BASELINES,
    NEEDS_STATISTICS,
    EditWith,
    fill_layers,
    find_algorithm,
    make_contexts,
    make_hparams,
)
from propmeta_edit.easyedit.forms import find_form
from propmeta_edit.easyedit.hparams import MetaFTHyperParams, edit_settings_of
from propmeta_edit.evaluation.asking import Examiner
from propmeta_edit.evaluation.methods import (
    Editing,
    FineTuning,
    Guessing,
    InContext,
    Unedited,
    as_it_is,
    commonest_answer,
    newest_object,
)
from propmeta_edit.evaluation.rows import protocol_of
from propmeta_edit.evaluation.runner import Method, MethodSpec
from propmeta_edit.files import sha256_of_file, sha256_of_json
from propmeta_edit.finetune.weights import apply_snapshot
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.run import read_kept_state
from propmeta_edit.models.artefacts import find_model_folder, resolve_model_folder
from propmeta_edit.models.devices import free_unused
from propmeta_edit.models.generation import MAX_NEW_TOKENS
from propmeta_edit.models.loading import load_model, read_checkpoint_card, require_trained_from
from propmeta_edit.recipes.meta_training import EDITS_AT_ONCE, resolve
from propmeta_edit.recipes.statistics import ensure_statistics
from propmeta_edit.records import Case, EditRequest
from propmeta_edit.settings import has_hparams, hparams_file
from propmeta_edit.studies.runs import ensure_run, folder_of_run, hash_of_model, state_after, train_until, training_seconds

GUESSES = {"newest object": newest_object, "commonest answer": commonest_answer}
LOG = logging.getLogger(__name__)
REMEDY = "name its own base with --model, or meta-train this one (a bundled one is rebuilt after removing its folder in the cache)"


@dataclass(frozen=True)
class Variant:
    """One row of a study.

    Args:
        name: of its rows, for people; no program reads anything out of it.
        edit: ``MetaFT`` for the inner loop, an algorithm of EasyEdit's, ``in-context``, one of ``GUESSES``, or ``""`` for none.
        checkpoint: the meta-trained model it starts from, by the short name that ``Bench.model_of`` knows; ``""`` for the base.
        training: in place of ``checkpoint``: how the study itself meta-trains it; its inner loop is that of the edit too.
        num_tasks: of ``training``, the state after so many tasks; 0 is the base, None the end.
        stops_there: meta-train no further than ``num_tasks``, for a search that drops most of its candidates on the way.
        hparams: the folder of ``hparams/`` with its YAML; ``""`` for the one named as ``edit``.
        edits_as_trained: with its own checkpoint's inner loop, and not with MetaFT's.
        settings: of the edit, over those of its YAML.
        coordinates: where it stands in tables and pictures, by column.
        adapt: makes its cases from the data set's.
        write: the requests that stand for one fact.
        texts_version: of the texts that ``adapt`` or ``write`` bring along; another version makes other rows.
    """

    name: str
    edit: str = "MetaFT"
    checkpoint: str = ""
    training: MetaTrainConfig | None = None
    num_tasks: int | None = None
    stops_there: bool = False
    hparams: str = ""
    edits_as_trained: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    coordinates: Mapping[str, Any] = field(default_factory=dict)
    adapt: Callable[[Sequence[Case]], Sequence[Case]] = list
    write: Callable[[EditRequest], list[EditRequest]] = as_it_is
    texts_version: int | None = None

    @property
    def run(self) -> MetaTrainConfig | None:
        """The meta-training that the study has to do for it."""
        return None if self.num_tasks == 0 else self.training


@dataclass(frozen=True)
class Bench:
    """What all variants of a study share.

    Args:
        model: the base; of a variant with a ``training`` of its own the one that this names.
        hparams: the name of the YAMLs in ``hparams/<method>/``.
        hparams_dir: a folder of one's own that is laid out like ``hparams/`` and looked into first.
        checkpoints: meta-trained models by their short names; else ``<model>-<short name>``.
        folder: of the study; its meta-training runs are in ``checkpoints/`` there.
    """

    model: str
    hparams: str
    device: str
    dtype: str
    seed: int = 0
    hparams_dir: str | None = None
    max_new_tokens: int = MAX_NEW_TOKENS
    checkpoints: Mapping[str, str] = field(default_factory=dict)
    edits_at_once: int = EDITS_AT_ONCE
    folder: Path = Path()

    def model_of(self, variant: Variant) -> str:
        """The model a variant starts from, where that is not one the study makes."""
        if variant.training is not None:
            return variant.training.model
        if not variant.checkpoint:
            return self.model
        return self.checkpoints.get(variant.checkpoint, f"{self.model.rstrip('/')}-{variant.checkpoint}")

    def dtype_of(self, variant: Variant) -> str:
        """Of the frozen rest; EasyEdit's algorithms do not mix dtypes, so their model is fp32."""
        if variant.training is not None:
            return resolve(variant.training).dtype
        return "float32" if variant.edit in BASELINES else self.dtype


def prepare(variant: Variant, bench: Bench) -> MethodSpec:
    """A variant with all that decides its rows; no model is loaded yet, but what it starts from is made if it has to be.

    Raises:
        ConfigError, DataError, ModelError: settings, a checkpoint or second moments that are missing or do not fit.
    """
    return _prepare_listed(variant, bench) if variant.training is None else _prepare_trained(variant, variant.training, bench)


def _prepare_listed(variant: Variant, bench: Bench) -> MethodSpec:
    model = bench.model_of(variant)
    if variant.checkpoint:  # rows differ by the meta-training alone
        require_trained_from(resolve_model_folder(model), bench.model, hash_of_model(bench.model), REMEDY)
    settings = fill_layers(variant.edit, read_settings(variant, bench), model)
    precomputation = training_seconds(model) if variant.checkpoint else {}
    identity = {**settings, "model_name": model, "device": bench.device, "dtype": bench.dtype_of(variant)}
    if variant.texts_version is not None:
        identity["texts"] = variant.texts_version
    if variant.edit in BASELINES:
        identity["easyedit"] = find_form().kind
        if variant.edit in NEEDS_STATISTICS:
            statistics = ensure_statistics(model, settings, bench.device)
            settings["stats_dir"], identity["stats_dir"] = statistics.folder, statistics.sha256
            precomputation |= statistics.seconds
    return MethodSpec(
        name=variant.name,
        model=model,
        model_sha256=hash_of_model(model),
        hparams_sha256=sha256_of_json(identity),
        build=partial(_build_listed, variant, settings, bench),
        protocol=protocol_of(bench.max_new_tokens),
        check=partial(_check_settings, variant, settings, bench),
        dtype=bench.dtype_of(variant),
        device=bench.device,
        adapt=variant.adapt,
        precomputation=precomputation,
        base_sha256=_base_of(model) if variant.checkpoint else "",
        cases_at_once=1 if variant.edit in BASELINES else bench.edits_at_once,
        settings=identity,
    )


def _base_of(model: str) -> str:
    """The hash of the model from which a checkpoint was meta-trained, as its card knows it."""
    return str(read_checkpoint_card(resolve_model_folder(model))["base_sha256"])


def _prepare_trained(variant: Variant, training: MetaTrainConfig, bench: Bench) -> MethodSpec:
    config = resolve(training)
    model, start, weights = config.model, config.model, None
    if variant.run is not None and variant.stops_there and variant.num_tasks is not None:
        model, weights = str(folder_of_run(config, bench.folder)), train_until(config, bench.folder, variant.num_tasks)
    elif variant.run is not None:
        model = start = str(ensure_run(config, bench.folder))
        weights = None if variant.num_tasks is None else state_after(Path(model), variant.num_tasks)
    values = {**edit_settings_of(asdict(config)), "model_name": start, "device": config.device, "dtype": config.dtype}
    hparams = build_config(MetaFTHyperParams, values, variant.name)
    identity = {**hparams.edit.to_dict(), "dtype": config.dtype}
    identity["weights"] = None if weights is None else sha256_of_file(weights)
    return MethodSpec(
        name=variant.name,
        model=model,
        model_sha256=hash_of_model(start),
        hparams_sha256=sha256_of_json(identity),
        build=partial(_build_trained, hparams, weights, bench.max_new_tokens),
        protocol=protocol_of(bench.max_new_tokens),
        dtype=config.dtype,
        device=config.device,
        cases_at_once=EDITS_AT_ONCE,
        precomputation={} if variant.run is None or variant.stops_there else training_seconds(model, variant.num_tasks),
        settings={**({"model": config.model} if variant.run is None else asdict(config)), **identity},
    )


def read_settings(variant: Variant, bench: Bench) -> dict[str, Any]:
    """A listed variant's settings: of its YAML, but as the meta-tuned checkpoint was trained where it edits like MetaFT.

    Without YAMLs of their own, FT and its variants edit as the checkpoint was trained too.

    Raises:
        ConfigError: no YAML for an algorithm of EasyEdit's.
        ModelError: no checkpoint where one is needed, or one without its card.
    """
    if variant.edit not in ("MetaFT", *BASELINES):
        return {}
    folder = variant.hparams or variant.edit
    if variant.edits_as_trained:
        own = edit_settings_of(read_checkpoint_card(resolve_model_folder(bench.model_of(variant)))["settings"])
    elif variant.edit in BASELINES or (folder != "MetaFT" and has_hparams(folder, bench.hparams, bench.hparams_dir)):
        own = read_yaml(hparams_file(folder, bench.hparams, bench.hparams_dir))
    elif folder not in ("MetaFT", "FT") and has_hparams("FT", bench.hparams, bench.hparams_dir):
        own = read_yaml(hparams_file("FT", bench.hparams, bench.hparams_dir))
    else:
        own = _settings_of_metaft(bench.model_of(Variant("MetaFT", checkpoint="metaft")), bench)
    return {**own, **variant.settings}


def _settings_of_metaft(model: str, bench: Bench) -> dict[str, Any]:
    """What the checkpoint's card says, and what a YAML says besides."""
    where = "MetaFT", bench.hparams, bench.hparams_dir
    own = read_yaml(hparams_file(*where)) if has_hparams(*where) else {}
    folder = find_model_folder(model) if own else resolve_model_folder(model)
    if folder is None:  # a row of the base, where the checkpoint is not at hand
        return own
    trained = edit_settings_of(read_checkpoint_card(folder)["settings"])
    differing = [f"{key} {value!r}, not {own[key]!r}" for key, value in trained.items() if own.get(key, value) != value]
    if differing:
        LOG.warning(
            "%s was meta-trained with %s: it is edited so, whatever hparams/MetaFT/%s.yaml says",
            model,
            "; ".join(differing),
            bench.hparams,
        )
    return {**own, **trained}


def _check_settings(variant: Variant, settings: Mapping[str, Any], bench: Bench) -> None:
    """Refuse what the form of EasyEdit at hand cannot do, before hours are spent on other rows.

    Raises:
        ConfigError, EasyEditError: as ``make_hparams``.
    """
    if variant.edit in BASELINES:
        make_hparams(variant.edit, {**settings, "model_name": bench.model_of(variant), "device": bench.device})


def _build_listed(variant: Variant, settings: Mapping[str, Any], bench: Bench) -> Method:
    """Load what a row needs; the tensors it will edit are fp32 whatever the rest is."""
    if variant.edit in GUESSES:
        return Guessing(GUESSES[variant.edit])
    model = bench.model_of(variant)
    values = {**settings, "model_name": model, "device": bench.device}
    if variant.edit == "MetaFT":
        hparams = build_config(MetaFTHyperParams, {**values, "dtype": bench.dtype}, f"the settings of {model}")
        return FineTuning(_load_shared(model, hparams.layers, bench, bench.dtype), hparams.edit, variant.write)
    examiner = _load_shared(model, None, bench, bench.dtype_of(variant))
    if variant.edit in BASELINES:
        loaded = examiner.model, examiner.tokenizer
        hparams = make_hparams(variant.edit, values)
        make_contexts(variant.edit, *loaded, hparams, bench.seed)
        one_by_one = variant.edit == "ROME"
        return Editing(examiner, EditWith(*loaded, find_algorithm(variant.edit), hparams, one_by_one=one_by_one))
    return InContext(examiner) if variant.edit == "in-context" else Unedited(examiner)


def _build_trained(hparams: MetaFTHyperParams, weights: Path | None, max_new_tokens: int) -> Method:
    model, tokenizer = hparams.load_model()
    if weights is not None:
        apply_snapshot(dict(model.named_parameters()), read_kept_state(weights))
    return FineTuning(Examiner(model, tokenizer, max_new_tokens), hparams.edit)


_HELD: dict[tuple[str, str, str, str, int], Examiner] = {}  # at most one: the model that is in memory


def _load_shared(model: str, layers: Sequence[int] | str | None, bench: Bench, dtype: str) -> Examiner:
    """In fp32 every variant of a model can share it, since each edit is undone to the bit; else the edited layers differ."""
    key = (model, json.dumps(layers) if dtype != "float32" else "null", bench.device, dtype, bench.max_new_tokens)
    if key not in _HELD:
        _HELD.clear()  # before the next one is loaded: two of 8B fit into few machines
        free_unused()
        loaded = load_model(model, device=bench.device, dtype=dtype, layers=json.loads(key[1]))
        _HELD[key] = Examiner(*loaded, bench.max_new_tokens)
    return _HELD[key]
