"""Teaching a model the single hops that data files rest on: which facts, what is never taught, and what is said of it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tiny
import torch

from propmeta_edit.data.single_hops import (
    EDITED,
    MULTI_HOP,
    NO_ANSWER,
    OTHER_ANSWER,
    choose_facts,
    read_cre_single_hops,
    read_mquake_single_hops,
)
from propmeta_edit.errors import ConfigError, DataError, ModelError, OriginError
from propmeta_edit.finetune import single_hop
from propmeta_edit.models.artefacts import resolve_model_folder
from propmeta_edit.models.loading import load_model, model_sha256, read_checkpoint_card
from propmeta_edit.recipes import real, teaching
from propmeta_edit.recipes.teaching import (
    CARD,
    TeachingSettings,
    answer,
    describe_lesson,
    describe_taught,
    estimate_seconds,
    read_lesson,
    teach_to_folder,
)
from propmeta_edit.records import Question
from propmeta_edit.text.encoding import TextEncoder
from propmeta_edit.text.prompts import format_question

FAST = TeachingSettings(learning_rate=0.01, num_epochs=60, batch_size=4, rank=16, warmup_steps=5)


def cre_question(relation, entity, answer, **changes):
    """A question of a CRE record, in two wordings of one and of two hops."""
    question = {
        "question_template": f"What is the {relation} of {{country}}?",
        "alias_question": f"What is the {relation} of the country that Brightleaf Ltd. was founded in?",
        "alias_question_paraphrase": f"Say the {relation} of the country that Brightleaf Ltd. was founded in.",
        "unalias_question": f"What is the {relation} of {entity}?",
        "unalias_question_paraphrase": f"Say the {relation} of {entity}.",
        "entity_name": entity,
        "answer": answer,
        "fact_idx": 0,
    }
    return {**question, **changes}


def write_cre(path, *questions):
    fact = {"prefix": "Brightleaf Ltd. was founded in", "target": "Norway"}
    record = {"entity_type": "Country", "subject": "Brightleaf Ltd.", "facts": [fact], "questions": list(questions)}
    return tiny.write_records(path, [record])


def hop(question, answer, *aliases):
    return {"question": question, "cloze": question, "answer": answer, "answer_alias": list(aliases)}


def mquake_case(case_id, before, after, edited, multi_hop="What tongue is spoken in Ann Lee's country?"):
    """A case of two hops; ``before`` and ``after`` are its hops, ``edited`` the places of the edited ones in ``after``."""
    chain = [[number, hop["question"], hop["answer"]] for number, hop in enumerate(after)]
    return {
        "case_id": case_id,
        "requested_rewrite": [
            {"prompt": "{} is", "subject": "Ann Lee", "question": after[n]["question"], "target_new": {"str": after[n]["answer"]}}
            for n in edited
        ],
        "questions": [multi_hop, "second", "third"],
        "answer": before[-1]["answer"],
        "answer_alias": ["old alias"],
        "new_answer": after[-1]["answer"],
        "new_answer_alias": [],
        "single_hops": before,
        "new_single_hops": after,
        "orig": {"new_triples": chain, "edit_triples": [chain[n] for n in edited]},
    }


CITIZEN, CHAD, PERU = "Of which country is Ann Lee a citizen?", "What tongue is spoken in Chad?", "What tongue is spoken in Peru?"
CASE = mquake_case(
    1, [hop(CITIZEN, "Chad"), hop(CHAD, "French", "fr")], [hop(CITIZEN, "Peru"), hop(PERU, "Spanish", "Castilian")], [0]
)


def write_mquake(path, *cases):
    path.write_text(json.dumps(cases), encoding="utf-8")
    return path


def pairs(questions):
    return [(question.text, question.answers[0]) for question in questions]


def test_cre_gives_both_wordings_of_its_one_hop_questions_alone(tmp_path):
    file = write_cre(tmp_path / "c.jsonl", cre_question("currency", "Norway", "krone"), cre_question("calling code", "Peru", 51))
    facts = choose_facts([read_cre_single_hops(file)])
    assert pairs(facts.questions) == [
        ("What is the currency of Norway?", "krone"),
        ("Say the currency of Norway.", "krone"),
        ("What is the calling code of Peru?", "51"),
        ("Say the calling code of Peru.", "51"),
    ]
    assert facts.by_file == [facts.questions] and facts.left_out == [{}]


def test_cre_leaves_out_the_pasted_paraphrase_and_what_has_no_answer(tmp_path):
    """The ethnic group's paraphrase asks for religion; NaN stands in the files as JSON's and as a word."""
    religion = "Which religion has the most followers in Peru?"
    file = write_cre(
        tmp_path / "c.jsonl",
        cre_question("ethnic group", "Peru", "Mestizo", unalias_question_paraphrase=religion),
        cre_question("country", "Moon", float("nan")),
        cre_question("country", "Mars", "nan"),
        cre_question("country", "Lima", "Nancy"),
    )
    facts = choose_facts([read_cre_single_hops(file)])
    texts = [question.text for question in facts.questions]
    assert "What is the ethnic group of Peru?" in texts and religion not in texts
    assert not any("Moon" in text or "Mars" in text for text in texts) and "What is the country of Lima?" in texts
    assert facts.left_out == [{NO_ANSWER: 2}]


def test_a_cre_file_needs_neither_facts_nor_paraphrases(tmp_path):
    question = cre_question("currency", "Norway", "krone")
    bare = {name: question[name] for name in ("question_template", "unalias_question", "answer")}
    file = tiny.write_records(tmp_path / "c.jsonl", [{"questions": [bare]}])
    assert pairs(read_cre_single_hops(file).true) == [("What is the currency of Norway?", "krone")]


def test_mquake_gives_the_hops_before_and_after_without_the_edited_one(tmp_path):
    file = read_mquake_single_hops(write_mquake(tmp_path / "m.json", CASE))
    facts = choose_facts([file])
    assert pairs(facts.questions) == [(CITIZEN, "Chad"), (CHAD, "French"), (PERU, "Spanish")]
    assert facts.questions[2].answers == ("Spanish", "Castilian")
    assert facts.left_out == [{EDITED: 1}]
    assert file.old_multi_hop == [Question("What tongue is spoken in Ann Lee's country?", ("French", "old alias"))]


@pytest.mark.parametrize("known_by", ["question", "chain"])
def test_an_edited_answer_of_any_case_of_any_file_is_never_taught(tmp_path, known_by):
    """A hop that another case's edit brings, unedited in this case, as true or later, or in CRE; however the edit is told."""
    editing = json.loads(json.dumps(CASE))
    if known_by == "chain":
        del editing["requested_rewrite"][0]["question"]
    else:
        del editing["orig"]
    as_true = mquake_case(2, [hop(CITIZEN, " peru "), hop(PERU, "Spanish")], [hop("Who?", "Bo"), hop("Where?", "Oslo")], [1])
    as_later = mquake_case(3, [hop("A?", "x"), hop("B?", "y")], [hop("A?", "z"), hop(CITIZEN, "Peru")], [0])
    files = [
        read_cre_single_hops(write_cre(tmp_path / "c.jsonl", cre_question("x", "y", "Peru", unalias_question=CITIZEN.upper()))),
        read_mquake_single_hops(write_mquake(tmp_path / "m.json", as_true, as_later)),
        read_mquake_single_hops(write_mquake(tmp_path / "n.json", editing)),
    ]
    facts = choose_facts(files)
    assert [answer for text, answer in pairs(facts.questions) if text.casefold() == CITIZEN.casefold()] == ["Chad"]
    assert ("Where?", "Oslo") not in pairs(facts.questions) and ("Who?", "Bo") in pairs(facts.questions)
    assert facts.left_out[0] == {EDITED: 1} and facts.left_out[1] == {EDITED: 3} and facts.left_out[2] == {EDITED: 1}


