"""What people bring is held against what each loader declares: anything else is an error that names file, record and field."""

from __future__ import annotations

import copy
import json
import random

import pytest
import tiny

from propmeta_edit.cli import main
from propmeta_edit.data.corpora import read_texts
from propmeta_edit.data.counterfact import load_counterfact
from propmeta_edit.data.cre import count_cre, load_cre
from propmeta_edit.data.easyedit_files import load_easyedit_file
from propmeta_edit.data.mquake import count_subset, load_mquake, load_mquake_subset
from propmeta_edit.data.single_hops import read_cre_single_hops, read_mquake_single_hops
from propmeta_edit.errors import DataError, RequestError
from propmeta_edit.recipes.data_check import describe_file
from propmeta_edit.recipes.edit_facts import read_requests
from propmeta_edit.records import Case, EditRequest, Question, as_requests

NAN = float("nan")
CRE, MQUAKE, KNOWEDIT, ZSRE = tiny.cre_record(), tiny.mquake_cases(1)[0], tiny.knowedit_record(), tiny.zsre_record()
COUNTERFACT = tiny.counterfact_record(0)
CRE_TEXT = {key: value for key, value in CRE.items() if key != "facts"}
MQUAKE["new_answer_alias"] = ["the Seat"]
CAKE = copy.deepcopy(MQUAKE)
CAKE["requested_rewrite"][0] |= {"rephrase_prompt": [{"question": "Book 0 is by", "answer": "Writer 0"}], "learning_prompt": []}
CAKE["cloze_question"] = "The seat of government there is"
MZSRE = {"en": ZSRE, "de": {**ZSRE, "src": "Wo wurde Ann geboren?"}}
QAEDIT = {
    "prompt": "Where was Ann born?",
    "target": "Lima",
    "subject": "Ann",
    "locality": [{"loc": "who wrote Emma", "loc_ans": "Austen"}],
}
REQUEST = {"prompt": "Ann Lee lives in", "target_new": {"str": "Peru"}, "subject": "Ann Lee"}
KINDS = {  # a valid record, and whatever reads such a file
    "CRE": (CRE, (load_cre, lambda path: load_cre(path, "all"), count_cre, read_cre_single_hops)),
    "CRE without facts": (CRE_TEXT, (load_cre, count_cre, read_cre_single_hops)),
    "MQuAKE": (MQUAKE, (load_mquake, load_mquake_subset, count_subset, read_mquake_single_hops)),
    "CaKE": (CAKE, (load_mquake, read_mquake_single_hops)),
    "CounterFact": (COUNTERFACT, (load_counterfact,)),
    "KnowEdit": (KNOWEDIT, (load_easyedit_file,)),
    "ZsRE": (ZSRE, (load_easyedit_file,)),
    "MzsRE": (MZSRE, (load_easyedit_file,)),
    "QAEdit": (QAEDIT, (load_easyedit_file,)),
    "requests": (REQUEST, (read_requests,)),
    "texts": ({"text": "Ann Lee lives in Peru.", "url": "x"}, (lambda path: read_texts(str(path)),)),
}


def write(folder, records):
    path = folder / "data.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def changed(record, place, value):
    """A copy with another value at a place such as ``("questions", 0, "answer")``."""
    result = copy.deepcopy(record)
    inside = result
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    return result


def name_of(place):
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place).removeprefix(".")


