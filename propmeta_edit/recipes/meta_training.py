"""Meta-training from settings to a checkpoint folder: the place where data, meta-training and evaluation meet."""

from __future__ import annotations

import itertools
import logging
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from propmeta_edit.data.cre import load_cre
from propmeta_edit.data.holdout import hold_out_validation
from propmeta_edit.edits.compute import choose_at_once
from propmeta_edit.errors import ConfigError
from propmeta_edit.evaluation.asking import check_case
from propmeta_edit.evaluation.companions import with_probes
from propmeta_edit.evaluation.counts import find_pairs
from propmeta_edit.evaluation.measures import as_record
from propmeta_edit.evaluation.runner import batches_of, choose_cases
from propmeta_edit.evaluation.scoring import contains_answer
from propmeta_edit.files import sha256_of_json
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.input_moments import require_input_moments, write_input_moments
from propmeta_edit.finetune.many_edits import many_edits
from propmeta_edit.finetune.weights import apply_snapshot, snapshot
from propmeta_edit.metatrain.checkpoint import save_checkpoint
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.processes import ALONE, Processes, find_processes, own_gpus
from propmeta_edit.metatrain.run import TrainingRun, unclaimed_removed
from propmeta_edit.metatrain.tasks import group_tasks, join_tasks, order_tasks
from propmeta_edit.metatrain.trainer import Report, meta_train
from propmeta_edit.models.artefacts import build_whole, holds_factors, require_no_adapter, resolve_model_folder
from propmeta_edit.models.devices import device_of, free_memory, memory_errors_named, resolve_device, resolve_dtype
from propmeta_edit.models.generation import MAX_NEW_TOKENS, generate_greedily
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.models.loading import load_model, model_sha256, read_checkpoint_card
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.recipes.sources import find_training_files
from propmeta_edit.recipes.worlds import WORLD, ensure_world
from propmeta_edit.records import OTHER, Case, MetaTask, Probe
from propmeta_edit.text.encoding import TextEncoder
from propmeta_edit.text.prompts import format_question

LOG = logging.getLogger(__name__)
OTHERS_ASKED = 2  # other subjects a validation case, for leak and net
EDITS_AT_ONCE = 8  # while validating, where they fit; more are no faster on a CPU


def load_tasks(config: MetaTrainConfig) -> tuple[list[MetaTask], dict[str, list[Case]]]:
    """The meta-training tasks of a run in the order they will be used, and its validation cases by split.

    The offline world has validation splits of its own, and a folder or a data set of the hub may have CRE's validation file. From a
    file alone, cases are held out of training, and only if ``config.validate_every`` asks for validation: the paper trains on all.
    """
    validation: dict[str, list[Case]] = {}
    needs_all = config.questions_per_task > 1 or config.has_groups
    choice = "all" if needs_all else config.question_choice
    if config.data == WORLD:
        world = ensure_world()
        cases = load_cre(world / "train_data_id.jsonl", question_choice=choice, seed=config.seed)
        if config.validate_every:
            for split in ("id", "ood"):
                validation[f"valid-{split}"] = load_cre(world / f"valid_data_{split}.jsonl", seed=config.seed)
    else:
        train_file, valid_file = find_training_files(config.data)
        cases = load_cre(train_file, question_choice=choice, seed=config.seed)
        if config.validate_every and valid_file is not None:
            validation["valid-id"] = load_cre(valid_file, seed=config.seed)
        elif config.validate_every:
            cases, validation = hold_out_validation(cases, config.validation_cases, config.seed)
    validation = {name: choose_cases(split, config.validation_cases, config.seed) for name, split in validation.items()}
    tasks = [case.as_task() for case in cases]
    if needs_all:
        tasks = join_tasks(tasks, config.seed)
    if config.has_groups:
        with_bystanders = "bystander" in config.outer_terms
        return group_tasks(tasks, config.sizes, config.seed, config.num_tasks, with_bystanders), validation
    return order_tasks(tasks, config.seed, config.num_tasks, config.pairing), validation


