"""The offline stand-in for MQuAKE: format, facts, chains and what its answers promise."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest
import tiny

from propmeta_edit.data.mquake import load_mquake, load_mquake_subset
from propmeta_edit.errors import DataError
from tools.world.facts import load_facts
from tools.world.generate import single_hop_questions
from tools.world.mquake import generate_mquake, write_mquake
from tools.world.wording import ENTITY_TYPES

SEED = 7
TYPES = {kind.noun: name for name, kind in ENTITY_TYPES.items()}


@pytest.fixture(scope="module")
def lists():
    return generate_mquake(SEED)


@pytest.fixture(scope="module")
def cases(lists):
    return [*lists["2hop"], *lists["3hop"]]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_mquake(tmp_path_factory.mktemp("mquake") / "new" / "folder", SEED)


def find_fact(subject, relation_id):
    """The world's answer, the type read off the relation id."""
    noun, relation = relation_id.split("_", 1)
    return load_facts()[TYPES[noun]].answers[subject].get(relation)


def find_entity(answer, next_relation_id):
    """The subject of the next hop that an answer stands for."""
    names = load_facts()[TYPES[next_relation_id.split("_", 1)[0]]].answers
    return answer if answer in names else f"the {answer}"


def walk(subject, relations, edits):
    """The answers along a chain: the edit of a (subject, relation) if there is one, else the world's fact."""
    answers = []
    for index, relation in enumerate(relations):
        if index:
            subject = find_entity(answers[-1], relation)
        answers.append(edits.get((subject, relation), find_fact(subject, relation)))
    return answers


def entity_names(relation_id):
    """What an answer of a relation may be if it is an entity of the world; answers name currencies without their article."""
    noun = relation_id.rsplit("_", 1)[1].replace("homeland", "country")
    return {name.removeprefix("the ") if noun == "currency" else name for name in load_facts()[TYPES[noun]].answers}


def relations_of(raw):
    return tuple(triple[1] for triple in raw["orig"]["triples"])


def subject_of(raw):
    return raw["orig"]["triples"][0][0]


def names_of(raw, prefix):
    return [name.lower() for name in (raw[f"{prefix}answer"], *raw[f"{prefix}answer_alias"])]


