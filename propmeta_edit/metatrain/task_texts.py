"""What tasks are trained on as token ids, all of it made before the first step: no step waits for a tokenizer, and text that cannot
be used ends a run at its start and not after hours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from propmeta_edit.errors import ModelError, record_named
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.tasks import question_of
from propmeta_edit.records import MetaTask, Question
from propmeta_edit.text.encoding import (
    IGNORED,
    EncodedBatch,
    EncodedText,
    TextEncoder,
    collate,
    encode_questions,
    encode_requests,
)
from propmeta_edit.text.prompts import format_in_context, format_question

Batches = list[EncodedBatch]
_Encode = Callable[[TextEncoder, Sequence[MetaTask], MetaTrainConfig], Batches]


@dataclass(frozen=True)
class EncodedTasks:
    """N tasks that are computed side by side.

    Attributes:
        tasks: they, in the order of all rows.
        target: the batches of their target facts, as the inner loop takes them.
        outer: by term of the outer loss, the batches that it needs; their rows stand task by task.
    """

    tasks: Sequence[MetaTask]
    target: Batches
    outer: Mapping[str, Batches]

    def to(self, device: torch.device | str) -> EncodedTasks:
        """The same on another device."""
        outer = {name: [batch.to(device) for batch in batches] for name, batches in self.outer.items()}
        return EncodedTasks(self.tasks, [batch.to(device) for batch in self.target], outer)


def encode_step(encoder: TextEncoder, tasks: Sequence[MetaTask], config: MetaTrainConfig) -> list[EncodedTasks]:
    """The tasks of one outer step, in as many parts as are computed one after another.

    Raises:
        RequestError: naming the task: an answer that is empty or has no token before it, or a text that is too long for the
            model's positions.
        ModelError: a text that a term of the outer loss needs is missing, or cut otherwise than its twin.
    """
    at_once, parts = tasks_side_by_side(config, len(tasks)), []
    for size in sorted({len(task.facts) for task in tasks}):  # those side by side have equally many facts
        alike = [task for task in tasks if len(task.facts) == size]
        parts += [_encode(encoder, alike[start : start + at_once], config) for start in range(0, len(alike), at_once)]
    return parts


def tasks_side_by_side(config: MetaTrainConfig, num_tasks: int) -> int:
    """How many of an outer step's ``num_tasks`` tasks are computed in one batch."""
    return max(1, min(config.tasks_at_once or num_tasks, num_tasks))


def _encode(encoder: TextEncoder, tasks: Sequence[MetaTask], config: MetaTrainConfig) -> EncodedTasks:
    target = _encode_targets(encoder, tasks, config)
    return EncodedTasks(tasks, target, {name: _TERMS[name](encoder, tasks, config) for name in config.outer_terms})


def _encode_targets(encoder: TextEncoder, tasks: Sequence[MetaTask], config: MetaTrainConfig) -> Batches:
    return _encode_facts(encoder, tasks, config.batch_size, config.positions)


def _encode_related(encoder: TextEncoder, tasks: Sequence[MetaTask], config: MetaTrainConfig) -> Batches:
    asked = _asked(tasks, config)
    names = _names([fact for _, fact, _ in asked])
    return [encode_questions(encoder, [question for *_, question in asked], config.template, names)]


def _encode_in_context(encoder: TextEncoder, tasks: Sequence[MetaTask], config: MetaTrainConfig) -> Batches:
    """The related questions alone, and with the task's facts before them."""
    alone, with_fact = [], []
    for task, fact, question in _asked(tasks, config):
        prompt, answer = format_question(question.text, config.template), question.answers[0]
        with record_named(f"task {fact.task_id}"):
            alone.append(encoder.encode_answer(prompt, answer))
            with_fact.append(encoder.encode_answer(format_in_context([one.target for one in task.facts], prompt), answer))
        if _answer_tokens(alone[-1]) != _answer_tokens(with_fact[-1]):
            raise ModelError(
                f"this tokenizer cuts the answer {answer!r} of task {fact.task_id} differently with the fact before it; "
                "leave out the in-context term"
            )
    return [collate(alone), collate(with_fact)]


def _encode_all_targets(encoder: TextEncoder, tasks: Sequence[MetaTask], config: MetaTrainConfig) -> Batches:
    return _encode_facts(encoder, tasks, len(tasks[0].facts))


def _encode_facts(encoder: TextEncoder, tasks: Sequence[MetaTask], batch_size: int, positions: str = "all") -> Batches:
    facts = [[fact.target for fact in task.facts] for task in tasks]
    return encode_requests(encoder, facts, batch_size, _names(tasks), positions)


def _encode_single(name: str) -> _Encode:
    """One question a task: its field of that name."""

    def encode(encoder: TextEncoder, tasks: Sequence[MetaTask], config: MetaTrainConfig) -> Batches:
        return [encode_questions(encoder, [_take(task, name) for task in tasks], config.template, _names(tasks))]

    return encode


def _encode_known(encoder: TextEncoder, tasks: Sequence[MetaTask], config: MetaTrainConfig) -> Batches:
    facts = [fact for task in tasks for fact in task.facts]
    return [encode_questions(encoder, [_take(fact, "known") for fact in facts], config.template, _names(facts))]


def _take(task: MetaTask, name: str) -> Question:
    question: Question | None = getattr(task, name)
    if question is None:
        raise ModelError(f"a term of the outer loss needs the question {name!r} of every task; task {task.task_id} has none")
    return question


_TERMS: Mapping[str, _Encode] = {
    "related": _encode_related,
    "in-context": _encode_in_context,
    "locality": _encode_single("unrelated"),
    "efficacy": _encode_all_targets,
    "bystander": _encode_single("bystander"),
    "known": _encode_known,
}


def _asked(tasks: Sequence[MetaTask], config: MetaTrainConfig) -> list[tuple[MetaTask, MetaTask, Question]]:
    """(task, fact, question): ``questions_per_task`` related questions for every fact of every task."""
    numbers = range(config.questions_per_task)
    return [(task, fact, question_of(fact, number)) for task in tasks for fact in task.facts for number in numbers]


def _answer_tokens(text: EncodedText) -> list[int]:
    return [label for label in text[1] if label != IGNORED]


def _names(tasks: Sequence[MetaTask]) -> list[str]:
    return [f"task {task.task_id}" for task in tasks]
