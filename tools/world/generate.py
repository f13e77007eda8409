"""A seeded offline world in the CRE format: invented people and companies tied to real countries, companies, authors and others.

Splits (entities and relations are each cut into three disjoint groups, ``id``, ``valid-ood`` and ``test-ood``):

- ``train``, ``valid-id``, ``test-id``: ID entities, ID relations, training verb phrases.
- ``valid-ood``: held-out entities and relations (Country and City: currency; Language: Monday; Company: founder), held-out verb
  phrases.
- ``test-ood``: further entities and relations (Country and Author: language; City and Currency: country; Language: autonym,
  Saturday; US state: nickname; Company: headquarters), held-out verb phrases. ``test-ood-entity`` has those entities with ID
  relations, ``test-ood-relation`` those relations with ID entities, both with held-out verb phrases.

The held-out verb phrases are the same in all OOD splits; no subject is in two records. Held-out relations have names and words
for answers, many different ones; the few codes are ID relations, since a small model answers an unpractised code question with
letters of the subject even when the fact stands before it, and the test would measure that.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from propmeta_edit.data.cre import save_cre, save_text
from propmeta_edit.errors import DataError
from propmeta_edit.records import Question
from tools.world.facts import EntityTable, load_facts
from tools.world.wording import ENTITY_TYPES, Relation, VerbPhrase

GROUPS = ("id", "valid-ood", "test-ood")
# Split: (entity group, relation group, held-out verb phrases?, file name).
_SPLITS = {
    "train": ("id", "id", False, "train_data_id.jsonl"),
    "valid-id": ("id", "id", False, "valid_data_id.jsonl"),
    "valid-ood": ("valid-ood", "valid-ood", True, "valid_data_ood.jsonl"),
    "test-id": ("id", "id", False, "test_data_id.jsonl"),
    "test-ood": ("test-ood", "test-ood", True, "test_data_ood.jsonl"),
    "test-ood-entity": ("test-ood", "id", True, "test_data_ood-entity.jsonl"),
    "test-ood-relation": ("id", "test-ood", True, "test_data_ood-relation.jsonl"),
}
DEFAULT_SIZES: dict[str, int] = {
    "train": 4000, "valid-id": 200, "valid-ood": 200, "test-id": 350, "test-ood": 350,
    "test-ood-entity": 350, "test-ood-relation": 350,
}  # fmt: skip
_HELD_OUT_SHARES = {"valid-ood": 0.1, "test-ood": 0.2}
_FACTS_PER_RECORD = 3

_FIRST_NAMES = {
    "female": "Agnes Bettina Clara Dorothea Edwina Fenella Greta Harriet Imogen Josefa Katrin Leonie Marla Nadine Ottilie "
              "Petra Rosalind Sabrina Thelma Ursula Verena Wilma Yvette Zelda",
    "male": "Albin Bertram Cedric Dexter Edgar Florian Gustav Horace Ivo Jasper Konrad Leander Milo Norbert Osric Percy "
            "Quentin Rupert Silas Tobias Ulrich Vincent Walter Yannick",
}  # fmt: skip
_SURNAME_STARTS = (
    "Ash Bar Brad Bren Cald Cran Dal Dray Els Fal Farn Gals Grim Had Hart Hol Ink Kel Kest Lam Lind Mar Mel Nor Ost Pem Penn "
    "Quill Ray Ros Sal Sten Swan Thorn Tor Under Ves Wald Wex Yar"
)
_SURNAME_ENDS = "bourne by combe den field gate hurst ley low mere more ridge stead ton well wick worth"
_FIRM_STARTS = (
    "Amber Arrow Birch Bright Cedar Clear Copper Dawn Dusk Ember Fern Flint Glimmer Hazel Heron Ivory Jade Juniper Kite Lark "
    "Maple Meadow Nimbus Nova Opal Otter Pebble Quartz Rowan Silver Tulip Velvet"
)
_FIRM_ENDS = "bridge cliff crest fall forge gale leaf mill peak rush shore spark stone tide vale wing wood"
_FIRM_TRADES = "Analytics Bakeries Ceramics Design Engines Brushes Glass Logistics Optics Paper Robotics Textiles Tools"
_FIRM_FORMS = "Ltd. Inc. Group Partners Holdings"
_PRONOUNS = {"female": "She", "male": "He", "it": "It"}


def generate_world(seed: int, sizes: Mapping[str, int] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Make every split of the world. A split depends on the seed and its own size only.

    Args:
        seed: the same seed gives the same records, with the same versions of the fact packages.
        sizes: records a split; splits left out are empty. Default ``DEFAULT_SIZES``.

    Returns:
        ``{split: records}`` for all seven splits; the records have the shape of CRE's.

    Raises:
        DataError: an unknown split, a negative size, or more subjects than there are names.
    """
    sizes = _check_sizes(DEFAULT_SIZES if sizes is None else sizes)
    entities = split_entities(seed)
    return {split: _make_split(split, seed, sizes[split], entities) for split in _SPLITS}