STRINGS = {  # by kind of file, where a string belongs
    "CRE": [
        ("entity_type",),
        ("subject",),
        ("facts", 0, "prefix"),
        ("facts", 0, "target"),
        ("questions", 0, "question_template"),
        ("questions", 0, "alias_question"),
        ("questions", 0, "unalias_question"),
        ("questions", 0, "entity_name"),
    ],
    "MQuAKE": [
        ("requested_rewrite", 0, "prompt"),
        ("requested_rewrite", 0, "subject"),
        ("requested_rewrite", 0, "target_new", "str"),
        ("questions", 0),
        ("questions", 2),
    ],
    "CounterFact": [
        ("requested_rewrite", "prompt"),
        ("requested_rewrite", "subject"),
        ("requested_rewrite", "target_new", "str"),
        ("requested_rewrite", "target_true", "str"),
        ("paraphrase_prompts", 1),
        ("neighborhood_prompts", 2),
    ],
    "KnowEdit": [("prompt",), ("target_new",)],
    "ZsRE": [("src",), ("alt",)],
    "MzsRE": [("de", "src"), ("de", "alt")],
    "QAEdit": [("prompt",), ("target",)],
    "requests": [("prompt",), ("target_new", "str")],
}
NO_STRINGS = {"null": None, "NaN": NAN, "number": 5, "true": True, "object": {"a": "b"}, "half a letter": "Ann \ud83d"}


