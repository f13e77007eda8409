"""The small model on the paper's own data: made on first use from files that the user names, since none of them is shipped.

``smollm2-135m-real`` is SmolLM2 taught the single hops of CRE and MQuAKE-CF-3k; ``smollm2-135m-real-metaft`` and
``smollm2-135m-real-bound`` are meta-trained on CRE's training file from it, the latter with two other seeds too. The files are
found in the folder that ``PROPMETA_DATA`` names. What the first three trainings changed comes with the package (a LoRA and
differences; no record of the data), and saves them wherever the files are the same to the bit.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from propmeta_edit.config import build_config
from propmeta_edit.files import sha256_of_file, write_json_atomically
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.models.artefacts import ADAPTER, artefact_folder, build_whole, resolve_model_folder
from propmeta_edit.models.differences import DIFFERENCE, merge_adapter
from propmeta_edit.models.loading import load_model, model_sha256, save_model
from propmeta_edit.recipes.bundled import (
    CARD,
    RAW,
    Training,
    add_difference,
    read_card,
    read_training,
    require_new,
    shipped_folder,
    train_difference,
)
from propmeta_edit.recipes.bundled import origin_of as origin_of_bundled
from propmeta_edit.recipes.meta_training import hash_of_tasks, load_tasks, run_meta_training, training_folder
from propmeta_edit.recipes.released import DATA_VARIABLE, find_released
from propmeta_edit.recipes.teaching import CARD as TAUGHT_CARD
from propmeta_edit.recipes.teaching import (
    LORA,
    Lesson,
    TeachingSettings,
    describe_origin,
    describe_taught,
    read_lesson,
    teach_into,
)

REAL, REAL_METAFT, REAL_BOUND = "smollm2-135m-real", "smollm2-135m-real-metaft", "smollm2-135m-real-bound"
TRAININGS: dict[str, Training] = {  # of the meta-trained
    REAL_METAFT: ("smollm2-135m-real", {}),
    REAL_BOUND: ("smollm2-135m-real-bound", {}),
    **{f"{REAL_BOUND}-seed{seed}": ("smollm2-135m-real-bound", {"seed": seed}) for seed in (1, 2)},
}
TAUGHT = ("cre-train", "cre-id", "cre-ood", "mquake-3k")  # whose second hops the base knows
TRAINING = "cre-train"
QUESTIONS_ASKED, MULTI_HOP_ASKED = 500, 300  # of each file, before and after teaching


def origin_of(name: str) -> list[Any]:
    """What one of them is made from, as JSON.

    Raises:
        DataError: a file is not there, or no folder is named.
    """
    taught = [sha256_of_file(find_released(data)) for data in TAUGHT]
    base = [origin_of_bundled(RAW), asdict(TeachingSettings()), taught]
    return base if name == REAL else [base, read_training(TRAININGS[name])[0], taught[0]]


def build(name: str, folder: Path) -> None:
    """Make one of them in an empty folder.

    Where the user's files are those that the package's small files were made with, seconds; else by training: an hour or more on a
    laptop each, and a build that was stopped goes on.
    """
    if name == REAL:
        _build_base(folder)
    else:
        _build_trained(name, folder)


def _build_base(folder: Path) -> None:
    lesson, settings = _read_lesson()
    card = _find_shipped(REAL, ADAPTER)
    raw = resolve_model_folder(RAW)
    if card is not None and card["made_from"] == describe_origin(raw, lesson, settings):
        print(f"preparing {REAL} from what teaching it left", flush=True)
        model, tokenizer = load_model(raw)
        merge_adapter(model, shipped_folder(REAL))
        save_model(model, tokenizer, folder)
        write_json_atomically(folder / TAUGHT_CARD, {**card, "model_sha256": model_sha256(folder)})
        return
    print(f"preparing {REAL}: teaching {RAW} the single hops of {', '.join(TAUGHT)}", flush=True)
    states = training_folder(artefact_folder(REAL))
    print(describe_taught(teach_into(RAW, lesson, settings, folder, states)))
    shutil.rmtree(states, ignore_errors=True)


def _read_lesson() -> tuple[Lesson, TeachingSettings]:
    settings = TeachingSettings()
    files = [str(find_released(data)) for data in TAUGHT]
    return read_lesson(files, QUESTIONS_ASKED, MULTI_HOP_ASKED, settings.seed), settings


def _read_config(name: str) -> MetaTrainConfig:
    return replace(build_config(MetaTrainConfig, *read_training(TRAININGS[name])), data=str(find_released(TRAINING)))


def _build_trained(name: str, folder: Path) -> None:
    base_folder, config = resolve_model_folder(REAL), _read_config(name)
    card = _find_shipped(name, DIFFERENCE)
    if card is not None and card["base_sha256"] == model_sha256(base_folder) and _has_same_tasks(card, config):
        print(f"preparing {name} from the difference that meta-training made", flush=True)
        add_difference(base_folder, shipped_folder(name), card, folder)
        return
    print(f"preparing {name}: meta-training with {read_training(TRAININGS[name])[1]}", flush=True)
    states = training_folder(artefact_folder(name))
    run_meta_training(config, folder, states)
    shutil.rmtree(states, ignore_errors=True)


def _has_same_tasks(card: Mapping[str, Any], config: MetaTrainConfig) -> bool:
    """Whether a checkpoint was meta-trained as ``config`` says, wherever the file and the device were."""
    both = (build_config(MetaTrainConfig, card["settings"], "the card of a checkpoint"), config)
    then, now = (replace(one, data="", device="auto", dtype="fast").decisive for one in both)
    return then == now and card["tasks_sha256"] == hash_of_tasks(load_tasks(config)[0])


def _find_shipped(name: str, file: str) -> dict[str, Any] | None:
    """The card of one of the two's small files, if the package has them."""
    folder = shipped_folder(name)
    return read_card(folder, file) if folder.is_dir() else None


def rebuild(name: str, output: Path) -> None:
    """Make the small files of one of them anew in a new folder, by the training that they came from.

    Raises:
        ModelError: ``output`` exists.
    """
    require_new(output)
    build_whole(output, partial(_rebuild, name, training_folder(output)))


def _rebuild(name: str, states: Path, folder: Path) -> None:
    if name in TRAININGS:
        train_difference(_read_config(name), states, folder)
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        card["settings"]["data"] = f"{TRAINING} in {DATA_VARIABLE}"  # and not where it lay here
        write_json_atomically(folder / CARD, card)
        return
    lesson, settings = _read_lesson()
    with tempfile.TemporaryDirectory(dir=folder) as whole:
        card = teach_into(RAW, lesson, settings, Path(whole), states)
        shutil.copytree(Path(whole) / LORA, folder, dirs_exist_ok=True)
    write_json_atomically(folder / CARD, {"name": REAL, **card, "sha256": sha256_of_file(folder / ADAPTER)})
    shutil.rmtree(states, ignore_errors=True)