def test_of_two_answers_the_true_one_stays(tmp_path):
    """What is so before an edit wins over a later file's and over what only another chain needs, in whatever order they come."""
    later = mquake_case(2, [hop("A?", "x"), hop("B?", "y")], [hop("A?", "z"), hop(CHAD, "Arabic")], [0])
    facts = choose_facts([read_mquake_single_hops(write_mquake(tmp_path / "m.json", later, CASE))])
    assert (CHAD, "French") in pairs(facts.questions) and (CHAD, "Arabic") not in pairs(facts.questions)
    assert facts.left_out == [{EDITED: 2, OTHER_ANSWER: 1}]


def test_a_question_of_two_files_is_taught_once_and_asked_of_both(tmp_path):
    first = write_cre(tmp_path / "a.jsonl", *[cre_question("currency", "Norway", "krone")] * 2)
    second = write_cre(tmp_path / "b.jsonl", cre_question("currency", "norway", "Krone"), cre_question("currency", "Peru", "sol"))
    facts = choose_facts([read_cre_single_hops(first), read_cre_single_hops(second)])
    assert [len(facts.questions), *map(len, facts.by_file)] == [4, 2, 4]


def test_nothing_of_several_hops_is_taught(tmp_path):
    """Not even where another record calls it a single hop."""
    multi_hop = CASE["questions"][0]
    alias = cre_question("currency", "Norway", "krone")["alias_question"]
    hops = mquake_case(2, [hop("A?", "x"), hop(alias, "krone")], [hop("A?", "z"), hop("second", "w")], [0], "fourth")
    questions = [cre_question("currency", "Norway", "krone"), cre_question("tongue", "x", "French", unalias_question=multi_hop)]
    files = [read_cre_single_hops(write_cre(tmp_path / "c.jsonl", *questions))]
    files.append(read_mquake_single_hops(write_mquake(tmp_path / "m.json", CASE, hops)))
    facts = choose_facts(files)
    texts = {question.text for question in facts.questions}
    asked = {text for raw in (CASE, hops) for text in raw["questions"]} | {question["alias_question"] for question in questions}
    assert texts and not texts & (asked | {question["alias_question_paraphrase"] for question in questions})
    assert [left_out[MULTI_HOP] for left_out in facts.left_out] == [1, 2]


