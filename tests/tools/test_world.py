"""The offline world: facts, wordings, splits and files."""

from __future__ import annotations

import itertools
import json

import pytest

from propmeta_edit.data.cre import load_cre
from propmeta_edit.errors import DataError
from tools.world.facts import answer_occurs, load_facts
from tools.world.generate import (
    DEFAULT_SIZES,
    generate_world,
    single_hop_questions,
    split_entities,
    split_relations,
    write_world,
)
from tools.world.wording import ENTITY_TYPES

RECORD_KEYS = ["entity_type", "entity_names", "subject", "gender_type", "subject_type", "text", "facts", "questions"]
FACT_KEYS = ["fact", "prefix", "paraphrase", "paraphrase_prefix", "target"]
QUESTION_KEYS = [
    "question_template", "alias_question", "unalias_question", "alias_question_paraphrase", "unalias_question_paraphrase",
    "entity_name", "answer", "fact_idx",
]  # fmt: skip
OOD_SPLITS = ("valid-ood", "test-ood", "test-ood-entity", "test-ood-relation")
ID_SPLITS = ("train", "valid-id", "test-id")


@pytest.fixture(scope="module")
def world():
    return generate_world(7)


def entities_of(records):
    return {(record["entity_type"], name) for record in records for name in record["entity_names"]}


def relations_of(records):
    return {(record["entity_type"], q["question_template"]) for record in records for q in record["questions"]}


def phrases_of(records):
    return {fact["prefix"].replace(record["subject"], "@") for record in records for fact in record["facts"]}


@pytest.mark.parametrize(
    ("kind", "entity", "expected"),
    [
        ("Country", "France", {"capital": "Paris", "language": "French", "currency": "euro", "calling_code": "+33",
                               "internet_domain": ".fr", "continent": "Europe", "subregion": "Western Europe",
                               "demonym": "French", "largest_city": "Paris"}),
        ("Country", "Norway", {"capital": "Oslo", "language": "Norwegian", "currency": "Norwegian krone"}),
        ("Country", "Turkey", {"capital": "Ankara", "largest_city": "Istanbul", "internet_domain": ".tr"}),
        ("Country", "the United Kingdom", {"capital": "London", "internet_domain": ".uk", "demonym": "British"}),
        ("Country", "Kazakhstan", {"capital": "Astana", "largest_city": "Almaty"}),
        ("City", "Osaka", {"country": "Japan", "continent": "Asia", "currency": "Japanese yen", "calling_code": "+81",
                           "capital": "Tokyo", "subregion": "Eastern Asia"}),
        ("Language", "French", {"family": "Romance", "homeland": "France", "autonym": "français", "monday": "lundi"}),
        ("Language", "Finnish", {"family": "Uralic", "monday": "maanantai", "saturday": "lauantai"}),
        ("Currency", "the US dollar", {"country": "the United States", "code": "USD"}),
        ("Currency", "the Danish krone", {"country": "Denmark", "code": "DKK", "capital": "Copenhagen"}),
        ("US state", "Texas", {"capital": "Austin", "largest_city": "Houston", "nickname": "the Lone Star State"}),
        ("Chemical element", "gold", {"atomic_number": "79", "group": "transition metal"}),
        ("Author", "Henrik Ibsen", {"country": "Norway", "work": "A Doll's House", "language": "Norwegian"}),
        ("Author", "Rabindranath Tagore", {"country": "India", "language": "Bengali"}),
        ("Company", "Lego", {"country": "Denmark", "headquarters": "Billund", "founder": "Ole Kirk Christiansen"}),
    ],
)  # fmt: skip
def test_known_facts(kind, entity, expected):
    facts = load_facts()[kind].answers[entity]
    assert {relation: facts.get(relation) for relation in expected} == expected


def test_tables_have_the_promised_size_and_no_empty_rows():
    sizes = {name: len(table.answers) for name, table in load_facts().items()}
    assert sizes == {
        "Country": 123, "City": 79, "Language": 76, "Currency": 69, "US state": 50, "Chemical element": 51, "Author": 57,
        "Company": 69,
    }  # fmt: skip
    for table in load_facts().values():
        for entity, facts in table.answers.items():
            assert facts, entity
            assert all(value.strip() == value != "" for value in facts.values())