def same_shape(one, other):
    """Whether two JSON values have the same keys and types; lists by their first items."""
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same_shape(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return not one or not other or same_shape(one[0], other[0])
    return type(one) is type(other)


def test_shape_of_the_real_files(cases):
    [real] = tiny.mquake_cases(1)  # has the keys of the released files
    for raw in cases:
        assert same_shape(raw, real)
        assert len(raw["questions"]) == len(set(raw["questions"])) == 3


def test_two_hop_file_is_the_subset(paths, lists):
    subset = load_mquake_subset(paths["2hop"])
    assert subset == load_mquake(paths["2hop"])
    assert len(subset) == len(lists["2hop"]) == 350
    assert {(case.tags["hops"], case.tags["edits"]) for case in subset} == {("2", "1")}
    assert [case.question.text for case in subset] == [raw["questions"][0] for raw in lists["2hop"]]


def test_three_hop_file(paths, lists):
    loaded = load_mquake(paths["3hop"])
    assert len(loaded) == len(lists["3hop"]) == 150
    assert {(case.tags["hops"], case.tags["edits"]) for case in loaded} == {("3", "2")}
    assert load_mquake_subset(paths["3hop"]) == []
    patterns = Counter(
        tuple(triple in raw["orig"]["edit_triples"] for triple in raw["orig"]["new_triples"]) for raw in lists["3hop"]
    )
    assert set(patterns) == {(True, True, False), (True, False, True), (False, True, True)}


def test_files_hold_the_lists(paths, lists):
    assert [path.name for path in paths.values()] == ["mquake-standin-2hop.json", "mquake-standin-3hop.json"]
    assert {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items()} == lists


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write_mquake(tmp_path / "file" / "folder", SEED)


def test_edits_overwrite_facts_of_the_world(cases):
    for raw in cases:
        for edit in raw["requested_rewrite"]:
            assert edit["target_true"]["str"] == find_fact(edit["subject"], edit["relation_id"])
            assert edit["target_new"]["str"] != edit["target_true"]["str"]
            assert edit["target_new"]["str"] not in edit["subject"]
            assert edit["target_new"]["str"] in entity_names(edit["relation_id"])
            assert edit["prompt"].count("{}") == 1
            assert edit["subject"] in edit["prompt"].format(edit["subject"])


def test_answers_follow_from_facts_and_edits(cases):
    for raw in cases:
        edits = {(edit["subject"], edit["relation_id"]): edit["target_new"]["str"] for edit in raw["requested_rewrite"]}
        for prefix, applied in (("", {}), ("new_", edits)):
            answers = walk(subject_of(raw), relations_of(raw), applied)
            assert None not in answers
            assert [hop["answer"] for hop in raw[f"{prefix}single_hops"]] == answers
            assert [triple[2] for triple in raw["orig"][f"{prefix}triples_labeled"]] == answers
            assert raw[f"{prefix}answer"] == answers[-1]


def test_every_edit_matters(cases):
    for raw in cases:
        edits = {(edit["subject"], edit["relation_id"]): edit["target_new"]["str"] for edit in raw["requested_rewrite"]}
        for left_out in edits:
            others = {key: value for key, value in edits.items() if key != left_out}
            try:
                answer = walk(subject_of(raw), relations_of(raw), others)[-1]
            except KeyError:  # the fact leads out of the world ("the euro")
                continue
            assert answer != raw["new_answer"]


def test_chains_are_joined_and_hold_the_edits(cases):
    for raw in cases:
        orig = raw["orig"]
        assert [triple[1] for triple in orig["new_triples"]] == list(relations_of(raw))
        for chain in (orig["triples"], orig["new_triples"]):
            assert all(one[2] == other[0] for one, other in itertools.pairwise(chain))
            assert len({chain[0][0], *(triple[2] for triple in chain)}) == len(chain) + 1
        edited = [[edit["subject"], edit["relation_id"], edit["target_new"]["id"]] for edit in raw["requested_rewrite"]]
        assert orig["edit_triples"] == edited == [triple for triple in orig["new_triples"] if triple in edited]


def test_single_hops_are_the_taught_questions(cases):
    taught = {question.text: question.answers[0] for question in single_hop_questions()}
    for raw in cases:
        assert all(taught[hop["question"]] == hop["answer"] for hop in raw["single_hops"])
        assert all(hop["question"] in taught for hop in raw["new_single_hops"])
        for edit in raw["requested_rewrite"]:
            assert taught[edit["question"]] == edit["target_true"]["str"]


def test_questions_name_the_subject_and_no_other_entity_of_the_chains(cases):
    for raw in cases:
        inner = {triple[2] for triple in (*raw["orig"]["triples"][:-1], *raw["orig"]["new_triples"][:-1])}
        for question in raw["questions"]:
            assert subject_of(raw) in question and "{" not in question
            rest = question.replace(subject_of(raw), "")
            assert not [name for name in inner if name in rest]


def test_an_answer_match_means_something(cases):
    for raw in cases:
        old, new = names_of(raw, ""), names_of(raw, "new_")
        assert min(map(len, (*old, *new))) >= 3
        assert not [(a, b) for a in old for b in new if a in b or b in a]
        assert not [name for name in (*old, *new) for question in raw["questions"] if name in question.lower()]
        last = raw["new_single_hops"][-1]
        for edit in raw["requested_rewrite"]:
            statement = f"{edit['prompt'].format(edit['subject'])} {edit['target_new']['str']}".lower()
            if edit["question"] != last["question"]:
                assert not [name for name in new if name in statement]


def test_article_is_optional_in_answers(cases):
    answers = [(raw[f"{p}answer"], raw[f"{p}answer_alias"]) for raw in cases for p in ("", "new_")]
    assert all(aliases == ([answer[4:]] if answer.startswith("the ") else []) for answer, aliases in answers)
    assert ("the United States", ["United States"]) in answers


@pytest.mark.parametrize("seed", [0, 1, SEED])
def test_no_duplicates_balanced_and_varied(seed):
    lists = generate_mquake(seed)
    assert {name: len(rows) for name, rows in lists.items()} == {"2hop": 350, "3hop": 150}
    for rows in lists.values():
        keys = [(subject_of(raw), *relations_of(raw)) for raw in rows]
        assert len(keys) == len(set(keys))
    ids = [raw["case_id"] for raw in (*lists["2hop"], *lists["3hop"])]
    assert len(ids) == len(set(ids)) == 500
    first = Counter(relations_of(raw)[0] for raw in lists["2hop"])
    assert len(first) == 10 and min(first.values()) >= 30
    second = Counter(relations_of(raw)[1] for raw in lists["2hop"])
    assert len(second) >= 20 and max(second.values()) <= 40
    assert len(Counter(relations_of(raw)[:2] for raw in lists["3hop"])) >= 6
    answers = Counter(raw["new_answer"] for raw in lists["2hop"])
    assert len(answers) >= 200 and max(answers.values()) <= 30


def test_same_seed_same_cases(lists):
    assert json.dumps(generate_mquake(SEED)) == json.dumps(lists)
    other = generate_mquake(SEED + 1)
    for name in lists:
        assert [subject_of(raw) for raw in other[name][:20]] != [subject_of(raw) for raw in lists[name][:20]]


def test_a_composed_question(lists):
    raw = next(raw for raw in lists["2hop"] if relations_of(raw) == ("city_country", "country_capital"))
    city = subject_of(raw)
    assert raw["requested_rewrite"][0]["prompt"] == "{} is located in the country of"
    assert raw["questions"][0] == f"What is the capital of the country that {city} is located in?"
    assert raw["questions"][2] == f"What is the capital of the country where one finds {city}?"