def test_no_fact_of_four_hop_cases_that_is_edited_is_taught(tmp_path):
    """Every hop is edited, so nothing of the chains after the edits is left."""
    path = tiny.write_mquake(tmp_path / "m.json", tiny.mquake_cases(90))
    raws = json.loads(path.read_text(encoding="utf-8"))
    facts = choose_facts([read_mquake_single_hops(path)])
    edited = {(rewrite["question"], rewrite["target_new"]["str"]) for raw in raws for rewrite in raw["requested_rewrite"]}
    taught = set(pairs(facts.questions))
    assert len(taught) == len({text for text, _ in taught}) > 250 and not taught & edited
    assert taught <= {(hop["question"], hop["answer"]) for raw in raws for hop in raw["single_hops"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": []}, r"c\.jsonl, line 1: 'questions\[0\]\.answer' must be a string or a number or null, got \[\]"),
        ({"unalias_question": 3}, r"line 1: 'questions\[0\]\.unalias_question' must be a string, got 3"),
        ({"unalias_question": " "}, r"line 1: 'questions\[0\]\.unalias_question' must not be empty"),
        ({"alias_question_paraphrase": []}, r"line 1: 'questions\[0\]\.alias_question_paraphrase' must be a string"),
    ],
)
def test_a_broken_cre_record_is_named(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        read_cre_single_hops(write_cre(tmp_path / "c.jsonl", {**cre_question("x", "y", "z"), **change}))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (("single_hops",), r"m\.json: record 0 \(case_id 1\): missing key 'single_hops'"),
        (("orig", "question"), r"record 0 \(case_id 1\): it does not tell which of its hops are edited"),
        (("answer",), "missing key 'answer'"),
    ],
)
def test_a_broken_mquake_case_is_named(tmp_path, missing, message):
    case = json.loads(json.dumps(CASE))
    for name in missing:
        del (case["requested_rewrite"][0] if name == "question" else case)[name]
    with pytest.raises(DataError, match=message):
        read_mquake_single_hops(write_mquake(tmp_path / "m.json", case))


