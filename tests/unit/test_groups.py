"""Tasks of several facts: what goes together, and what does not."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from propmeta_edit.errors import ConfigError, ModelError
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.metatrain.tasks import group_tasks, question_of
from propmeta_edit.recipes.meta_training import hash_of_tasks
from propmeta_edit.records import EditRequest, MetaTask, Question

COUNTRIES = {"Peru": "sol", "Greece": "euro", "France": "euro", "Japan": "yen", "India": "rupee", "Nepal": "rupee", "Cuba": "peso"}
ASKED = {"pay": "What does {} pay with?", "speak": "What does {} speak?"}


def make_task(number, verb="lives in", country="Peru"):
    subject = f"Ann {number} Lee"
    pay, speak = (Question(text.format(subject), (f"{country} {COUNTRIES[country]}",)) for text in ASKED.values())
    pay = replace(pay, answers=(COUNTRIES[country],))
    return MetaTask(f"{verb}-{number}", EditRequest(f"{subject} {verb}", country, subject), pay, (speak,))


TASKS = [make_task(n, verb, country) for verb in ("lives in", "was born in") for n, country in enumerate([*COUNTRIES] * 6)]


@pytest.mark.parametrize("seed", range(5))
def test_facts_of_a_task_are_of_one_kind_and_differ_in_everything_else(seed):
    groups = group_tasks(TASKS, [1, 2, 4], seed, None, with_bystanders=True)
    assert {len(group.facts) for group in groups} == {1, 2, 4}
    for group in groups:
        facts = group.facts
        for values in ([f.target.subject for f in facts], [f.target.target_new for f in facts], [f.related.answers for f in facts]):
            assert len(set(values)) == len(facts)
        assert len({f.target.prompt.replace(f.target.subject, "") for f in facts}) == 1
        assert len({f.related.text.replace(f.target.subject, "") for f in facts}) == 1
        assert group.bystander is not None and group.bystander.answers[0] not in [f.related.answers[0] for f in facts]
        assert group.bystander.text not in [f.related.text for f in facts]
        assert all(
            {q.text for q in (f.related, *f.more_related)} == {t.format(f.target.subject) for t in ASKED.values()} for f in facts
        )


def test_each_fact_is_used_once_and_the_draw_is_seeded():
    groups = group_tasks(TASKS, [2, 4], 0, None)
    used = [fact.task_id for group in groups for fact in group.facts]
    assert len(set(used)) == len(used) > 60
    assert groups == group_tasks(list(TASKS), [2, 4], 0, None) != group_tasks(TASKS, [2, 4], 1, None)
    assert group_tasks(TASKS, [2, 4], 0, 7) == groups[:7]
    assert all(group.bystander is None for group in groups)


def test_facts_that_few_are_like_get_smaller_tasks_or_none():
    few = TASKS[:3]  # of France and Greece only one can be in a task, as both pay in euros
    sizes = [len(group.facts) for group in group_tasks(few, [1, 4], 0, None)]
    assert sizes == [1, 1, 1]
    assert [len(group.facts) for group in group_tasks(few, [2, 4], 0, None)] == [2]
    with pytest.raises(ModelError, match="num_tasks is 2, but the data has 1"):
        group_tasks(few, [2, 4], 0, 2)


def test_a_fact_without_a_subject_is_a_task_by_itself():
    nameless = MetaTask("n", EditRequest("The capital is", "Lima"), Question("Where?", ("Lima",)))
    assert group_tasks([nameless, nameless], [1, 2], 0, 1) == [nameless]
    assert group_tasks([nameless], [1], 0, None, with_bystanders=True) == []


def test_what_a_run_learns_from_is_hashed_with_its_groups():
    groups = group_tasks(TASKS, [2], 0, 4, with_bystanders=True)
    others = [[replace(g, together=()) for g in groups], [replace(g, bystander=None) for g in groups], groups[::-1]]
    hashes = [hash_of_tasks(tasks) for tasks in (groups, *others)]
    assert len(set(hashes)) == 4


def test_questions_go_round():
    task = TASKS[0]
    assert [question_of(task, n) for n in range(4)] == [task.related, *task.more_related] * 2
    assert list(itertools.islice(task.facts, 2)) == [task]


@pytest.mark.parametrize(
    "values",
    [{"facts_per_task": 0}, {"facts_per_task": []}, {"facts_per_task": [1, 0]}, {"facts_per_task": 2, "pairing": "shuffled"}],
)
def test_bad_numbers_of_facts(values):
    with pytest.raises(ConfigError, match="facts"):
        MetaTrainConfig(model="tiny", **values)