@pytest.mark.parametrize("what", NO_STRINGS)
@pytest.mark.parametrize(("kind", "place"), [(kind, place) for kind, places in STRINGS.items() for place in places])
def test_where_a_string_belongs(tmp_path, kind, place, what):
    record, (load, *_) = KINDS[kind]
    path = write(tmp_path, [record, changed(record, place, NO_STRINGS[what])])
    with pytest.raises(DataError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: record 1")
    assert f"'{name_of(place)}' {'holds' if what == 'half a letter' else 'must be '}" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "place", "value", "message"),
    [
        # A string, a number or an object where a list belongs, and lists with nothing in them.
        ("CRE", ("questions",), "What?", "'questions' must be a list, got \"What?\""),
        ("CRE", ("questions",), {"0": {}}, "'questions' must be a list, got {"),
        ("CRE", ("questions",), [], "'questions' must not be an empty list"),
        ("CRE", ("questions", 0), "What?", "'questions[0]' must be a JSON object"),
        ("CRE", ("facts",), "Ann lives in Peru.", "'facts' must be a list"),
        ("CRE", ("facts", 0), ["Ann"], "'facts[0]' must be a JSON object"),
        ("MQuAKE", ("questions",), "What is it?", "'questions' must be a list, got \"What is it?\""),
        ("MQuAKE", ("questions",), [], "'questions' must not be an empty list"),
        ("MQuAKE", ("new_answer_alias",), "Peru", "'new_answer_alias' must be a list, got \"Peru\""),
        ("MQuAKE", ("requested_rewrite",), "Ann", "'requested_rewrite' must be a list"),
        ("MQuAKE", ("requested_rewrite",), [], "'requested_rewrite' must not be an empty list"),
        ("MQuAKE", ("requested_rewrite",), [[]], "'requested_rewrite[0]' must be a JSON object, got []"),
        ("MQuAKE", ("requested_rewrite", 0, "target_new"), "Peru", "'requested_rewrite[0].target_new' must be a JSON object"),
        ("MQuAKE", ("requested_rewrite", 0, "target_new"), ["Peru"], "'requested_rewrite[0].target_new' must be a JSON object"),
        ("MQuAKE", ("new_single_hops",), "hop", "'new_single_hops' must be a list"),
        ("MQuAKE", ("new_single_hops", 1), "hop", "'new_single_hops[1]' must be a JSON object"),
        ("MQuAKE", ("orig",), [], "'orig' must be a JSON object, got []"),
        ("MQuAKE", ("orig", "new_triples"), "Q1 P2 Q3", "'orig.new_triples' must be a list"),
        ("MQuAKE", ("orig", "new_triples", 0), "Q1", "'orig.new_triples[0]' must be a list"),
        ("MQuAKE", ("orig", "edit_triples", 0), ["Q1"], "'orig.edit_triples[0]' must have 3 items or more, got 1"),
        ("CaKE", ("requested_rewrite", 0, "rephrase_prompt"), "other words", "rephrase_prompt' must be a list"),
        ("CaKE", ("requested_rewrite", 0, "rephrase_prompt", 0), "other words", "rephrase_prompt[0]' must be a JSON object"),
        (
            "CaKE",
            ("requested_rewrite", 0, "learning_prompt"),
            [{"question": "x"}],
            "missing key 'answer' in 'requested_rewrite[0].learn",
        ),
        ("CaKE", ("cloze_question",), ["The"], "'cloze_question' must be a string, got [\"The\"]"),
        ("CounterFact", ("neighborhood_prompts",), "The home of Bob is", "'neighborhood_prompts' must be a list"),
        ("CounterFact", ("requested_rewrite",), None, "'requested_rewrite' must be a JSON object, got null"),
        ("KnowEdit", ("target_new",), [], "'target_new' must not be empty, got []"),
        ("KnowEdit", ("target_new",), [[" "]], "'target_new' must not be empty"),
        ("KnowEdit", ("portability",), "Reasoning", "'portability' must be a JSON object or a list"),
        (
            "KnowEdit",
            ("portability", "Reasoning"),
            "What?",
            "'portability.Reasoning' must be a JSON object or null or a list of such",
        ),
        (
            "KnowEdit",
            ("portability", "Reasoning", 0),
            5,
            "'portability.Reasoning[0]' must be a JSON object or null or a list of such",
        ),
        (
            "KnowEdit",
            ("portability", "Reasoning", 0, "ground_truth"),
            {"a": 1},
            "ground_truth' must be a string or a number or a list",
        ),
        ("KnowEdit", ("portability", "Reasoning", 0, "ground_truth"), [NAN], "ground_truth[0]' must be a number, got NaN"),
        ("KnowEdit", ("portability", "Reasoning", 0, "ground_truth"), [None], "ground_truth[0]' must be a string or a number"),
        ("KnowEdit", ("portability", "Reasoning", 0, "prompt"), None, "a probe with the answer 'Spanish' has no 'prompt'"),
        ("KnowEdit", ("locality",), 5, "'locality' must be a JSON object or a list, got 5"),
        ("KnowEdit", ("subject",), ["Ann"], "'subject' must be a string"),
        ("ZsRE", ("loc_ans",), {"a": 1}, "'loc_ans' must be a string or a number or a list of such"),
        ("ZsRE", ("portability", "New Answer"), True, "'portability.New Answer' must be a string or a number or a list of such"),
        ("MzsRE", ("de", "alt"), {}, "'de.alt' must be a string or a list of such, got {}"),
        ("QAEdit", ("locality", 0), "who", "'locality[0]' must be a JSON object or null or a list of such"),
        ("requests", ("target_new",), ["Peru"], "'target_new' must be a string or a JSON object"),
        ("requests", ("subject",), "Bob", "the subject 'Bob' does not occur in its prompt"),
        # Numbers that are none, or not whole.
        ("CRE", ("questions", 0, "fact_idx"), 0.5, "'questions[0].fact_idx' must be a whole number, got 0.5"),
        ("CRE", ("questions", 0, "fact_idx"), NAN, "'questions[0].fact_idx' must be a whole number, got NaN"),
        ("CRE", ("questions", 0, "fact_idx"), None, "needs 'fact_idx'"),
        ("CRE", ("questions", 0, "answer"), float("inf"), "'questions[0].answer' must be a number, got Infinity"),
        ("CRE", ("questions", 0, "answer"), True, "'questions[0].answer' must be a string or a number or null, got true"),
        ("CRE", ("questions", 0, "answer"), {"a": 1}, "'questions[0].answer' must be a string or a number or null"),
        ("CRE", ("questions", 0, "answer"), ["Lima"], "'questions[0].answer' must be a string or a number or null"),
        ("CRE", ("questions", 0, "answer"), " ", "'questions[0].answer' must not be empty"),
        ("MQuAKE", ("new_answer",), None, "'new_answer' must be a string or a number, got null"),
        ("MQuAKE", ("new_answer",), NAN, "'new_answer' must be a number, got NaN"),
        ("MQuAKE", ("new_answer",), {"str": "Peru"}, "'new_answer' must be a string or a number, got {"),
        ("MQuAKE", ("new_answer",), ["Peru"], "'new_answer' must be a string or a number, got ["),
        ("MQuAKE", ("new_answer",), "", "'new_answer' must not be empty"),
        ("MQuAKE", ("new_answer",), "\udc00", "'new_answer' holds \\udc00, half of a character"),
        ("MQuAKE", ("new_answer_alias", 0), None, "'new_answer_alias[0]' must be a string or a number, got null"),
        ("MQuAKE", ("new_answer_alias", 0), ["x"], "'new_answer_alias[0]' must be a string or a number"),
        ("MQuAKE", ("case_id",), None, "'case_id' must be a string or a whole number, got null"),
        ("MQuAKE", ("case_id",), 1.5, "'case_id' must be a string or a whole number, got 1.5"),
        # Texts with nothing in them.
        ("CRE", ("subject",), "", "'subject' must not be empty"),
        ("CRE", ("facts", 0, "target"), " ", "'facts[0].target' must not be empty"),
        ("CRE", ("facts", 0, "prefix"), " . ", "prompt must be a non-empty string"),
        ("MQuAKE", ("requested_rewrite", 0, "target_new", "str"), " ", "target_new.str' must not be empty"),
        ("MQuAKE", ("questions", 1), "", "'questions[1]' must not be empty"),
        ("CounterFact", ("paraphrase_prompts", 0), "\n", "'paraphrase_prompts[0]' must not be empty"),
        ("KnowEdit", ("prompt",), " ", "prompt must be a non-empty string"),
    ],
)
def test_other_values_than_belong_there(tmp_path, kind, place, value, message):
    record, (load, *_) = KINDS[kind]
    with pytest.raises(DataError) as caught:
        load(write(tmp_path, [record, changed(record, place, value)]))
    assert str(caught.value).startswith(f"{tmp_path / 'data.json'}: record 1") and message in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("requests", "texts")])