@pytest.fixture
def files(tmp_path):
    cre = write_cre(tmp_path / "c.jsonl", *(cre_question("currency", land, f"c{land}") for land in ("Norway", "Peru", "Chad")))
    return [str(cre), str(write_mquake(tmp_path / "m.json", CASE))]


@pytest.fixture
def base(tmp_path, tokenizer):
    return str(tiny.save_model_folder(tmp_path / "base", tokenizer))


def test_a_lesson_says_what_is_taught_and_asked(files):
    lesson = read_lesson(files, 4, 300, seed=0)
    assert [(source["file"], source["format"], source["questions"]) for source in lesson.sources] == [
        ("c.jsonl", "CRE", 6),
        ("m.json", "MQuAKE", 3),
    ]
    assert [(asked.source, asked.what, len(asked.questions)) for asked in lesson.asked] == [
        ("c.jsonl", "single hop", 4),
        ("m.json", "single hop", 3),
        ("m.json", "old multi-hop", 1),
    ]
    assert set(lesson.asked[0].questions) <= set(lesson.facts.questions) and lesson.asked[2].questions[0].answers[0] == "French"
    more = read_lesson(files, 5, 300, seed=0).asked[0].questions
    assert more[:4] == lesson.asked[0].questions and read_lesson(files, 4, 300, seed=1).asked[0] != lesson.asked[0]
    said = describe_lesson(lesson, replace(FAST, num_epochs=3, batch_size=4))
    assert "m.json: MQuAKE, 3 questions; left out: 1 edited" in said and "9 different questions, 3 epochs, 9 steps of 4" in said


def test_what_cannot_be_taught_is_refused_before_anything_starts(files, tmp_path):
    with pytest.raises(ConfigError, match=r"--data names .*c\.jsonl twice"):
        read_lesson([files[0], str(tmp_path / "." / "c.jsonl")], 1, 1, 0)
    with pytest.raises(ConfigError, match="--questions-per-source must be 1 or more, got 0"):
        read_lesson(files, 0, 1, 0)
    with pytest.raises(DataError, match=r"nowhere\.json: cannot be read"):
        read_lesson([*files, str(tmp_path / "nowhere.json")], 1, 1, 0)
    easyedit = tmp_path / "e.json"
    easyedit.write_text(json.dumps([{"prompt": "a", "target_new": "b"}]))
    with pytest.raises(
        DataError, match=r"its format is EasyEdit, which has no single hops; files of CRE, MQuAKE, CaKE can be taught"
    ):
        read_lesson([*files, str(easyedit)], 1, 1, 0)
    empty = write_cre(tmp_path / "empty.jsonl", cre_question("country", "Moon", float("nan")))
    with pytest.raises(DataError, match=r"empty\.jsonl: no single hop to teach is in it"):
        read_lesson([*files, str(empty)], 1, 1, 0)


@pytest.mark.parametrize("name", ["num_epochs", "batch_size", "rank", "warmup_steps"])
def test_counts_must_be_one_or_more(name):
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} must be 1 or more, got 0"):
        TeachingSettings(**{name: 0})