def test_answer_occurs():
    assert answer_occurs("Tunis", "What is the capital of Tunisia?")
    assert answer_occurs("is", "What is the code?")
    assert not answer_occurs("IS", "What is the ISO code?")
    assert not answer_occurs("FR", "What is the code of France?")
    assert "capital" not in load_facts()["Country"].answers["Tunisia"]


def test_no_wording_gives_an_answer_away():
    for table in load_facts().values():
        kind = table.entity_type
        phrases = [p for bank in (kind.phrases, kind.held_out_phrases) for rows in bank.values() for p in rows]
        for phrase, relation in itertools.product(phrases, kind.relations):
            description = f"the {kind.noun} that {phrase.clause.format(subject='Agnes Ashby')}"
            texts = [kind.fill(wording, description) for wording in (relation.template, relation.paraphrase)]
            answers = {facts[relation.id] for facts in table.answers.values() if relation.id in facts}
            assert not [answer for answer in answers for text in texts if answer_occurs(answer, text)]


def test_wordings_are_complete():
    clauses = []
    for kind in ENTITY_TYPES.values():
        for relation in kind.relations:
            assert all(f"{{{kind.noun}}}" in text for text in (relation.template, relation.paraphrase))
            assert relation.template != relation.paraphrase
        for bank, subject in itertools.product((kind.phrases, kind.held_out_phrases), ("person", "company")):
            assert len(bank[subject]) == 3
            for phrase in bank[subject]:
                assert all("{subject}" in text for text in (phrase.prefix, phrase.paraphrase, phrase.clause))
                clauses.append((kind.name, subject, phrase.clause))
    assert len(clauses) == len(set(clauses)) == 96


def test_same_seed_same_world_and_splits_do_not_depend_on_each_other(world):
    assert json.dumps(generate_world(7)) == json.dumps(world)
    assert generate_world(8)["train"] != world["train"]
    alone = generate_world(7, {"test-ood": DEFAULT_SIZES["test-ood"]})
    assert alone["test-ood"] == world["test-ood"]
    assert alone["train"] == []


def test_records_have_the_shape_of_cre(world):
    assert {split: len(records) for split, records in world.items()} == DEFAULT_SIZES
    for record in itertools.chain(*world.values()):
        assert list(record) == RECORD_KEYS
        assert len(set(record["entity_names"])) == len(record["facts"]) == 3
        assert record["text"].startswith(record["subject"])
        assert record["questions"]
        for fact, entity in zip(record["facts"], record["entity_names"], strict=True):
            assert list(fact) == FACT_KEYS
            assert fact["fact"] == f"{fact['prefix']} {entity}." and fact["target"] == entity
            assert record["subject"] in fact["prefix"] and record["subject"] in fact["paraphrase_prefix"]


def test_questions_are_right_and_hide_their_answers(world):
    facts = load_facts()
    for record in itertools.chain(*world.values()):
        table = facts[record["entity_type"]]
        ids = {relation.template: relation.id for relation in table.entity_type.relations}
        for question in record["questions"]:
            assert list(question) == QUESTION_KEYS
            assert question["entity_name"] == record["entity_names"][question["fact_idx"]]
            assert question["answer"] == table.answers[question["entity_name"]][ids[question["question_template"]]]
            assert question["entity_name"] in question["unalias_question"]
            assert record["subject"] in question["alias_question"]
            for key in QUESTION_KEYS[1:5]:
                assert not answer_occurs(question["answer"], question[key])
                assert "{" not in question[key]
            if question["entity_name"] not in record["subject"]:
                assert question["entity_name"] not in question["alias_question"]


def test_no_subject_is_in_two_records(world):
    subjects = [record["subject"] for record in itertools.chain(*world.values())]
    assert len(subjects) == len(set(subjects)) == 5800