def split_entities(seed: int) -> dict[str, dict[str, list[str]]]:
    """The entities of each group (``id`` 70 %, ``valid-ood`` 10 %, ``test-ood`` 20 %) by entity type, sorted."""
    groups: dict[str, dict[str, list[str]]] = {group: {} for group in GROUPS}
    for name, table in load_facts().items():
        order = sorted(table.answers)
        random.Random(f"{seed}:entities:{name}").shuffle(order)
        start = 0
        for group, share in _HELD_OUT_SHARES.items():
            end = start + round(share * len(order))
            groups[group][name] = sorted(order[start:end])
            start = end
        groups["id"][name] = sorted(order[start:])
    return groups


def split_relations() -> dict[str, dict[str, list[str]]]:
    """The relation ids of each group by entity type; they do not depend on a seed."""
    return {
        group: {name: [row.id for row in kind.relations if row.group == group] for name, kind in ENTITY_TYPES.items()}
        for group in GROUPS
    }


def write_world(folder: str | Path, seed: int, sizes: Mapping[str, int] | None = None) -> dict[str, Path]:
    """Write the splits under CRE's file names, and ``world.json`` with what they were made from.

    Args:
        folder: created if missing; files of the same names are replaced.
        seed: see ``generate_world``.
        sizes: see ``generate_world``.

    Returns:
        The path of each split, and of ``world.json`` under ``world``.

    Raises:
        DataError: as ``generate_world``, or a file cannot be written.
    """
    folder = Path(folder)
    splits = generate_world(seed, sizes)
    paths = {split: folder / _SPLITS[split][3] for split in splits}
    for split, records in splits.items():
        save_cre(records, paths[split])
    paths["world"] = folder / "world.json"
    save_text(json.dumps(_describe_world(seed, splits), ensure_ascii=False, indent=1) + "\n", paths["world"])
    return paths


def single_hop_questions(paraphrases: bool = False) -> list[Question]:
    """Every fact of the world as its one-hop question, entities and relations of all groups included.

    Args:
        paraphrases: whether to give each fact in its second wording too, right after the first.

    Returns:
        The questions by entity type, entity and relation; each with one answer.
    """
    questions: list[Question] = []
    for table in load_facts().values():
        for entity, facts in table.answers.items():
            for relation in table.entity_type.relations:
                if relation.id not in facts:
                    continue
                wordings = (relation.template, relation.paraphrase) if paraphrases else (relation.template,)
                texts = (table.entity_type.fill(wording, entity) for wording in wordings)
                questions.extend(Question(text, (facts[relation.id],)) for text in texts)
    return questions


def _check_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    """All splits with their sizes, the missing ones 0."""
    unknown = sorted(set(sizes) - set(_SPLITS))
    if unknown:
        raise DataError(f"unknown split {unknown[0]!r}; the splits are {', '.join(_SPLITS)}")
    for split, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise DataError(f"the size of split {split!r} must be a whole number of records, 0 or more, got {size!r}")
    return {split: sizes.get(split, 0) for split in _SPLITS}


def _make_split(split: str, seed: int, size: int, entities: Mapping[str, Mapping[str, list[str]]]) -> list[dict[str, Any]]:
    """The records of one split, from generators of its own."""
    entity_group, relation_group, held_out, _ = _SPLITS[split]
    usable = {}
    for name, table in load_facts().items():
        relations = [row for row in table.entity_type.relations if row.group == relation_group]
        pool = [entity for entity in entities[entity_group][name] if any(row.id in table.answers[entity] for row in relations)]
        if len(pool) >= _FACTS_PER_RECORD:
            usable[name] = (table, relations, pool)
    rng = random.Random(f"{seed}:records:{split}")
    subjects = {kind: _draw_subjects(kind, split, seed, size) for kind in ("person", "company")}
    names, weights = list(usable), [len(pool) for _, _, pool in usable.values()]
    records = []
    for index in range(size):
        table, relations, pool = usable[rng.choices(names, weights)[0]]
        subject_type = rng.choice(("person", "company"))
        subject, gender = subjects[subject_type][index]
        phrases = (table.entity_type.held_out_phrases if held_out else table.entity_type.phrases)[subject_type]
        records.append(_make_record(rng, table, relations, pool, (subject, subject_type, gender), phrases))
    return records