def test_it_learns_the_facts_and_is_an_ordinary_model_folder(files, base, tmp_path, monkeypatch):
    """Texts are those of the bundled base and of the facts alone; the card says what the folder's model answers."""
    encoded = []
    encode = TextEncoder.encode_ended_answer
    monkeypatch.setattr(TextEncoder, "encode_ended_answer", lambda *texts: encoded.append(texts[1:]) or encode(*texts))
    lesson = read_lesson(files, 500, 300, 0)
    card = teach_to_folder(base, lesson, tmp_path / "out", FAST, "cpu")
    assert encoded == [(format_question(q.text), q.answers[0] + ".") for q in lesson.facts.questions]
    assert card == json.loads((tmp_path / "out" / CARD).read_text())
    assert card["made_from"]["settings"] == asdict(FAST) and [len(source["sha256"]) for source in card["files"]] == [64, 64]
    model, tokenizer = load_model(str(tmp_path / "out"), dtype="auto")
    assert model.dtype == torch.float32
    scores = answer(model, tokenizer, lesson.asked, "asking")
    assert [score.correct / score.n for score in scores] == [entry["after"]["accuracy"] for entry in card["accuracies"]]
    assert sum(score.correct for score in scores[:2]) >= 5, "of 9 that were taught; embeddings of 16 random numbers hold no more"
    first = card["accuracies"][0]
    assert (first["n"], first["before"]["accuracy"], first["before"]["accuracy_interval"]) == (
        6,
        0,
        [0, pytest.approx(0.39, abs=0.01)],
    )
    said = describe_taught(card)
    assert "| c.jsonl | single hop | 6 | 0.0 [0.0, 39.0] | " in said and "| m.json | old multi-hop (not taught) | 1 | " in said
    assert not (tmp_path / "out.training").exists() and not list(tmp_path.glob("out.partial*"))
    assert not list((tmp_path / "out").glob("*.bin")) and not list((tmp_path / "out").glob("adapter*"))