def test_entity_and_relation_groups_are_disjoint_and_cover_all():
    entities, relations = split_entities(7), split_relations()
    for name, table in load_facts().items():
        assert sorted(itertools.chain(*(groups[name] for groups in entities.values()))) == sorted(table.answers)
        assert sorted(itertools.chain(*(groups[name] for groups in relations.values()))) == sorted(
            relation.id for relation in table.entity_type.relations
        )
    assert {name: len(rows) for name, rows in entities["test-ood"].items()} == {
        "Country": 25, "City": 16, "Language": 15, "Currency": 14, "US state": 10, "Chemical element": 10, "Author": 11,
        "Company": 14,
    }  # fmt: skip
    assert split_entities(7) != split_entities(8)


def test_splits_share_entities_relations_and_phrases_only_as_claimed(world):
    train = world["train"]
    for split in ("valid-ood", "test-ood", "test-ood-entity"):
        assert not entities_of(world[split]) & entities_of(train)
    for split in ("valid-ood", "test-ood", "test-ood-relation"):
        assert not relations_of(world[split]) & relations_of(train)
    assert not entities_of(world["valid-ood"]) & entities_of(world["test-ood"])
    assert not relations_of(world["valid-ood"]) & relations_of(world["test-ood"])
    for id_split, ood_split in itertools.product(ID_SPLITS, OOD_SPLITS):
        assert not phrases_of(world[id_split]) & phrases_of(world[ood_split])
    assert relations_of(world["test-ood-entity"]) <= relations_of(train)
    id_entities = {(name, entity) for name, rows in split_entities(7)["id"].items() for entity in rows}
    for split in (*ID_SPLITS, "test-ood-relation"):
        assert entities_of(world[split]) <= id_entities
    for split in ("valid-id", "test-id"):
        assert relations_of(world[split]) == relations_of(train)
    assert len(relations_of(train)) == 27


def test_test_relations_cannot_be_guessed():
    for name, relations in split_relations()["test-ood"].items():
        for relation in relations:
            assert load_facts()[name].chance_level(relation) <= 0.2


def test_single_hop_questions_cover_every_fact_once():
    questions = single_hop_questions()
    assert len(questions) == sum(len(facts) for table in load_facts().values() for facts in table.answers.values())
    assert len({question.text for question in questions}) == len(questions)
    assert questions == single_hop_questions()
    both = single_hop_questions(paraphrases=True)
    assert both[::2] == questions
    assert [question.answers for question in both[1::2]] == [question.answers for question in questions]
    answers = {question.text: question.answers for question in questions}
    assert answers["What is the calling code for Portugal?"] == ("+351",)


def test_written_world_can_be_loaded(tmp_path):
    sizes = {"train": 5, "test-ood": 4}
    paths = write_world(tmp_path / "new" / "world", 3, sizes)
    assert sorted(path.name for path in paths.values()) == sorted(
        ["train_data_id.jsonl", "valid_data_id.jsonl", "valid_data_ood.jsonl", "test_data_id.jsonl", "test_data_ood.jsonl",
         "test_data_ood-entity.jsonl", "test_data_ood-relation.jsonl", "world.json"]
    )  # fmt: skip
    cases = load_cre(paths["train"])
    assert len(cases) == 5 and all(case.edits[0].subject and case.second_hop for case in cases)
    described = json.loads(paths["world"].read_text(encoding="utf-8"))
    assert described["seed"] == 3
    assert described["sizes"]["train"] == 5 and described["sizes"]["valid-id"] == 0
    assert described["relations"]["test-ood"]["Country"] == ["language"]
    assert described["entities"]["test-ood"]["Country"] == split_entities(3)["test-ood"]["Country"]
    assert described["chance_levels"]["Country"]["currency"] == pytest.approx(17 / 123, abs=1e-4)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tests": 1}, "unknown split 'tests'; the splits are train, valid-id"),
        ({"train": -1}, "'train' must be a whole number"),
        ({"train": 1.5}, "got 1.5"),
        ({"train": True}, "got True"),
        ({"test-id": 10**6}, "split 'test-id' can have at most [0-9]+ records"),
    ],
)
def test_world_sizes(sizes, message):
    with pytest.raises(DataError, match=message):
        generate_world(0, sizes)


def test_world_folder_that_is_a_file(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match=r"file.train_data_id\.jsonl: cannot be written"):
        write_world(blocked, 0, {})