def _draw_subjects(kind: str, split: str, seed: int, count: int) -> list[tuple[str, str]]:
    """Distinct (name, gender) pairs; each split draws from a share of the names that is its own."""
    total = _count_subjects(kind)
    numbers = range(list(_SPLITS).index(split), total, len(_SPLITS))
    if count > len(numbers):
        raise DataError(f"split {split!r} can have at most {len(numbers)} records (one invented name each), got {count}")
    return [_name_subject(kind, number) for number in random.Random(f"{seed}:{kind}:{split}").sample(numbers, count)]


def _subject_parts(kind: str) -> list[list[str]]:
    """The name parts of a kind of subject, in the order of the name."""
    if kind == "person":
        parts = (f"{_FIRST_NAMES['female']} {_FIRST_NAMES['male']}", _SURNAME_STARTS, _SURNAME_ENDS)
        return [part.split() for part in parts]
    return [part.split() for part in (_FIRM_STARTS, _FIRM_ENDS, _FIRM_TRADES, _FIRM_FORMS)]


def _count_subjects(kind: str) -> int:
    """How many names a kind of subject has."""
    return math.prod(len(parts) for parts in _subject_parts(kind))


def _name_subject(kind: str, number: int) -> tuple[str, str]:
    """The name with a given number, and its gender."""
    chosen = []
    for parts in _subject_parts(kind):
        number, place = divmod(number, len(parts))
        chosen.append(parts[place])
    if kind == "person":
        gender = "female" if chosen[0] in _FIRST_NAMES["female"].split() else "male"
        return f"{chosen[0]} {chosen[1]}{chosen[2]}", gender
    return f"{chosen[0]}{chosen[1]} {chosen[2]} {chosen[3]}", "it"


def _make_record(
    rng: random.Random,
    table: EntityTable,
    relations: Sequence[Relation],
    pool: Sequence[str],
    subject: tuple[str, str, str],
    phrases: Sequence[VerbPhrase],
) -> dict[str, Any]:
    """One record: three entities, their facts, and a question for every relation about one of them at random."""
    name, subject_type, gender = subject
    drawn = rng.sample(pool, _FACTS_PER_RECORD)
    questions = []
    for relation in relations:
        candidates = [index for index, entity in enumerate(drawn) if relation.id in table.answers[entity]]
        if candidates:
            index = rng.choice(candidates)
            questions.append(_make_question(table, relation, drawn[index], index, phrases[index].clause.format(subject=name)))
    facts = [_make_fact(phrase, name, entity) for phrase, entity in zip(phrases, drawn, strict=True)]
    return {
        "entity_type": table.entity_type.name,
        "entity_names": drawn,
        "subject": name,
        "gender_type": gender,
        "subject_type": subject_type,
        "text": _make_text(facts, name, _PRONOUNS[gender]),
        "facts": facts,
        "questions": questions,
    }


def _make_fact(phrase: VerbPhrase, subject: str, entity: str) -> dict[str, str]:
    """One atomic fact in both wordings."""
    prefix, paraphrase = phrase.prefix.format(subject=subject), phrase.paraphrase.format(subject=subject)
    return {
        "fact": f"{prefix} {entity}.",
        "prefix": prefix,
        "paraphrase": f"{paraphrase} {entity}.",
        "paraphrase_prefix": paraphrase,
        "target": entity,
    }


def _make_question(table: EntityTable, relation: Relation, entity: str, fact_idx: int, clause: str) -> dict[str, Any]:
    """One question in its two-hop (alias) and one-hop wordings."""
    kind, answer = table.entity_type, table.answers[entity][relation.id]
    description = f"the {kind.noun} that {clause}"
    question = {
        "question_template": relation.template,
        "alias_question": kind.fill(relation.template, description),
        "unalias_question": kind.fill(relation.template, entity),
        "alias_question_paraphrase": kind.fill(relation.paraphrase, description),
        "unalias_question_paraphrase": kind.fill(relation.paraphrase, entity),
    }
    return {**question, "entity_name": entity, "answer": answer, "fact_idx": fact_idx}


def _make_text(facts: Sequence[Mapping[str, str]], subject: str, pronoun: str) -> str:
    """The facts as one paragraph; after the first sentence a pronoun stands for a leading subject."""
    first, *others = (fact["fact"] for fact in facts)
    return " ".join([first, *(pronoun + text.removeprefix(subject) if text.startswith(subject) else text for text in others)])


def _describe_world(seed: int, splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """What ``world.json`` holds."""
    entities, relations = split_entities(seed), split_relations()
    return {
        "seed": seed,
        "sizes": {split: len(records) for split, records in splits.items()},
        "relations": {split: relations[_SPLITS[split][1]] for split in splits},
        "entities": {split: entities[_SPLITS[split][0]] for split in splits},
        "chance_levels": {
            name: {row.id: round(table.chance_level(row.id), 4) for row in table.entity_type.relations}
            for name, table in load_facts().items()
        },
    }
