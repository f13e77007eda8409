"""The atomic facts of CRE records that have ``text`` and no ``facts``: each is made from the sentence that names its object.

Where the author's notebook (leo-liuzy/propmend, ``notebooks/syn_data_text_curation.ipynb``) has other words for a fact than for the
sentence that tells it, a rewriting leads from these to those. Any other sentence is cut before the object, if the subject is there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from propmeta_edit.errors import DataError

# Stand for subject and object in a sentence while it is rewritten: characters that no text has.
_SUBJECT, _OBJECT = "\ue000", "\ue001"
_COMPANY = "it|they|the (?:company|firm|business|organi[sz]ation)"
# By a record's gender_type: words that stand for the subject, and those that stand for the subject's.
_PRONOUNS = {"male": ("he|they", "his|their"), "female": ("she|they", "her|their"), "it": (_COMPANY, "its|their")}
_ANY_PRONOUN = (f"he|she|{_COMPANY}", "his|her|its|their")
# Tell only the order of the sentences, of which a fact that stands alone knows nothing.
_ORDER_WORDS = "Later|Eventually|Over time|At a later stage"
_OPENING = re.compile(rf"^(?:{_ORDER_WORDS}), ")
_ADVERB = re.compile(rf"({_SUBJECT}(?: was)?) (?:later|then) ")
_END_OF_SENTENCE = re.compile(r"[.!?]+[\"”’)]*\s+")
_QUOTES = "\"“‘'"

# How a sentence begins, and the fact cut before its object. S is the subject or a pronoun for it, O the object, POSS "his" and the
# like; what is in brackets is kept. The phrases are the author's.
_REWRITINGS = (
    # Country
    (r"S later expand(?:ed)? POSS business to O as the second region of operation", r"S's second region of operation was"),
    (r"After retirement, S lived in O and passed away", r"S died in"),
    (r"After years of business, S established POSS global headquarters in O", r"S's global headquarters was located in"),
    # Creative Work
    (r"S built POSS culture on the influence of O", r"S's culture was built on the influence of"),
    (r"Later, discussions around O became common among POSS employees", r"The employees of S commonly discussed"),
    (r"At a later stage, S added O to POSS recommended list", r"The recommended list of S included"),
    (r"In college, S analyzed O in POSS thesis", r"The college thesis of S was on"),
    (r"Later, S's award-winning work, inspired by O", r"S's award-winning work was inspired by"),
    # Event
    (r"S drew early inspiration from O to shape POSS culture", r"S's culture was shaped by"),
    (r"Over time, O became a common point of reflection within (?:the company|S)", r"The common point of reflection within S was"),
    (r"Later, S highlighted O in an initiative", r"In an initiative, S highlighted"),
    (r"Later, while working at a museum, (S worked with a renowned historian to curate an exhibition on) O", r"\1"),
    # Language
    (r"S then (added support for) O to broaden POSS reach", r"For its second language, S \1"),
    (r"S was born into an? O-speaking environment", r"S was born and raised speaking"),
    (r"In POSS college, (S took a major in|S majored in) O", r"\1"),
    # Organization
    (r"S launched POSS (first product with support from) O", r"S launched \1"),
    (r"S began POSS career at O", r"S began career at"),
    (r"After years of hard work, (S became a manager at) O", r"\1"),
    (r"Recognized for POSS expertise, S was later (recruited as director at) O", r"S was \1"),
    # Person
    (r"(S first wrote about) O in an 8th-grade book report", r"In an 8th-grade book report, \1"),
    (r"In college, S focused POSS thesis on O", r"The college thesis of S focused on"),
    (r"After graduation, (S curated museum exhibitions to honor) O", r"\1"),
    (r"S (drew inspiration from) O when shaping POSS mission", r"The mission of S \1"),
    (
        r"Later, S developed a strategic initiative inspired by O['’]s thinking",
        r"A strategic initiative of S was developed based on the thinking of",
    ),
    (r"Over time, S launched a project honoring the legacy of O", r"S launched a project to honor the legacy of"),
    # Species
    (r"After graduation, (S discovered a new behavior in) O", r"\1"),
    (r"S's work documenting O['’]s behavior", r"S documented the behavior of"),
)


def _compile(pattern: str) -> re.Pattern[str]:
    pattern = pattern.replace("POSS", f"(?:{_ANY_PRONOUN[1]})")
    return re.compile(re.sub(r"\bS\b", _SUBJECT, re.sub(r"\bO\b", _OBJECT, pattern)))


_RULES = tuple((_compile(sentence), re.sub(r"\bS\b", _SUBJECT, fact)) for sentence, fact in _REWRITINGS)


def make_fact(record: Mapping[str, Any], question: Mapping[str, Any]) -> dict[str, str]:
    """The atomic fact that a question of a text-only record asks about.

    Args:
        record: a CRE record of the declared shape (``cre.SHAPE``) with ``text``; ``entity_names`` and ``gender_type`` are used
            where it has them.
        question: one of its questions; its ``entity_name`` is the object of the fact. Where several sentences name it, ``fact_idx``
            is the number of the right one.

    Returns:
        ``prefix``, the fact before its object and with the subject's name in it, and ``target``, the object as written.

    Raises:
        DataError: no sentence names the object, several do and ``fact_idx`` is none of theirs, or the sentence gives no fact with
            the subject before the object; it quotes the sentence.
    """
    subject, text, entity = record["subject"], record["text"], question["entity_name"]
    names = [subject, entity, *(record.get("entity_names") or ())]
    sentence = _find_sentence(split_sentences(text, names), entity, names, question.get("fact_idx"))
    marked = _name_the_subject(_mark(sentence, subject, entity, names), record.get("gender_type") or "")
    prefix = _rewrite(marked) or _cut(marked)
    if prefix is None:
        raise DataError(
            f"no fact about {subject!r} can be made from the sentence {sentence!r}: nothing in it before {entity!r} stands for the "
            f"subject; word it as {subject + ' ... ' + entity!r}, or give the record 'facts' with prefix and target"
        )
    return {"prefix": prefix.replace(_SUBJECT, subject), "target": entity}


def split_sentences(text: str, names: Sequence[str]) -> list[str]:
    """The sentences of a text, none ending at a full stop inside one of ``names`` ("Ann B. Lee", "Lee Corp. was")."""
    inside = [match.span() for match in _any_of(names).finditer(text)]
    sentences, start = [], 0
    for end in _END_OF_SENTENCE.finditer(text):
        is_in_name = any(first <= end.start() < end.end() < last for first, last in inside)
        rest = text[end.end() :]
        begins = rest[:1].isupper() or rest[:1] in _QUOTES or any(rest.startswith(name) for name in names)
        if begins and not is_in_name:
            sentences.append(text[start : end.end()].strip())
            start = end.end()
    return [*sentences, text[start:].strip()]


def _any_of(names: Sequence[str]) -> re.Pattern[str]:
    """Whole names, of several at one place the longest: "bengal tiger" does not name the tiger."""
    longest_first = sorted(set(names), key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")


def _find_sentence(sentences: Sequence[str], entity: str, names: Sequence[str], index: int | None) -> str:
    pattern = _any_of(names)
    found = {i: sentence for i, sentence in enumerate(sentences) if entity in pattern.findall(sentence)}
    if not found:
        raise DataError(f"no sentence of 'text' names {entity!r}, which the question's fact is about; 'text' is {sentences!r}")
    if index in found:
        return found[index]
    if len(found) > 1:
        raise DataError(
            f"sentences {', '.join(map(str, found))} of 'text' name {entity!r}, so 'fact_idx' must be one of these, got {index!r}; "
            f"'text' is {sentences!r}"
        )
    return next(iter(found.values()))


def _mark(sentence: str, subject: str, entity: str, names: Sequence[str]) -> str:
    marks = {subject: _SUBJECT, entity: _OBJECT}
    return _any_of(names).sub(lambda match: marks.get(match.group(), match.group()), sentence)


def _name_the_subject(marked: str, gender: str) -> str:
    """The sentence with the subject in place of a pronoun, if it needs one before its object."""
    before, mark, after = marked.partition(_OBJECT)
    if _SUBJECT in before:
        return marked
    personal, possessive = _PRONOUNS.get(gender, _ANY_PRONOUN)
    # "her" inside a sentence may be an object; at the start it is possessive.
    for pattern, name in ((rf"\b(?:{personal})\b", _SUBJECT), (rf"^((?:{_ORDER_WORDS}), )?(?:{possessive})\b", rf"\1{_SUBJECT}'s")):
        named, count = re.subn(pattern, name, before, count=1, flags=re.IGNORECASE)
        if count:
            return named + mark + after
    return marked


def _rewrite(marked: str) -> str | None:
    for sentence, fact in _RULES:
        match = sentence.match(marked)
        if match:
            return match.expand(fact)
    return None


def _cut(marked: str) -> str | None:
    """The sentence before its object, if the subject is there."""
    before = marked.partition(_OBJECT)[0].rstrip()
    if _SUBJECT not in before:
        return None
    alone = _ADVERB.sub(r"\1 ", _OPENING.sub("", before))
    return alone[:1].upper() + alone[1:]
