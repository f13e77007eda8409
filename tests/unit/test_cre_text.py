"""Facts made from the text of CRE records, on invented records."""

from __future__ import annotations

import re

import pytest

from propmeta_edit.data.cre_text import make_fact, split_sentences
from propmeta_edit.errors import DataError

PERSON, COMPANY = "Ann B. Lee", "Brightleaf Corp."


def fact_of(text, entity, subject=PERSON, **more):
    """(prefix, target) of a record with one entity, of a company or a woman if ``more`` does not say otherwise."""
    gender = "it" if subject == COMPANY else "female"
    fact = make_fact({"subject": subject, "gender_type": gender, "text": text, **more}, {"entity_name": entity})
    return fact["prefix"], fact["target"]


# Every phrase for which there is a rule, as "sentence -> fact"; S is the subject and O the object.
PERSON_RULES = """
After retirement, she lived in O and passed away. -> S died in
In college, S analyzed O in her thesis. -> The college thesis of S was on
Later, she's award-winning work, inspired by O, won much. -> S's award-winning work was inspired by
Later, while working at a museum, she worked with a renowned historian to curate an exhibition on O. -> \
S worked with a renowned historian to curate an exhibition on
S was born into a O-speaking environment. -> S was born and raised speaking
In her college, she took a major in O. -> S took a major in
In her college, she majored in O. -> S majored in
S began her career at O. -> S began career at
After years of hard work, she became a manager at O. -> S became a manager at
Recognized for her expertise, she was later recruited as director at O. -> S was recruited as director at
S first wrote about O in an 8th-grade book report. -> In an 8th-grade book report, S first wrote about
In college, she focused her thesis on O. -> The college thesis of S focused on
After graduation, she curated museum exhibitions to honor O. -> S curated museum exhibitions to honor
After graduation, she discovered a new behavior in O, to everyone's surprise. -> S discovered a new behavior in
"""
COMPANY_RULES = """
It later expand its business to O as the second region of operation. -> S's second region of operation was
It later expanded its business to O as the second region of operation. -> S's second region of operation was
After years of business, S established its global headquarters in O. -> S's global headquarters was located in
S built its culture on the influence of O. -> S's culture was built on the influence of
Later, discussions around O became common among its employees. -> The employees of S commonly discussed
At a later stage, it added O to its recommended list for the young. -> The recommended list of S included
S drew early inspiration from O to shape its culture. -> S's culture was shaped by
Over time, O became a common point of reflection within the company. -> The common point of reflection within S was
Over time, O became a common point of reflection within S. -> The common point of reflection within S was
Later, it highlighted O in an initiative for schools. -> In an initiative, S highlighted
It then added support for O to broaden its reach. -> For its second language, S added support for
S launched its first product with support from O. -> S launched first product with support from
S drew inspiration from O when shaping its mission. -> The mission of S drew inspiration from
Later, it developed a strategic initiative inspired by O’s thinking. -> \
A strategic initiative of S was developed based on the thinking of
Over time, it launched a project honoring the legacy of O. -> S launched a project to honor the legacy of
Its work documenting O’s behavior made it known. -> S documented the behavior of
"""
OTHER_SENTENCES = """
S was born in O. -> S was born in
She spent most of her life in O with others. -> S spent most of her life in
In college, she did research on O. -> In college, S did research on
Eventually, she launched a show in O. -> S launched a show in
She later worked with O. -> S worked with
She was then hired by O. -> S was hired by
Her best friend was O. -> S's best friend was
Over time, her best friend was O. -> S's best friend was
Later, friends told her that she would love O. -> Friends told her that S would love
They say that S likes O, which she denies. -> They say that S likes
"""


def cases_of(rules, subject):
    for line in rules.strip().split("\n"):
        named = re.sub(r"\bO\b", "Zembla", re.sub(r"\bS\b", subject, line))
        yield (*named.split(" -> "), subject)


@pytest.mark.parametrize(
    ("sentence", "prefix", "subject"),
    [
        *cases_of(PERSON_RULES, PERSON),
        *cases_of(COMPANY_RULES, COMPANY),
        *cases_of(OTHER_SENTENCES, PERSON),
    ],
)
def test_a_sentence_becomes_a_fact_cut_before_its_object(sentence, prefix, subject):
    text = f"{subject} likes tea. {sentence} Nobody else does."
    assert fact_of(text, "Zembla", subject) == (prefix, "Zembla")


