"""A seeded offline stand-in for MQuAKE: the real facts of the offline world, joined to chains and overwritten, in MQuAKE's format.

It stands in for the MQuAKE-CF files where those cannot be had: ``load_mquake`` and ``load_mquake_subset`` read it unchanged. The
subjects are real, an edit overwrites a fact that a base model was taught as a single-hop question of ``world``, and the chain goes
on from the new object with taught facts. It is not MQuAKE: no person, work or film is in it, relation ids ("city_country") are
not Wikidata's, entity ids are the names themselves, and results on it are not comparable with published ones. Edits of different
cases may contradict each other, as in MQuAKE-CF-3k: each case is to be evaluated on its own.

Answers are matched by case-insensitive substring, so a case is kept only if that match means something: neither answer is shorter
than three characters or occurs in a question, neither contains the other, and reciting an edit does not give the new answer away
(unless the last hop is edited: there the new answer is what the edit says). No chain visits an entity twice.
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from propmeta_edit.data.cre import save_text
from tools.world.facts import load_facts
from tools.world.wording import ENTITY_TYPES, EntityType, Relation

# List: (hops, the sets of hops that may be edited, cases, file name).
_LISTS = {
    "2hop": (2, ((0,),), 350, "mquake-standin-2hop.json"),
    "3hop": (3, ((0, 1), (0, 2), (1, 2)), 150, "mquake-standin-3hop.json"),
}
_SHORTEST_ANSWER = 3
_TRIES = 40

# Each relation as a statement to be completed with its answer.
_STATEMENTS = {
    "country_capital": "The capital of {} is",
    "country_language": "The main official language of {} is",
    "country_currency": "The currency of {} is the",
    "country_continent": "The continent that {} is part of is",
    "country_subregion": "The region of the world that {} is part of is",
    "country_demonym": "The adjective for people from {} is",
    "country_largest_city": "The largest city in {} is",
    "country_calling_code": "The calling code for {} is",
    "country_internet_domain": "The top-level internet domain for {} is",
    "city_country": "{} is located in the country of",
    "city_continent": "{} is located on the continent of",
    "city_subregion": "The region of the world that {} belongs to is",
    "city_capital": "The capital of the country where {} is located is",
    "city_currency": "The currency used in {} is the",
    "city_internet_domain": "The top-level internet domain of local websites in {} is",
    "city_calling_code": "The international calling code used to phone {} is",
    "language_script": "The writing system used by {} is",
    "language_family": "The language family of {} is",
    "language_homeland": "The country with the most native speakers of {} is",
    "language_autonym": "Native speakers of {} call it",
    "language_monday": "The word for Monday in {} is",
    "language_saturday": "The word for Saturday in {} is",
    "currency_country": "The country that issues {} is",
    "currency_code": "The ISO 4217 letter code of {} is",
    "currency_continent": "The continent of the country that issues {} is",
    "currency_capital": "The capital of the country that issues {} is",
    "state_capital": "The capital of {} is",
    "state_largest_city": "The largest city in {} is",
    "state_division": "The census division of {} is",
    "state_nickname": "The nickname of {} is",
    "element_atomic_number": "The atomic number of {} is",
    "element_group": "The kind of element that {} belongs to is the",
    "author_country": "{} came from the country of",
    "author_work": "The best-known work of {} is",
    "author_language": "The works of {} were written in",
    "company_country": "{} was set up in the country of",
    "company_product": "{} is known for selling",
    "company_founder": "The founder of {} is",
    "company_headquarters": "The head office of {} is in the city of",
}

# Relations to other entities of the world: the type of those, and two descriptions of the object.
_LINKS = {
    "city_country": ("Country", "the country that {} is located in", "the country where one finds {}"),
    "city_currency": ("Currency", "the currency used in {}", "the money that people pay with in {}"),
    "country_language": ("Language", "the main official language of {}", "the chief official language of {}"),
    "country_currency": ("Currency", "the currency of {}", "the money that people pay with in {}"),
    "country_largest_city": ("City", "the largest city in {}", "the city with the most inhabitants in {}"),
    "language_homeland": (
        "Country",
        "the country with the most native speakers of {}",
        "the country where most native speakers of {} live",
    ),
    "author_country": ("Country", "the home country of {}", "the country that {} was from"),
    "author_language": ("Language", "the language that {} wrote in", "the language of the works of {}"),
    "company_country": ("Country", "the home country of {}", "the country where {} was set up"),
    "currency_country": ("Country", "the country that issues {}", "the country that is the home of {}"),
}


@dataclass(frozen=True)
class _Hop:
    """One relation of one entity type."""

    kind: EntityType
    relation: Relation

    @property
    def id(self) -> str:
        """The relation id in the files."""
        return f"{self.kind.noun}_{self.relation.id}"

    @property
    def object_type(self) -> str | None:
        """The type of the objects, where they are entities of the world."""
        return _LINKS[self.id][0] if self.id in _LINKS else None

    def name_entity(self, answer: str) -> str:
        """The entity that an answer stands for; the world's currencies have an article that its answers lack."""
        return f"the {answer}" if self.object_type == "Currency" else answer

    def list_objects(self) -> list[str]:
        """The answers that an edit may give; none where the objects are not entities of the world."""
        if self.object_type is None:
            return []
        names = load_facts()[self.object_type].answers
        return [name.removeprefix("the ") for name in names] if self.object_type == "Currency" else list(names)