def run_meta_training(config: MetaTrainConfig, folder: Path, training: Path, processes: Processes = ALONE) -> None:
    """Meta-train as ``config`` says and write the checkpoint into ``folder`` (use ``build_whole`` around it).

    SIGTERM or Ctrl-C saves the state and ends the run with ``Stopped``.

    Args:
        folder: written by the first process alone.
        training: the folder of the run while it goes on; a run that was killed there is continued. At the end its curve, log
            and scheduled checkpoints are in ``folder/training``.
    """
    config = resolve(config, processes)
    tasks, validation = load_tasks(config)
    validation = {name: with_probes(cases, config.seed) for name, cases in validation.items()}
    base_folder = resolve_model_folder(config.model)
    require_no_adapter(base_folder, config.model)
    sums = {"base_sha256": model_sha256(base_folder), "tasks_sha256": hash_of_tasks(tasks)}
    identity = {**config.decisive, **sums, "processes": processes.count}
    run = TrainingRun(training, identity, config.rounding, is_writer=processes.is_main)
    processes.wait()
    with (
        unclaimed_removed(training) if processes.is_main else nullcontext(),
        logged_to(training / "log.txt" if processes.is_main else None),
        stopped_by_signals() as should_stop,
    ):
        report = make_report(config, training) if config.tracker and processes.is_main else None
        model, tokenizer = _load_for_training(config, base_folder)
        encoder = TextEncoder(tokenizer, model.config)
        for case in itertools.chain(*validation.values()):  # the tasks' own texts are encoded before the first step anyway
            check_case(encoder, case, MAX_NEW_TOKENS)
        trained = select_parameters(model, config.layers, config.modules)
        moments = require_input_moments(model, trained) if config.inner_step == "whitened" else None
        validate = partial(compute_validation, model, tokenizer, config.edit, validation, processes)
        progress = meta_train(model, tokenizer, tasks, config, run, validate, processes, should_stop, report)
    if not processes.is_main:
        return
    weights = snapshot(trained)
    # The frozen rest was rounded for speed; what is stored must be the base's own.
    model, _ = load_model(base_folder, dtype="auto", layers=config.layers, modules=config.modules, rank=config.rank)
    apply_snapshot(dict(model.named_parameters()), weights)
    card = {
        **_base_of(config.model, base_folder, sums["base_sha256"]),
        "trained_tensors": list(weights),
        "num_tasks": len(tasks),
        "tasks_sha256": sums["tasks_sha256"],
        "processes": processes.count,
        "seconds": round(progress.seconds, 1),
        "settings": asdict(config),
    }
    save_checkpoint(folder, model, tokenizer, card, progress)
    if moments is not None:  # of the base; an edit is to be weighed as in training
        write_input_moments(moments, folder)
    shutil.copytree(training, folder / "training", ignore=shutil.ignore_patterns("state*.safetensors", "*.partial"))


def _base_of(name: str, folder: str, sha256: str) -> dict[str, str]:
    """The model that a checkpoint belongs on, for its card: of factors that were trained further, the one below them."""
    if not holds_factors(folder):
        return {"base_model": name, "base_sha256": sha256}
    card = read_checkpoint_card(folder)
    return {"base_model": card["base_model"], "base_sha256": card["base_sha256"]}


def train_to_folder(config: MetaTrainConfig, output: Path) -> None:
    """``run_meta_training`` into a new folder, beside which ``<output>.training`` is kept until the checkpoint is whole."""
    training = training_folder(output)
    processes = find_processes(config.device)
    if not processes.is_main:
        run_meta_training(config, output, training, processes)
        return
    build_whole(output, lambda partial: run_meta_training(config, partial, training, processes))
    shutil.rmtree(training, ignore_errors=True)


def _load_for_training(config: MetaTrainConfig, folder: str) -> tuple[Any, Any]:
    """The model where this process computes, spread over the process's GPUs if the settings say so."""
    gpus = own_gpus() if config.shard else []
    if config.shard and len(gpus) < 2:
        LOG.warning("shard: this process has %d GPUs, over which nothing can be spread", len(gpus))
    chosen: dict[str, Any] = {"layers": config.layers, "modules": config.modules, "rank": config.rank}
    spread = gpus if len(gpus) > 1 and torch.device(config.device).type == "cuda" else None
    return load_model(folder, device=config.device, dtype=config.dtype, spread=spread, **chosen)