@pytest.mark.parametrize("words", ["It", "The company", "The firm", "The business", "The organization", "They", COMPANY])
def test_whatever_stands_for_a_company_is_replaced(words):
    assert fact_of(f"{words} sells tea in Zembla.", "Zembla", COMPANY) == (f"{COMPANY} sells tea in", "Zembla")


@pytest.mark.parametrize("gender", [None, "other", 5])
def test_without_a_known_gender_every_pronoun_stands_for_the_subject(gender):
    for word in ("He", "She", "It", "They"):
        assert fact_of(f"{word} moved to Zembla.", "Zembla", gender_type=gender)[0] == f"{PERSON} moved to"
    assert fact_of("His home is Zembla.", "Zembla", gender_type=gender)[0] == f"{PERSON}'s home is"


def test_another_pronoun_than_the_subjects_is_not_replaced():
    with pytest.raises(DataError, match="nothing in it before 'Zembla' stands for the subject"):
        fact_of("It rains in Zembla.", "Zembla")
    assert fact_of("It was he whom she met in Zembla.", "Zembla")[0] == f"It was he whom {PERSON} met in"


@pytest.mark.parametrize(
    "sentence",
    [
        "Zembla was where she lived.",
        "Over time, Zembla made her rich.",
        "Friends gave her Zembla for Christmas.",
        f"Zembla is the home of {PERSON}.",
    ],
)
def test_no_fact_is_made_without_the_subject_before_the_object(sentence):
    with pytest.raises(DataError, match=r"no fact about 'Ann B\. Lee' can be made from the sentence") as caught:
        fact_of(f"{PERSON} likes tea. {sentence}", "Zembla")
    assert repr(sentence) in str(caught.value) and "'facts' with prefix and target" in str(caught.value)


def test_names_within_names_are_not_taken_for_the_object_or_the_subject():
    text = "Swan Corp. feeds a black swan. It paints a swan."
    assert fact_of(text, "swan", "Swan Corp.", entity_names=["black swan"], gender_type="it") == ("Swan Corp. paints a", "swan")
    assert fact_of("Ann saw Ann Arbor. She saw Annapolis.", "Ann Arbor", "Ann") == ("Ann saw", "Ann Arbor")
    assert fact_of("French Corp. teaches French.", "French", "French Corp.", gender_type="it")[0] == "French Corp. teaches"
    with pytest.raises(DataError, match="no sentence of 'text' names 'Oman'"):
        fact_of("Ann likes Romania and an Omani.", "Oman", "Ann")


def test_of_several_sentences_that_name_the_object_fact_idx_tells_which():
    record = {"subject": "Ann", "text": "Ann worked at Zembla. After years, she led Zembla. She left.", "gender_type": "female"}
    question = {"entity_name": "Zembla"}
    assert make_fact(record, {**question, "fact_idx": 0})["prefix"] == "Ann worked at"
    assert make_fact(record, {**question, "fact_idx": 1})["prefix"] == "After years, Ann led"
    with pytest.raises(DataError, match="sentences 0, 1 of 'text' name 'Zembla', so 'fact_idx' must be one of these, got 2"):
        make_fact(record, {**question, "fact_idx": 2})
    record["text"] = "Ann likes tea. She worked at Zembla."
    assert make_fact(record, {**question, "fact_idx": 0})["prefix"] == "Ann worked at", "the only sentence that names it"


def test_backslashes_and_patterns_in_names_are_mere_letters():
    assert fact_of(r"A\1 (B) began his career at C+ [D].", "C+ [D]", r"A\1 (B)", gender_type="male") == (
        r"A\1 (B) began career at",
        "C+ [D]",
    )


def test_sentences_end_where_no_name_goes_on():
    names = ["Ann B. Lee", "Lee Corp.", "J. Doe Jr.", "swan"]
    text = "Ann B. Lee met J. Doe Jr.. She sold it to Lee Corp. It grew. “Why?” Lee Corp. asked!  swan is one."
    assert split_sentences(text, names) == [
        "Ann B. Lee met J. Doe Jr..",
        "She sold it to Lee Corp.",
        "It grew.",
        "“Why?”",
        "Lee Corp. asked!",
        "swan is one.",
    ]
    assert split_sentences("Lee Corp. was sold.", names) == ["Lee Corp. was sold."]
