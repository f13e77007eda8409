"""How a run's tasks are arranged before the first step: questions joined to facts, facts to tasks of several, and the order."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from propmeta_edit.errors import ModelError
from propmeta_edit.records import EditRequest, MetaTask, Question

LOG = logging.getLogger(__name__)
Kind = tuple[str, str]  # a fact's prompt and a question about it, the subject taken out of both


def join_tasks(tasks: Sequence[MetaTask], seed: int) -> list[MetaTask]:
    """One task a fact, with all its related questions in seeded order."""
    by_fact: dict[EditRequest, list[MetaTask]] = {}
    for task in tasks:
        by_fact.setdefault(task.target, []).append(task)
    joined = []
    for same in by_fact.values():
        first, *others = random.Random(f"{seed}:{same[0].task_id}").sample(same, len(same))
        joined.append(replace(first, more_related=tuple(task.related for task in others)))
    return joined


def order_tasks(tasks: Sequence[MetaTask], seed: int, num_tasks: int | None, pairing: str = "matched") -> list[MetaTask]:
    """Shuffle once with a fixed seed and take the first ``num_tasks``; each is used once.

    With ``pairing`` ``shuffled`` every target gets the questions of the task after it: a control that keeps the form and
    breaks the consequence. The question of the task after it is also what an edit must leave alone (``MetaTask.unrelated``).
    """
    shuffled = random.Random(seed).sample(list(tasks), len(tasks))
    chosen = _take_first(shuffled, num_tasks)
    pairs = zip(chosen, [*chosen[1:], *chosen[:1]], strict=True)
    if pairing == "matched":
        return [replace(task, unrelated=other.related) for task, other in pairs]
    return [MetaTask(task.task_id, task.target, other.related, other.more_related) for task, other in pairs]


def group_tasks(
    tasks: Sequence[MetaTask], sizes: Sequence[int], seed: int, num_tasks: int | None, with_bystanders: bool = False
) -> list[MetaTask]:
    """Tasks of several facts of one kind, drawn by ``seed``, each fact in at most one of them.

    The facts of a task have the same words but for subject and object, and the same first question but for the subject; their
    subjects, objects and answers all differ, so that "answer with the newest object" is wrong for all but one. Sizes are drawn
    anew for every task; a fact that too few others are like is given a smaller size, and is left out where no size fits.

    Args:
        tasks: one a fact, with all its questions; a fact without a subject can only be a task by itself.
        sizes: how many facts a task may have.
        num_tasks: so many tasks; None for as many as the facts give.
        with_bystanders: every task also gets its first question about another subject, whose answer is none of the task's; tasks
            without such a one are left out.

    Raises:
        ModelError: too few facts for so many tasks.
    """
    order = random.Random(f"{seed}:groups")
    shuffled = order.sample(list(tasks), len(tasks))
    alike = _find_alike(shuffled)
    used: set[str] = set()
    groups: list[MetaTask] = []
    for first in shuffled:
        if len(groups) == num_tasks:
            break
        if first.task_id in used:
            continue
        size = order.choice(sizes)
        smaller = sorted({other for other in sizes if other < size}, reverse=True)
        for wanted in (size, *smaller):
            group = _find_group(first, wanted, alike, used, order, with_bystanders)
            if group is not None:
                groups.append(group)
                used.update(task.task_id for task in group.facts)
                break
    LOG.info("%d tasks of %d facts out of %d", len(groups), len(used), len(tasks))
    return _take_first(groups, num_tasks)


def _take_first(tasks: Sequence[MetaTask], num_tasks: int | None) -> list[MetaTask]:
    if num_tasks is not None and num_tasks > len(tasks):
        raise ModelError(f"num_tasks is {num_tasks}, but the data has {len(tasks)} tasks; lower it or generate more")
    return list(tasks[:num_tasks])


def _find_alike(tasks: Sequence[MetaTask]) -> Mapping[Kind, list[MetaTask]]:
    """Every fact under each kind that it is of, with that kind's question as its first."""
    alike: dict[Kind, list[MetaTask]] = {}
    for task in tasks:
        for kind, asked in _kinds_of(task):
            alike.setdefault(kind, []).append(asked)
    return alike


def _kinds_of(task: MetaTask) -> Iterator[tuple[Kind, MetaTask]]:
    questions = (task.related, *task.more_related)
    subject = task.target.subject
    for index, question in enumerate(questions if subject else ()):
        others = (*questions[:index], *questions[index + 1 :])
        yield (
            (task.target.prompt.replace(str(subject), "{}"), question.text.replace(str(subject), "{}")),
            replace(task, related=question, more_related=others),
        )


def _find_group(
    first: MetaTask,
    size: int,
    alike: Mapping[Kind, Sequence[MetaTask]],
    used: set[str],
    order: random.Random,
    with_bystanders: bool,
) -> MetaTask | None:
    """A task of ``size`` unused facts that begins with this one, of the first of its kinds that has so many."""
    if size == 1 and not with_bystanders:
        return first
    kinds = list(_kinds_of(first))
    for kind, leader in order.sample(kinds, len(kinds)):
        group, candidates = [leader], alike[kind]
        others = order.sample(candidates, min(len(candidates), _MOST_TRIED))
        for other in others:
            if len(group) < size and other.task_id not in used and all(_differ(other, task) for task in group):
                group.append(other)
        bystander = next((other.related for other in others if all(_differ(other, task) for task in group)), None)
        if len(group) == size and (bystander is not None or not with_bystanders):
            return replace(leader, together=tuple(group[1:]), bystander=bystander if with_bystanders else None)
    return None


_MOST_TRIED = 200  # candidates a task: a training file can have thousands of one kind


def _differ(one: MetaTask, other: MetaTask) -> bool:
    """Whether subjects, objects and the answers to the first question all differ."""
    objects = _are_distinct((one.target.target_new,), (other.target.target_new,))
    return one.target.subject != other.target.subject and objects and _are_distinct(one.related.answers, other.related.answers)


def _are_distinct(some: Sequence[str], others: Sequence[str]) -> bool:
    """Whether no text of one lies within one of the other, whatever the case."""
    pairs = itertools.product((text.casefold() for text in some), [text.casefold() for text in others])
    return not any(a in b or b in a for a, b in pairs)


def question_of(task: MetaTask, number: int) -> Question:
    """The fact's ``number``-th related question; one with fewer is asked the same again."""
    questions = (task.related, *task.more_related)
    return questions[number % len(questions)]
