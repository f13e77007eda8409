"""The outer loop over all tasks: one pass, with progress, validation, checkpoints, and a state to continue from."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import fmean

import torch
from torch import nn

from propmeta_edit.errors import ModelError, PropMetaError
from propmeta_edit.finetune.buffers import kept_buffers
from propmeta_edit.finetune.learning import REMEDY, Learning, is_learnt, mean_learning
from propmeta_edit.finetune.saved_state import take_state, take_tensors
from propmeta_edit.finetune.single_edit import require_full_precision
from propmeta_edit.finetune.weights import only_trainable
from propmeta_edit.metatrain.background import BackgroundWriter
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.curve import draw_learning_curve
from propmeta_edit.metatrain.fomaml import TaskGradients, apply_outer_step, compute_task_gradients
from propmeta_edit.metatrain.outer_losses import make_outer_loss
from propmeta_edit.metatrain.processes import ALONE, Processes
from propmeta_edit.metatrain.run import Progress, TaskLosses, TrainingRun
from propmeta_edit.metatrain.task_texts import EncodedTasks, encode_step
from propmeta_edit.models.devices import memory_errors_named
from propmeta_edit.models.layers import num_parameters, select_parameters
from propmeta_edit.progress import progress_bar
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.records import MetaTask
from propmeta_edit.text.encoding import TextEncoder

LOG = logging.getLogger(__name__)
SMOOTHING = 0.98  # of the losses on the progress bar
FIRST_TASKS = 8  # after which it is told whether the inner loop writes its facts
LAST_TASKS = 100  # by which the same is told of a whole run

Report = Callable[[int, dict[str, float]], None]  # tasks done, numbers by name
Validate = Callable[[], dict[str, float]]  # what the model as it stands scores, by name


class Stopped(PropMetaError):
    """A run that was asked to stop has saved its state."""

    def __init__(self, num_done: int, num_tasks: int) -> None:
        super().__init__(f"stopped after {num_done} of {num_tasks} tasks; everything is saved, and the same command continues")


def meta_train(
    model: LanguageModel,
    tokenizer: Tokenizer,
    tasks: Sequence[MetaTask],
    config: MetaTrainConfig,
    run: TrainingRun | None = None,
    validate: Validate | None = None,
    processes: Processes = ALONE,
    should_stop: Callable[[], bool] = lambda: False,
    report: Report | None = None,
) -> Progress:
    """Meta-train ``model`` in place (Eq. 1-4): one pass over ``tasks`` in the order given.

    Everything outside the chosen layer and modules keeps its bits; flags and mode are as before on return.

    Args:
        run: where the state is saved, by tasks and minutes (``config``), by a thread, from a copy on the host; a state that is
            there is continued, to the same bits (on CUDA as far as torch's deterministic algorithms are on).
        validate: called on the model after every ``config.validate_every`` tasks, before the first and after the last.
        processes: each takes ``config.tasks_per_step`` tasks of every outer step; the first of them writes the files.
        report: called by the first process after every outer step with the tasks done and their mean losses, and with validation.
        should_stop: asked after every outer step; if any process says so, the state is saved and the run is over.

    Raises:
        Stopped: ``should_stop`` said so.
        RequestError: a text that cannot be used, before anything is trained.
        ModelError: a loss or an outer gradient that is not finite (the task, or the step's tasks, are named; no weight has seen
            it), out of memory, a disk that is full, tensors to train that are not fp32 or wider, or a layer outside the model.
    """
    parameters = select_parameters(model, config.layers, config.modules)
    require_full_precision(parameters)
    LOG.info("training %d tensors, %.2f M numbers, on %d tasks", len(parameters), num_parameters(parameters) / 1e6, len(tasks))
    optimizer = torch.optim.AdamW(list(parameters.values()), lr=config.outer_lr, weight_decay=config.weight_decay, fused=True)
    progress = run.load(parameters, optimizer) if run else Progress()
    done = len(progress.losses)
    steps = _encode_steps(TextEncoder(tokenizer, model.config), tasks, done, config, processes)
    if run:
        run.claim()
    buffers = own_buffers(config, model.device)
    bar = progress_bar(
        total=len(tasks), initial=done, desc="meta-training", unit="task", smoothing=0.05, hidden=not processes.is_main
    )
    first: list[Learning] = []
    tell = report if report and processes.is_main else _tell_nobody
    with only_trainable(model, parameters), bar, BackgroundWriter() as writer:
        keeper = _Keeper(run, writer, config) if run and processes.is_main else None
        if done == 0 and config.validate_every:
            _validate(validate, progress)
        while done < len(tasks):
            started = time.perf_counter()
            with kept_buffers(buffers):
                gradients = compute_step_gradients(model, parameters, steps[done], config)
            losses = _read_losses(steps[done], gradients)  # before θ moves: what is not finite must reach no weight and no file
            if done < FIRST_TASKS:
                first += read_task_learning(gradients, config.num_inner_steps)
            optimizer.param_groups[0]["lr"] = outer_learning_rate(config, done, len(tasks))
            with _outer_errors_named(tasks[done : done + config.tasks_per_step * processes.count], done):
                apply_outer_step(optimizer, parameters, gradients, processes)
            del gradients  # as large as what is trained; the next step needs the room
            progress.losses += processes.join(losses)
            progress.seconds += time.perf_counter() - started
            before, done = done, len(progress.losses)
            is_last = done == len(tasks)
            if first and (is_last or done >= FIRST_TASKS):
                LOG.log(*describe_learning(first, f"of the first {len(first)} tasks"))
                first = []
            tell(done, _mean_losses(progress.losses[before:]))
            if config.validate_every and (is_last or _has_passed(config.validate_every, before, done)):
                tell(done, _validate(validate, progress))
            is_stopped = processes.any_says(should_stop())
            if keeper:
                keeper.keep(parameters, optimizer, progress, before, is_over=is_last or is_stopped)
            bar.set_postfix(_smoothed(progress.losses))
            bar.update(done - before)
            if is_stopped and not is_last:
                raise Stopped(done, len(tasks))
    _warn_if_not_learnt(progress, config)
    return progress


def own_buffers(config: MetaTrainConfig, device: torch.device) -> dict[str, torch.Tensor] | None:
    """What a run's steps leave to each other (``finetune.buffers``): nothing yet, or None for new tensors every time."""
    is_wanted = device.type == "cpu" if config.keep_buffers is None else config.keep_buffers
    return {} if is_wanted else None


def read_task_learning(gradients: TaskGradients | None, num_steps: int) -> list[Learning]:
    """How the inner loop of each of a step's tasks went; nothing with fewer than two steps."""
    if gradients is None or gradients.first_losses is None or gradients.target_losses is None:
        return []
    pairs = zip(gradients.first_losses.tolist(), gradients.target_losses.tolist(), strict=True)
    return [Learning(before, last, num_steps) for before, last in pairs if num_steps > 1]


def describe_learning(found: Sequence[Learning], what: str) -> tuple[int, str]:
    """Level and text of what is to be said of the tasks that ``what`` names."""
    mean = mean_learning(found)
    if mean.is_learnt:
        return logging.INFO, f"{what}: {mean}"
    return (
        logging.WARNING,
        f"{what}: {mean}: the inner loop does not write its facts, and nothing can follow from them; {REMEDY}",
    )


def _warn_if_not_learnt(progress: Progress, config: MetaTrainConfig) -> None:
    """Tell, at the end of a run, that an edit with its settings does not write a fact."""
    last = [loss.target_loss for loss in progress.losses[-LAST_TASKS:] if loss.target_loss is not None]
    if config.num_inner_steps > 1 and last and not is_learnt(fmean(last)):
        LOG.warning(
            "the target loss is %.2f over the last %d tasks: an edit with these settings does not write its fact; %s",
            fmean(last),
            len(last),
            REMEDY,
        )


def _encode_steps(
    encoder: TextEncoder, tasks: Sequence[MetaTask], done: int, config: MetaTrainConfig, processes: Processes
) -> dict[int, list[EncodedTasks]]:
    """This process's own tasks of every outer step that is left, by how many tasks are done before it."""
    tasks_per_step = config.tasks_per_step * processes.count
    first = config.tasks_per_step * processes.rank
    return {
        start: encode_step(encoder, tasks[start + first : start + first + config.tasks_per_step], config)
        for start in range(done, len(tasks), tasks_per_step)
    }


@contextmanager
def _outer_errors_named(tasks: Sequence[MetaTask], done: int) -> Iterator[None]:
    """Inside, what goes wrong in the outer step of these tasks is a ``ModelError`` that says so, and what to do."""
    try:
        with memory_errors_named(
            f"in the outer step after {done} tasks: there is no room for a gradient and AdamW's two moments of the trained "
            "tensors; train fewer layers or modules, or make room (dtype bfloat16, or shard)"
        ):
            yield
    except FloatingPointError as error:
        names = ", ".join(task.task_id for task in tasks)
        raise ModelError(f"{error} over tasks {done + 1} to {done + len(tasks)} ({names}); lower inner_lr or outer_lr") from error


class _Keeper:
    """Writes what is due after a step: the trained tensors on the schedule, the state, the learning curve.

    Each is written by a thread, from a copy on the host. The next copy waits until the one before is written and gone.
    """

    def __init__(self, run: TrainingRun, writer: BackgroundWriter, config: MetaTrainConfig) -> None:
        self._run, self._writer, self._config = run, writer, config
        self._saved_at = time.monotonic()

    def keep(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        before: int,
        is_over: bool,
    ) -> None:
        """What is due after the tasks since ``before``; if the run ``is_over``, all of it is on disk on return.

        Raises:
            ModelError: what was due, or what was begun earlier, cannot be written.
        """
        done = len(progress.losses)
        is_kept = _has_passed(self._config.checkpoint_every, before, done)
        is_saved = is_over or self._is_late() or _has_passed(self._config.save_every, before, done)
        self._writer.check()
        if is_kept or is_saved:
            self._writer.wait()
            state = take_state(parameters, optimizer) if is_saved else take_tensors(parameters)
            self._writer.start(partial(self._write, state, progress.copy(), is_kept, is_saved))
        if is_saved:
            self._saved_at = time.monotonic()
        if is_over:
            self._writer.wait()

    def _is_late(self) -> bool:
        minutes = self._config.save_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def _write(self, state: Mapping[str, torch.Tensor], progress: Progress, is_kept: bool, is_saved: bool) -> None:
        if is_kept:
            self._run.write_checkpoint(state, len(progress.losses))
        if is_saved:
            self._run.save(state, progress)
            draw_learning_curve(progress, self._run.folder / "learning_curve.png")


def _has_passed(every: int | None, before: int, done: int) -> bool:
    """Whether a multiple of ``every`` tasks lies among those that were done last."""
    return every is not None and before // every < done // every


def _tell_nobody(num_done: int, numbers: dict[str, float]) -> None:
    """A report that nobody asked for."""


def outer_learning_rate(config: MetaTrainConfig, num_done: int, num_tasks: int) -> float:
    """β of the outer step after ``num_done`` of ``num_tasks`` tasks; it depends on nothing else, so a resumed run has the same."""
    if config.outer_schedule == "linear":
        return config.outer_lr * (1 - num_done / num_tasks)
    return config.outer_lr


def compute_step_gradients(
    model: LanguageModel, parameters: Mapping[str, nn.Parameter], parts: Sequence[EncodedTasks], config: MetaTrainConfig
) -> TaskGradients | None:
    """The gradients of one outer step's tasks, one part after another; no weight is changed.

    Returns:
        Their sum, in which each part is added up as soon as it is there; None without tasks.

    Raises:
        ModelError: they do not fit in memory.
    """
    total = None
    for encoded in parts:
        number, first = len(encoded.tasks), encoded.tasks[0]
        with memory_errors_named(
            f"with {number} tasks at once, the first of them {first.task_id} ({first.target.prompt!r}); "
            + (
                f"set tasks_at_once to less than {number}"
                if number > 1
                else "the model itself is too large for this device: dtype bfloat16, or shard"
            )
        ):
            part = _compute_gradients(model, parameters, encoded, config)
            total = part if total is None else total.take_in(part)
            del part  # two of them beside each other are one too many while the next is computed
    return total


def _compute_gradients(
    model: LanguageModel, parameters: Mapping[str, nn.Parameter], encoded: EncodedTasks, config: MetaTrainConfig
) -> TaskGradients:
    encoded = encoded.to(model.device)
    outer_loss = make_outer_loss(model, encoded, config)
    return compute_task_gradients(model, parameters, encoded.target, outer_loss, config.edit, len(encoded.tasks))


def _validate(validate: Validate | None, progress: Progress) -> dict[str, float]:
    """Note what validation gives, by name; nothing where there is none."""
    if validate is None:
        return {}
    scores = validate()
    progress.validation.append({"num_tasks": len(progress.losses), **scores})
    LOG.info("after %d tasks: %s", len(progress.losses), ", ".join(f"{name} {100 * v:.1f} %" for name, v in scores.items()))
    return scores


def _read_losses(parts: Sequence[EncodedTasks], gradients: TaskGradients | None) -> list[TaskLosses]:
    if gradients is None:
        return []
    tasks = [task for encoded in parts for task in encoded.tasks]
    related = gradients.related_losses.tolist()
    target = [None] * len(tasks) if gradients.target_losses is None else gradients.target_losses.tolist()
    for task, target_loss, related_loss in zip(tasks, target, related, strict=True):
        if not math.isfinite(related_loss) or not math.isfinite(target_loss or 0.0):
            raise ModelError(
                f"task {task.task_id} ({task.target.prompt!r} -> {task.target.target_new!r}) gave target loss {target_loss} and "
                f"related loss {related_loss}; lower inner_lr or outer_lr, and keep the trained tensors in fp32"
            )
    return [TaskLosses(task.task_id, *losses) for task, *losses in zip(tasks, target, related, strict=True)]


def _mean_losses(losses: Sequence[TaskLosses]) -> dict[str, float]:
    found = {"related_loss": [x.related_loss for x in losses]}
    found["target_loss"] = [x.target_loss for x in losses if x.target_loss is not None]
    return {name: fmean(values) for name, values in found.items() if values}


def _smoothed(losses: Sequence[TaskLosses]) -> dict[str, str]:
    """Recent losses, later tasks weighing more."""
    recent = list(losses[-200:])
    weights = [SMOOTHING**age for age in range(len(recent))][::-1]
    shown = {"related": sum(w * h.related_loss for w, h in zip(weights, recent, strict=True)) / sum(weights)}
    if recent[-1].target_loss is not None:
        shown["target"] = sum(w * (h.target_loss or 0.0) for w, h in zip(weights, recent, strict=True)) / sum(weights)
    return {name: f"{value:.3f}" for name, value in shown.items()}