@dataclass(frozen=True)
class _Step:
    """One hop of a chain: ``answer`` differs from ``fact``, the world's own answer, if the hop is edited."""

    hop: _Hop
    subject: str
    answer: str
    fact: str

    @property
    def entity(self) -> str:
        """The id of the object."""
        return self.hop.name_entity(self.answer)

    @property
    def cloze(self) -> str:
        """The statement up to its answer."""
        return _STATEMENTS[self.hop.id].format(self.subject)

    @property
    def question(self) -> str:
        """The question that the fact was taught with."""
        return self.hop.kind.fill(self.hop.relation.template, self.subject)


def generate_mquake(seed: int) -> dict[str, list[dict[str, Any]]]:
    """Make both lists of cases, spread evenly over the relations. Neither list depends on the other.

    Args:
        seed: the same seed gives the same cases, with the same versions of the fact packages.

    Returns:
        ``{"2hop": 350 cases, "3hop": 150 cases}`` with the keys of MQuAKE-CF: two hops with the first one edited, and three
        hops with two of them edited. No two cases of a list share subject and relations; case ids are unique in both together.
    """
    lists: dict[str, list[dict[str, Any]]] = {}
    first_id = 1
    for name, (num_hops, edit_patterns, size, _) in _LISTS.items():
        chains = _draw_chains(f"{seed}:mquake:{name}", _list_paths(num_hops), edit_patterns, size)
        lists[name] = [_make_case(case_id, old, new) for case_id, (old, new) in enumerate(chains, start=first_id)]
        first_id += len(chains)
    return lists


def write_mquake(folder: str | Path, seed: int) -> dict[str, Path]:
    """Write each list as one JSON list, ``mquake-standin-2hop.json`` and ``mquake-standin-3hop.json``.

    Args:
        folder: created if missing; files of the same names are replaced.
        seed: see ``generate_mquake``.

    Returns:
        The paths under ``2hop`` and ``3hop``.

    Raises:
        DataError: a file cannot be written.
    """
    lists = generate_mquake(seed)
    paths = {name: Path(folder) / _LISTS[name][3] for name in lists}
    for name, cases in lists.items():
        save_text(json.dumps(cases, ensure_ascii=False, indent=1) + "\n", paths[name])
    return paths


def _list_paths(num_hops: int) -> list[tuple[_Hop, ...]]:
    """Every sequence of relations in which each one asks about the object of the one before."""
    paths: list[tuple[_Hop, ...]] = [(_Hop(kind, relation),) for kind in ENTITY_TYPES.values() for relation in kind.relations]
    for _ in range(num_hops - 1):
        paths = [
            (*path, _Hop(ENTITY_TYPES[object_type], relation))
            for path in paths
            if (object_type := path[-1].object_type) is not None
            for relation in ENTITY_TYPES[object_type].relations
        ]
    return paths


def _draw_chains(
    seed: str, paths: Sequence[tuple[_Hop, ...]], edit_patterns: Sequence[tuple[int, ...]], size: int
) -> list[tuple[list[_Step], list[_Step]]]:
    """Chains before and after the edits, by turns over all hops but the last, and within each turn over the last hop."""
    turns: dict[tuple[str, ...], deque[Iterator[tuple[list[_Step], list[_Step]]]]] = {}
    for path in paths:
        turns.setdefault(tuple(hop.id for hop in path[:-1]), deque()).append(_propose_chains(seed, path, edit_patterns))
    order = deque(turns.values())
    chains: list[tuple[list[_Step], list[_Step]]] = []
    while order and len(chains) < size:
        streams = order.popleft()
        while streams:
            stream = streams.popleft()
            pair = next(stream, None)
            if pair is not None:
                chains.append(pair)
                streams.append(stream)
                order.append(streams)
                break
    return chains


def _propose_chains(
    seed: str, path: tuple[_Hop, ...], edit_patterns: Sequence[tuple[int, ...]]
) -> Iterator[tuple[list[_Step], list[_Step]]]:
    """Sound chains before and after random edits; each subject at most once, in random order."""
    rng = random.Random(f"{seed}:{':'.join(hop.id for hop in path)}")
    patterns = [pattern for pattern in edit_patterns if all(path[index].list_objects() for index in pattern)]
    subjects = list(load_facts()[path[0].kind.name].answers)
    rng.shuffle(subjects)
    for subject in subjects:
        old = _follow(path, subject, {})
        if old is None:
            continue
        for _ in range(_TRIES if patterns else 0):
            edits = {index: rng.choice(path[index].list_objects()) for index in rng.choice(patterns)}
            new = _follow(path, subject, edits)
            # Without the last edit the answer has to be another one too, or that edit would not matter.
            unfinished = _follow(path, subject, {index: edits[index] for index in sorted(edits)[:-1]})
            if new is not None and _is_sound(old, new, edits) and (unfinished is None or not _overlap(unfinished, new)):
                yield old, new
                break