def make_report(config: MetaTrainConfig, folder: Path) -> Report:
    """What hands a run's numbers to the tracker named in the settings, through accelerate.

    Raises:
        ConfigError: accelerate knows no such tracker, or its package is not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    known = {str(name): tracker for name, tracker in LOGGER_TYPE_TO_CLASS.items()}
    if config.tracker not in known:
        raise ConfigError(f"tracker must be one of {', '.join(sorted(known))}, or null, got {config.tracker!r}")
    chosen = known[config.tracker]
    try:
        tracker = chosen("meta-training", logging_dir=folder) if chosen.requires_logging_directory else chosen("meta-training")
        if hasattr(tracker, "start"):
            tracker.start()
    except (ImportError, NameError) as error:
        raise ConfigError(f"the tracker {config.tracker} needs its package: pip install {config.tracker}") from error
    tracker.store_init_configuration({key: str(value) for key, value in asdict(config).items()})

    def report(num_tasks: int, numbers: dict[str, float]) -> None:
        tracker.log(numbers, step=num_tasks)

    return report


@contextmanager
def stopped_by_signals() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM (a scheduler's time limit) and a first Ctrl-C only set what the yielded function tells; a second Ctrl-C, and
    both outside, do what they did."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and asked:
            raise KeyboardInterrupt
        asked.append(number)
        LOG.warning("stopping after this step, with everything saved; Ctrl-C once more stops at once")

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def training_folder(output: Path) -> Path:
    """Where a run towards ``output`` keeps its state."""
    return output.with_name(output.name + ".training")


def compute_validation(
    model: LanguageModel,
    tokenizer: Tokenizer,
    settings: EditSettings,
    validation: Mapping[str, Sequence[Case]],
    processes: Processes = ALONE,
) -> dict[str, float]:
    """Two-hop accuracy after one edit a case, by split; and leak and net where cases ask about other subjects (``with_probes``).

    Leak and net are those of ``evaluation.counts``, shares in -1 to 1 over pairs of the edited subject and another one, of which
    neither had the edited consequence before. Processes share the cases.

    Returns:
        ``<split>``, ``<split> leak`` and ``<split> net``.

    Raises:
        ModelError: the edits do not fit in memory.
    """
    parameters = select_parameters(model, settings.layers, settings.modules)
    at_once = min(EDITS_AT_ONCE, choose_at_once(parameters, settings, free_memory(device_of(parameters))))
    scores = {}
    for name, cases in validation.items():
        right: list[bool] = []
        pairs: list[tuple[float, float]] = []
        for some in batches_of(cases[processes.rank :: processes.count], at_once):
            prompts = _questions_of(some)
            each = len(prompts) // len(some)
            is_compared = each > 1
            answer = partial(generate_greedily, model, tokenizer, prompts, batch_size=len(prompts), together=each)
            before = answer() if is_compared else [None] * len(prompts)
            with (
                memory_errors_named(
                    f"in validation, with {len(some)} edits at once, the first of them that of case {some[0].case_id}; edit fewer "
                    "layers or modules, leave validation out (validate_every: null), or make room (dtype bfloat16, or shard)"
                ),
                many_edits(model, tokenizer, [case.edits for case in some], settings),
            ):
                after = answer()
            for case, was, said in zip(some, batches_of(before, each), batches_of(after, each), strict=True):
                right.append(contains_answer(said[0], case.question.answers))
                others = [as_record(*probe) for probe in zip(_others_of(case), was[1:], said[1:], strict=False)]
                pairs += find_pairs(right[-1], was[0], case.question.answers, others)
        right, pairs = processes.join(right), processes.join(pairs)
        scores[name] = sum(right) / len(right)
        if pairs:
            scores[f"{name} leak"] = sum(leak for _, leak in pairs) / len(pairs)
            scores[f"{name} net"] = sum(own - leak for own, leak in pairs) / len(pairs)
    return scores


def _others_of(case: Case) -> list[Probe]:
    return [probe for probe in case.probes if probe.kind == OTHER][:OTHERS_ASKED]


def _questions_of(cases: Sequence[Case]) -> list[str]:
    """Each case's question and those about other subjects, as many a case: its own again where it has fewer."""
    asked = [[case.question, *(probe.question for probe in _others_of(case))] for case in cases]
    most = max(map(len, asked))
    return [format_question(q.text) for own in asked for q in (*own, *[own[0]] * (most - len(own)))]


def resolve(config: MetaTrainConfig, processes: Processes = ALONE) -> MetaTrainConfig:
    """The settings with the device and dtype they mean on this machine."""
    device = processes.device or resolve_device(config.device)
    return replace(config, device=device, dtype=resolve_dtype(config.dtype, device))


def hash_of_tasks(tasks: Sequence[MetaTask]) -> str:
    """One hash over what a run learns from, in its order."""
    return sha256_of_json([_texts_of(task) for task in tasks])


def _texts_of(task: MetaTask) -> list[Any]:
    own = [task.task_id, task.target.prompt, task.target.target_new, task.related.text, *(q.text for q in task.more_related)]
    bystander = [task.bystander.text] if task.bystander is not None else []
    return [*own, *([[_texts_of(other) for other in task.together]] if task.together else []), *bystander]


@contextmanager
def logged_to(path: Path | None) -> Iterator[None]:
    """Inside, the package's log lines go to a file too, after those that are there; None for no file."""
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("propmeta_edit")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()