def test_the_command_says_it_in_one_line_and_exits_with_2(tmp_path, capsys, kind):
    record, _ = KINDS[kind]
    broken = {name: {"en": 5, "de": 5} if name == "src" else 5 for name in record}
    if kind == "MzsRE":
        broken = {"en": {**ZSRE, "alt": None}, "de": {**ZSRE, "src": 5}}
    assert main(["data", "check", str(write(tmp_path, [record, broken]))]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith(f"error: {tmp_path / 'data.json'}: record 1")


def test_fields_that_nothing_reads_are_ignored_and_listed(tmp_path):
    cre = {**CRE, "augmented_texts": ["x"], "questions": [{**CRE["questions"][0], "note": 1}]}
    assert load_cre(write(tmp_path, [cre, CRE])) == load_cre(write(tmp_path, [CRE, CRE]))
    described = describe_file(write(tmp_path, [cre, {**CRE, "augmented_texts": None}]))
    assert "\nignored       augmented_texts (2), questions[].note (1)\n" in described
    mquake = {**MQUAKE, "orig": {**MQUAKE["orig"], "edit_triples_idx": [0, 1, 2, 3]}}
    assert load_mquake(write(tmp_path, [mquake])) == load_mquake(write(tmp_path, [MQUAKE]))
    ignored = "orig.edit_triples_idx (1), orig.new_triples_labeled (1), orig.triples (1), orig.triples_labeled (1)"
    assert f"\nignored       {ignored}, requested_rewrite[].relation_id (1)\n" in describe_file(write(tmp_path, [mquake]))
    assert "ignored       attribute_prompts (1), generation_prompts (1), pararel_idx (1)" in describe_file(
        write(tmp_path, [COUNTERFACT])
    )
    assert "\nignored       de.answers (1), de.cond (1), de.pred (1), en.answers (1), " in describe_file(write(tmp_path, [MZSRE]))


@pytest.mark.parametrize("value", [None, NAN, 5, True, ["x"], {"a": 1}, "", " ", "Ann \ud83d"])
@pytest.mark.parametrize("name", ["prompt", "target_new", "subject"])
def test_requests_in_python_are_held_to_the_same(name, value):
    fine = {"prompt": "Ann lives in", "target_new": "Peru", "subject": "Ann"}
    if name == "subject" and value in (None, "", " "):
        assert as_requests({**fine, name: value})
        return
    with pytest.raises(RequestError, match=rf"request 0: {name} "):
        as_requests({**fine, name: value})


@pytest.mark.parametrize("value", [None, NAN, 5, ["x"], "", " ", "Ann \ud83d"])
def test_questions_in_python_are_held_to_the_same(value):
    with pytest.raises(RequestError, match="question"):
        Question(value, ("Lima",))
    with pytest.raises(RequestError, match="question 'What\\?'"):
        Question("What?", ("Lima", value))
    with pytest.raises(RequestError, match="question 'What\\?'"):
        Question("What?", "Lima")


VALUES = (
    *(None, NAN, float("inf"), True, 0, -1, 10**30, 2.5, -(2**70)),
    *("", " ", "x", "{}", "{} {}", "Ann", "nan", "\ud800", "\u0000", "\u2028"),
    *([], [[]], [None], ["x"], [{}], {}, {"x": 1}, {"str": 5}, {"en": {"src": "x"}}),
)


def mutate(record, random_):
    """A copy with one to three things put in another's place, left out, doubled, added or exchanged, anywhere in it."""
    result = copy.deepcopy(record)
    for _ in range(random_.randint(1, 3)):
        places = list(walk(result))
        inside, key = random_.choice(places)
        do = random_.choice(("replace", "replace", "replace", "remove", "double", "add", "exchange", "wrap"))
        if do == "replace":
            inside[key] = copy.deepcopy(random_.choice(VALUES))
        elif do == "remove":
            del inside[key]
        elif do == "double" and isinstance(inside, list):
            inside.append(copy.deepcopy(inside[key]))
        elif do == "add":
            inside_key = random_.choice(("extra", "text", "target_new_str", "\ud800"))
            (inside if isinstance(inside, dict) else result)[inside_key] = copy.deepcopy(random_.choice(VALUES))
        elif do == "exchange":
            other, other_key = random_.choice(places)
            inside[key], other[other_key] = copy.deepcopy(other[other_key]), copy.deepcopy(inside[key])
        else:
            inside[key] = [inside[key]]
        if not result:
            return result
    return result


def walk(value):
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from walk(value[key])


def check_texts(cases):
    """Whatever was read can be encoded, as every tokenizer has to."""
    for case in cases if isinstance(cases, list) else ():
        if isinstance(case, Case):
            for question in (case.question, case.second_hop, case.other_fact, case.known, *(p.question for p in case.probes)):
                if question is not None:
                    "".join((question.text, *question.answers, question.cloze or "")).encode()
            for edit in case.edits:
                assert isinstance(edit, EditRequest) and edit.target_new.strip()
                "".join((edit.prompt, edit.target_new, edit.subject or "", *edit.rephrasings)).encode()


READERS = list(dict.fromkeys(read for _, readers in KINDS.values() for read in (*readers, describe_file)))


@pytest.mark.parametrize("kind", KINDS)
def test_two_thousand_mutations_give_cases_or_a_data_error(tmp_path, kind):
    """200 of each of eleven kinds, through its own loaders and those of all other kinds."""
    record, own = KINDS[kind]
    random_ = random.Random(f"border {kind}")
    outcomes = {read: [] for read in READERS}
    for _ in range(200):
        path = write(tmp_path, [mutate(record, random_)])
        for read in READERS:
            try:
                check_texts(read(path))
                outcomes[read].append("read")
            except DataError as error:
                assert str(error).startswith(str(path))
                outcomes[read].append("refused")
    assert all(20 < outcomes[read].count("refused") < 180 for read in own), "both happen"