def _follow(path: Sequence[_Hop], subject: str, edits: Mapping[int, str]) -> list[_Step] | None:
    """The chain from a subject with some answers overwritten; None if the world lacks a fact of it."""
    steps = []
    for index, hop in enumerate(path):
        fact = load_facts()[hop.kind.name].answers.get(subject, {}).get(hop.relation.id)
        if fact is None:
            return None
        step = _Step(hop, subject, edits.get(index, fact), fact)
        steps.append(step)
        subject = step.entity
    return steps


def _is_sound(old: Sequence[_Step], new: Sequence[_Step], edits: Mapping[int, str]) -> bool:
    """Whether a case keeps the promises of the module's docstring, and every edit changes its fact."""
    if any(new[index].answer == new[index].fact for index in edits) or _overlap(old, new):
        return False
    if any(len({steps[0].subject, *(step.entity for step in steps)}) <= len(steps) for steps in (old, new)):
        return False
    new_names = _list_names(new[-1].answer)
    names = [*_list_names(old[-1].answer), *new_names]
    recited = [new[index].cloze if index == len(new) - 1 else f"{new[index].cloze} {new[index].answer}" for index in edits]
    return (
        min(map(len, names)) >= _SHORTEST_ANSWER
        and not any(_contains(question, name) for question in _compose_questions(new) for name in names)
        and not any(_contains(text, name) for text in recited for name in new_names)
    )


def _overlap(first: Sequence[_Step], second: Sequence[_Step]) -> bool:
    """Whether a final answer of two chains occurs in the other."""
    pairs = [(one, other) for one in _list_names(first[-1].answer) for other in _list_names(second[-1].answer)]
    return any(_contains(one, other) or _contains(other, one) for one, other in pairs)


def _contains(text: str, name: str) -> bool:
    """Whether a text would be scored as giving the answer."""
    return name.lower() in text.lower()


def _list_names(answer: str) -> list[str]:
    """An answer and its aliases."""
    return [answer, *_list_aliases(answer)]


def _list_aliases(answer: str) -> list[str]:
    """The answer without its article, if it has one."""
    return [answer.removeprefix("the ")] if answer.startswith("the ") else []


def _compose_questions(steps: Sequence[_Step]) -> list[str]:
    """The multi-hop question in three wordings, the first from the taught template and the first descriptions."""
    first = second = steps[0].subject
    for step in steps[:-1]:
        _, phrase, other_phrase = _LINKS[step.hop.id]
        first, second = phrase.format(first), other_phrase.format(second)
    last = steps[-1].hop
    wordings = ((last.relation.template, first), (last.relation.paraphrase, first), (last.relation.template, second))
    return [last.kind.fill(template, description) for template, description in wordings]


def _make_case(case_id: int, old: Sequence[_Step], new: Sequence[_Step]) -> dict[str, Any]:
    """One case in MQuAKE's format from its chains before and after the edits."""
    edited = [step for step in new if step.answer != step.fact]
    return {
        "case_id": case_id,
        "requested_rewrite": [_make_rewrite(step) for step in edited],
        "questions": _compose_questions(new),
        "answer": old[-1].answer,
        "answer_alias": _list_aliases(old[-1].answer),
        "new_answer": new[-1].answer,
        "new_answer_alias": _list_aliases(new[-1].answer),
        "single_hops": [_make_single_hop(step) for step in old],
        "new_single_hops": [_make_single_hop(step) for step in new],
        "orig": {
            "triples": [_make_triple(step) for step in old],
            "triples_labeled": [_make_labeled_triple(step) for step in old],
            "new_triples": [_make_triple(step) for step in new],
            "new_triples_labeled": [_make_labeled_triple(step) for step in new],
            "edit_triples": [_make_triple(step) for step in edited],
        },
    }


def _make_rewrite(step: _Step) -> dict[str, Any]:
    """An edited hop as a requested rewrite."""
    return {
        "prompt": _STATEMENTS[step.hop.id],
        "relation_id": step.hop.id,
        "target_new": {"str": step.answer, "id": step.entity},
        "target_true": {"str": step.fact, "id": step.hop.name_entity(step.fact)},
        "subject": step.subject,
        "question": step.question,
    }


def _make_single_hop(step: _Step) -> dict[str, Any]:
    """A hop as its single-hop question."""
    return {
        "question": step.question,
        "cloze": step.cloze,
        "answer": step.answer,
        "answer_alias": _list_aliases(step.answer),
    }


def _make_triple(step: _Step) -> list[str]:
    """A hop by ids."""
    return [step.subject, step.hop.id, step.entity]


def _make_labeled_triple(step: _Step) -> list[str]:
    """A hop by names, the relation in words."""
    return [step.subject, step.hop.relation.id.replace("_", " "), step.answer]
