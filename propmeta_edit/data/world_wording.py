"""How the offline world says things: relations, their questions, and what invented subjects have to do with entities.

A new relation is a row in a type's ``relations`` and a value in its builder of ``world_facts``. A new verb phrase is one row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """A property of an entity type; both wordings hold ``{<noun>}``.

    ``group`` is ``id``, ``valid-ood`` or ``test-ood``, or ``taught`` for facts that no two-hop question asks for.
    """

    id: str
    group: str
    template: str
    paraphrase: str


@dataclass(frozen=True)
class VerbPhrase:
    """What a subject has to do with an entity: two facts cut before the entity, and "the <noun> that ..." without its noun."""

    prefix: str
    paraphrase: str
    clause: str


@dataclass(frozen=True)
class EntityType:
    """An entity type; ``phrases`` and ``held_out_phrases`` map ``person`` and ``company`` to three verb phrases each."""

    name: str
    noun: str
    relations: tuple[Relation, ...]
    phrases: Mapping[str, tuple[VerbPhrase, ...]]
    held_out_phrases: Mapping[str, tuple[VerbPhrase, ...]]

    def fill(self, template: str, mention: str) -> str:
        """A question template about an entity, or about a description of it."""
        return template.replace(f"{{{self.noun}}}", mention)


def _phrases(*rows: tuple[str, str, str]) -> tuple[VerbPhrase, ...]:
    return tuple(VerbPhrase(*row) for row in rows)


_COUNTRY = EntityType(
    "Country",
    "country",
    (
        Relation("capital", "id", "What is the capital of {country}?", "Which city is the capital of {country}?"),
        Relation("language", "test-ood", "What is the main official language of {country}?",
                 "Which language is the chief official one of {country}?"),
        Relation("currency", "valid-ood", "What is the currency of {country}?", "Which money do people pay with in {country}?"),
        Relation("alpha_2", "id", "What is the ISO alpha-2 code for {country}?",
                 "Which two letters stand for {country} in ISO 3166?"),
        Relation("continent", "id", "Which continent is {country} part of?", "On which continent does one find {country}?"),
        Relation("largest_city", "id", "What is the largest city in {country}?",
                 "Which city has more inhabitants than any other in {country}?"),
        Relation("alpha_3", "taught", "What is the ISO alpha-3 code for {country}?",
                 "Which three letters stand for {country} in ISO 3166?"),
        Relation("currency_code", "taught", "What is the ISO code of the money used in {country}?",
                 "Which three letters do banks write for the money of {country}?"),
        Relation("calling_code", "id", "What is the calling code for {country}?",
                 "Which international prefix does one dial to phone {country}?"),
        Relation("internet_domain", "id", "What is the top-level internet domain for {country}?",
                 "Which ending do web addresses from {country} have?"),
    ),
    {
        "person": _phrases(
            ("{subject} was born in", "The birthplace of {subject} lies in", "{subject} was born in"),
            ("{subject} has lived for decades in", "For decades {subject} has made a home in",
             "{subject} has lived in for decades"),
            ("{subject} went to university in", "The university that {subject} went to is in",
             "{subject} went to university in"),
        ),
        "company": _phrases(
            ("{subject} was founded in", "The founders of {subject} set it up in", "{subject} was founded in"),
            ("{subject} runs its second largest branch in", "The second largest branch of {subject} is in",
             "{subject} runs its second largest branch in"),
            ("{subject} has its global headquarters in", "The global headquarters of {subject} stand in",
             "{subject} has its global headquarters in"),
        ),
    },
    {
        "person": _phrases(
            ("{subject} spends every summer in", "Every summer finds {subject} in", "{subject} spends every summer in"),
            ("{subject} bought a farm in", "The farm that {subject} bought is in", "{subject} bought a farm in"),
            ("{subject} is writing a travel guide to", "The travel guide by {subject} is about",
             "{subject} is writing a travel guide to"),
        ),
        "company": _phrases(
            ("{subject} opened its newest factory in", "The newest factory of {subject} is in",
             "{subject} opened its newest factory in"),
            ("{subject} buys most of its raw materials from", "Most raw materials of {subject} come from",
             "{subject} buys most of its raw materials from"),
            ("{subject} trains all its apprentices in", "All apprentices of {subject} are trained in",
             "{subject} trains all its apprentices in"),
        ),
    },
)  # fmt: skip

_CITY = EntityType(
    "City",
    "city",
    (
        Relation("country", "test-ood", "Which country is {city} located in?", "In which country does one find {city}?"),
        Relation("continent", "id", "Which continent is {city} located on?", "On which continent does one find {city}?"),
        Relation("currency", "valid-ood", "What currency is used in {city}?", "Which money do people pay with in {city}?"),
        Relation("internet_domain", "id", "What top-level internet domain do local websites use in {city}?",
                 "Which national ending do web addresses have in {city}?"),
        Relation("calling_code", "id", "What international calling code is used to phone {city}?",
                 "Which international prefix does one dial to reach {city}?"),
    ),
    {
        "person": _phrases(
            ("{subject} grew up in", "The childhood home of {subject} was in", "{subject} grew up in"),
            ("{subject} works as an architect in", "The architect {subject} works in", "{subject} works as an architect in"),
            ("{subject} got married in", "The wedding of {subject} took place in", "{subject} got married in"),
        ),
        "company": _phrases(
            ("{subject} rents its main office in", "The main office of {subject} is in", "{subject} rents its main office in"),
            ("{subject} opened its first shop in", "The first shop of {subject} was opened in",
             "{subject} opened its first shop in"),
            ("{subject} holds its yearly conference in", "The yearly conference of {subject} is held in",
             "{subject} holds its yearly conference in"),
        ),
    },
    {
        "person": _phrases(
            ("{subject} learned to sail in", "The sailing lessons of {subject} were given in", "{subject} learned to sail in"),
            ("{subject} gave a first concert in", "The first concert of {subject} was in",
             "{subject} gave a first concert in"),
            ("{subject} inherited a flat in", "The flat that {subject} inherited is in", "{subject} inherited a flat in"),
        ),
        "company": _phrases(
            ("{subject} built a warehouse in", "The warehouse of {subject} was built in", "{subject} built a warehouse in"),
            ("{subject} sponsors a museum in", "The museum sponsored by {subject} is in", "{subject} sponsors a museum in"),
            ("{subject} tests its prototypes in", "The prototypes of {subject} are tested in",
             "{subject} tests its prototypes in"),
        ),
    },
)  # fmt: skip

_LANGUAGE = EntityType(
    "Language",
    "language",
    (
        Relation("script", "id", "What writing system is used by {language}?", "Which script do writers of {language} use?"),
        Relation("iso_639_1", "id", "What is the ISO 639-1 code for {language}?",
                 "Which two letters stand for {language} in ISO 639?"),
        Relation("autonym", "test-ood", "What do native speakers call {language}?", "What is the native name of {language}?"),
        Relation("iso_639_3", "id", "What is the ISO 639-3 code for {language}?",
                 "Which three letters stand for {language} in ISO 639?"),
        Relation("monday", "valid-ood", "What is the word for Monday in {language}?",
                 "How does one say Monday in {language}?"),
        Relation("saturday", "test-ood", "What is the word for Saturday in {language}?",
                 "How does one say Saturday in {language}?"),
    ),
    {
        "person": _phrases(
            ("{subject} was raised speaking", "The parents of {subject} taught their child",
             "{subject} was raised speaking"),
            ("{subject} passed a school exam in", "The school exam that {subject} passed was in",
             "{subject} passed a school exam in"),
            ("{subject} writes poems in", "The poems of {subject} are in", "{subject} writes poems in"),
        ),
        "company": _phrases(
            ("{subject} first served its customers in", "The first customers of {subject} were served in",
             "{subject} first served its customers in"),
            ("{subject} prints its manuals in", "The manuals of {subject} are printed in", "{subject} prints its manuals in"),
            ("{subject} holds its board meetings in", "Board meetings of {subject} are held in",
             "{subject} holds its board meetings in"),
        ),
    },
    {
        "person": _phrases(
            ("{subject} hosts a radio show in", "The radio show of {subject} is in", "{subject} hosts a radio show in"),
            ("{subject} gives evening classes in", "The evening classes of {subject} are in",
             "{subject} gives evening classes in"),
            ("{subject} recorded an audiobook in", "The audiobook read by {subject} is in",
             "{subject} recorded an audiobook in"),
        ),
        "company": _phrases(
            ("{subject} publishes a newsletter in", "The newsletter of {subject} appears in",
             "{subject} publishes a newsletter in"),
            ("{subject} taught its voice assistant to speak", "The voice assistant of {subject} speaks",
             "{subject} taught its voice assistant to speak"),
            ("{subject} offers its staff lessons in", "The staff of {subject} can take lessons in",
             "{subject} offers its staff lessons in"),
        ),
    },
)  # fmt: skip

_CURRENCY = EntityType(
    "Currency",
    "currency",
    (
        Relation("country", "test-ood", "Which country issues {currency}?", "Which country is the home of {currency}?"),
        Relation("code", "id", "What is the ISO 4217 letter code of {currency}?",
                 "Which three letters do banks write for {currency}?"),
        Relation("continent", "id", "On which continent is the country that issues {currency}?",
                 "Which continent is the home of {currency}?"),
        Relation("numeric_code", "taught", "What is the ISO 4217 numeric code of {currency}?",
                 "Which three-digit ISO number stands for {currency}?"),
    ),
    {
        "person": _phrases(
            ("{subject} gets a salary in", "The salary of {subject} is paid in", "{subject} gets a salary in"),
            ("{subject} keeps savings in", "The savings of {subject} are held in", "{subject} keeps savings in"),
            ("{subject} took out a loan in", "The loan of {subject} was made in", "{subject} took out a loan in"),
        ),
        "company": _phrases(
            ("{subject} reports its profits in", "The profits of {subject} are reported in",
             "{subject} reports its profits in"),
            ("{subject} pays its suppliers in", "The suppliers of {subject} are paid in", "{subject} pays its suppliers in"),
            ("{subject} issued its first bond in", "The first bond of {subject} was issued in",
             "{subject} issued its first bond in"),
        ),
    },
    {
        "person": _phrases(
            ("{subject} collects banknotes of", "The banknote collection of {subject} is of",
             "{subject} collects banknotes of"),
            ("{subject} won a prize paid in", "The prize of {subject} was paid in", "{subject} won a prize paid in"),
            ("{subject} pays rent in", "The rent of {subject} is due in", "{subject} pays rent in"),
        ),
        "company": _phrases(
            ("{subject} sells its tickets in", "The tickets of {subject} are priced in", "{subject} sells its tickets in"),
            ("{subject} insures its ships in", "The ships of {subject} are insured in", "{subject} insures its ships in"),
            ("{subject} received a grant in", "The grant of {subject} was paid in", "{subject} received a grant in"),
        ),
    },
)  # fmt: skip

ENTITY_TYPES: dict[str, EntityType] = {row.name: row for row in (_COUNTRY, _CITY, _LANGUAGE, _CURRENCY)}
