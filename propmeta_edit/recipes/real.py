"""The small model on the paper's own data: made on first use from files that the user names, since none of them is shipped.

``smollm2-135m-real`` is SmolLM2 taught the single hops of CRE and MQuAKE-CF-3k; ``smollm2-135m-real-metaft`` is meta-trained on
CRE's training file from it. The files are found in the folder that ``PROPMETA_DATA`` names.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from propmeta_edit.config import build_config, read_yaml
from propmeta_edit.files import sha256_of_file
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.models.artefacts import artefact_folder
from propmeta_edit.recipes.bundled import RAW
from propmeta_edit.recipes.bundled import origin_of as origin_of_bundled
from propmeta_edit.recipes.meta_training import run_meta_training, training_folder
from propmeta_edit.recipes.released import find_released
from propmeta_edit.recipes.settings import hparams_file
from propmeta_edit.recipes.teaching import TeachingSettings, describe_taught, read_lesson, teach_into

REAL, REAL_METAFT = "smollm2-135m-real", "smollm2-135m-real-metaft"
TAUGHT = ("cre-train", "cre-id", "cre-ood", "mquake-3k")  # whose second hops the base knows
TRAINING = "cre-train"
QUESTIONS_ASKED, MULTI_HOP_ASKED = 500, 300  # of each file, before and after teaching


def origin_of(name: str) -> list[Any]:
    """What one of the two is made from, as JSON.

    Raises:
        DataError: a file is not there, or no folder is named.
    """
    taught = [sha256_of_file(find_released(data)) for data in TAUGHT]
    base = [origin_of_bundled(RAW), asdict(TeachingSettings()), taught]
    return base if name == REAL else [base, read_yaml(hparams_file("MetaTrain", REAL)), taught[0]]


def build(name: str, folder: Path) -> None:
    """Make one of the two in an empty folder; an hour or more on a laptop each, and a build that was stopped goes on."""
    states = training_folder(artefact_folder(name))
    if name == REAL:
        print(f"preparing {REAL}: teaching {RAW} the single hops of {', '.join(TAUGHT)}", flush=True)
        settings = TeachingSettings()
        files = [str(find_released(data)) for data in TAUGHT]
        lesson = read_lesson(files, QUESTIONS_ASKED, MULTI_HOP_ASKED, settings.seed)
        print(describe_taught(teach_into(RAW, lesson, settings, folder, states)))
    else:
        path = hparams_file("MetaTrain", REAL)
        print(f"preparing {REAL_METAFT}: meta-training with {path.parent.name}/{path.name}", flush=True)
        config = build_config(MetaTrainConfig, read_yaml(path), str(path))
        run_meta_training(replace(config, data=str(find_released(TRAINING))), folder, states)
    shutil.rmtree(states, ignore_errors=True)