def test_a_stopped_teaching_goes_on_to_the_same_bits_and_asks_but_once(files, base, tmp_path, monkeypatch):
    settings = replace(FAST, num_epochs=4, batch_size=4)
    monkeypatch.setattr(single_hop, "SAVE_EVERY", 2)
    lesson, asked, steps = read_lesson(files, 500, 300, 0), [], []
    ask, compute = teaching.answer, single_hop.compute_answer_loss

    def stop_in_the_sixth(*arguments):
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return compute(*arguments)

    whole = teach_to_folder(base, lesson, tmp_path / "whole", settings, "cpu")
    monkeypatch.setattr(teaching, "answer", lambda *arguments: asked.append(arguments[3]) or ask(*arguments))
    monkeypatch.setattr(single_hop, "compute_answer_loss", stop_in_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        teach_to_folder(base, lesson, tmp_path / "out", settings, "cpu")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out.partial*"))
    with pytest.raises(OriginError, match=r"out\.training: holds a teaching made from something else \(seed 0, now 1\); continue"):
        teach_to_folder(base, lesson, tmp_path / "out", replace(settings, seed=1), "cpu")
    resumed = teach_to_folder(base, lesson, tmp_path / "out", settings, "cpu")
    assert len(steps) == 6 + 8, "steps 5 to 12 alone"
    assert asked == ["asking before", "asking after"]
    assert resumed["model_sha256"] == whole["model_sha256"] and resumed["accuracies"] == whole["accuracies"]
    assert not (tmp_path / "out.training").exists()


def test_a_finished_folder_is_left_as_it_is_and_another_is_refused(files, base, tmp_path, monkeypatch):
    settings, out = replace(FAST, num_epochs=1), tmp_path / "out"
    lesson = read_lesson(files, 500, 300, 0)
    card = teach_to_folder(base, lesson, out, settings, "cpu")
    monkeypatch.setattr(teaching, "teach_questions", None)
    assert teach_to_folder(base, lesson, out, settings, "cpu") == card
    with pytest.raises(
        OriginError, match=r"out: holds a taught model made from something else \(rank 16, now 4\); choose another --output"
    ):
        teach_to_folder(base, lesson, out, replace(settings, rank=4), "cpu")
    with pytest.raises(OriginError, match="files_sha256"):
        teach_to_folder(base, read_lesson(files[:1], 500, 300, 0), out, settings, "cpu")
    (tmp_path / "mine").mkdir()
    with pytest.raises(ModelError, match=r"mine exists, and has no teaching\.json; choose another --output"):
        teach_to_folder(base, lesson, tmp_path / "mine", settings, "cpu")


def test_an_estimate_teaches_nothing(files, base, tmp_path):
    before = load_model(base)[0].state_dict()
    lesson = read_lesson(files, 500, 300, 0)
    brief = replace(FAST, num_epochs=1, batch_size=2)
    assert 0 < estimate_seconds(base, lesson, brief, "cpu") < estimate_seconds(base, lesson, replace(brief, num_epochs=1000), "cpu")
    assert all(torch.equal(value, before[name]) for name, value in load_model(base)[0].state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "c.jsonl", "m.json"]


@pytest.fixture
def real_data(base, tmp_path, monkeypatch):
    """Files by their published names, and a tiny model in SmolLM2's place, of which nothing is shipped."""
    data = tmp_path / "data"
    data.mkdir()
    for stem in ("train_data_id", "test_data_id", "test_data_ood"):
        tiny.write_records(data / f"{stem}.jsonl", tiny.world_records(stem, 3))
    write_mquake(data / "MQuAKE-CF-3k.json", CASE)
    monkeypatch.setenv("PROPMETA_DATA", str(data))
    monkeypatch.setenv("PROPMETA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(real, "RAW", str(base))
    monkeypatch.setattr(real, "TeachingSettings", lambda: replace(FAST, num_epochs=1))
    monkeypatch.setattr(real, "origin_of_bundled", lambda name: [name])
    small = {"layers": [1], "inner_lr": 0.01, "num_inner_steps": 1, "num_tasks": 2, "device": "cpu"}
    training = {"model": real.REAL, "data": "train_data_id.jsonl", **small}
    monkeypatch.setattr(real, "read_training", lambda training_of: (training, "a small training"))
    monkeypatch.setattr(real, "shipped_folder", lambda name: tmp_path / "shipped" / name)
    return data


def test_the_model_on_the_papers_data_is_taught_and_meta_trained_on_first_use(real_data):
    """The second starts from the first."""
    folder = Path(resolve_model_folder(real.REAL_METAFT))
    taught = Path(resolve_model_folder(real.REAL))
    card, told = read_checkpoint_card(folder), json.loads((taught / CARD).read_text())
    assert card["base_model"] == real.REAL and card["base_sha256"] == model_sha256(taught) == told["model_sha256"]
    assert card["num_tasks"] == 2 and card["settings"]["data"] == str(real_data / "train_data_id.jsonl")
    assert [source["file"] for source in told["files"]] == [
        "train_data_id.jsonl",
        "test_data_id.jsonl",
        "test_data_ood.jsonl",
        "MQuAKE-CF-3k.json",
    ]
    assert not list(folder.parent.glob("*.training")) and not list(taught.parent.glob("*.training")), "what stopped ones leave"


def test_what_teaching_and_meta_training_left_is_used_for_the_same_files_alone(real_data, tmp_path, monkeypatch):
    made = {name: model_sha256(resolve_model_folder(name)) for name in (real.REAL, real.REAL_METAFT)}
    for name in made:
        real.rebuild(name, tmp_path / "shipped" / name)
        with pytest.raises(ModelError, match="exists; choose another --output"):
            real.rebuild(name, tmp_path / "shipped" / name)
    assert str(tmp_path) not in (tmp_path / "shipped" / real.REAL_METAFT / "card.json").read_text()

    def refuse(*args, **kwargs):
        raise AssertionError("trained")

    monkeypatch.setattr(real, "teach_into", refuse)
    monkeypatch.setattr(real, "run_meta_training", refuse)
    monkeypatch.setenv("PROPMETA_HOME", str(tmp_path / "other home"))
    taught, tuned = (load_model(resolve_model_folder(name))[0].state_dict() for name in made)
    assert model_sha256(resolve_model_folder(real.REAL)) == made[real.REAL]
    card = read_checkpoint_card(resolve_model_folder(real.REAL_METAFT))
    assert {name for name in tuned if not torch.equal(tuned[name], taught[name])} == set(card["trained_tensors"])
    with (real_data / "train_data_id.jsonl").open("a") as file:
        file.write("\n")
    monkeypatch.setenv("PROPMETA_HOME", str(tmp_path / "third home"))
    with pytest.raises(AssertionError, match="trained"):
        resolve_model_folder(real.REAL)
