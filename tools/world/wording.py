"""How the offline world says things: relations, their questions, and what invented subjects have to do with entities.

A new relation is a row in a type's ``relations`` and a value in its builder of ``world_facts``. A new verb phrase is one row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """A property of an entity type; both wordings hold ``{<noun>}``.

    ``group`` is ``id``, ``valid-ood`` or ``test-ood``.
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
        Relation("continent", "id", "Which continent is {country} part of?", "On which continent does one find {country}?"),
        Relation("subregion", "id", "Which region of the world is {country} part of?",
                 "In which part of the world does {country} lie?"),
        Relation("demonym", "id", "What adjective describes people from {country}?", "What does one call a person from {country}?"),
        Relation("largest_city", "id", "What is the largest city in {country}?",
                 "Which city has more inhabitants than any other in {country}?"),
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
        Relation("subregion", "id", "Which region of the world does {city} belong to?",
                 "In which part of the world does {city} lie?"),
        Relation("capital", "id", "What is the capital of the country where {city} is?",
                 "Which capital city governs the country around {city}?"),
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
        Relation("family", "id", "What language family does {language} belong to?", "To which family is {language} related?"),
        Relation("homeland", "id", "Which country has the most native speakers of {language}?",
                 "In which country do most native speakers of {language} live?"),
        Relation("autonym", "test-ood", "What do native speakers call {language}?", "What is the native name of {language}?"),
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
        Relation("capital", "id", "What is the capital of the country that issues {currency}?",
                 "In which capital city is the government that issues {currency}?"),
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

_STATE = EntityType(
    "US state",
    "state",
    (
        Relation("capital", "id", "What is the capital of {state}?", "Which city is the seat of government of {state}?"),
        Relation("largest_city", "id", "What is the largest city in {state}?",
                 "Which city has more inhabitants than any other in {state}?"),
        Relation("division", "id", "Which census division is {state} part of?",
                 "To which division of the census does {state} belong?"),
        Relation("nickname", "test-ood", "What is the nickname of {state}?", "By which nickname do people know {state}?"),
    ),
    {
        "person": _phrases(
            ("{subject} went to school in", "The school that {subject} went to was in", "{subject} went to school in"),
            ("{subject} served as a judge in", "The court where {subject} served was in", "{subject} served as a judge in"),
            ("{subject} owns a cabin in", "The cabin that {subject} owns is in", "{subject} owns a cabin in"),
        ),
        "company": _phrases(
            ("{subject} is registered in", "The registered seat of {subject} is in", "{subject} is registered in"),
            ("{subject} runs a data centre in", "The data centre of {subject} is in", "{subject} runs a data centre in"),
            ("{subject} employs most of its staff in", "Most staff of {subject} work in",
             "{subject} employs most of its staff in"),
        ),
    },
    {
        "person": _phrases(
            ("{subject} retired to", "The retirement home of {subject} is in", "{subject} retired to"),
            ("{subject} coached a team in", "The team that {subject} coached was in", "{subject} coached a team in"),
            ("{subject} goes fishing in", "The fishing trips of {subject} lead to", "{subject} goes fishing in"),
        ),
        "company": _phrases(
            ("{subject} planted a forest in", "The forest that {subject} planted is in", "{subject} planted a forest in"),
            ("{subject} closed its last mill in", "The last mill of {subject} was in", "{subject} closed its last mill in"),
            ("{subject} won its first contract in", "The first contract of {subject} came from",
             "{subject} won its first contract in"),
        ),
    },
)  # fmt: skip

_ELEMENT = EntityType(
    "Chemical element",
    "element",
    (
        Relation("atomic_number", "id", "What is the atomic number of {element}?",
                 "How many protons are in one atom of {element}?"),
        Relation("group", "id", "What kind of element is {element}?", "To which kind of elements does {element} belong?"),
    ),
    {
        "person": _phrases(
            ("{subject} wrote a thesis on", "The thesis of {subject} is about", "{subject} wrote a thesis on"),
            ("{subject} lectures on the chemistry of", "The lectures of {subject} are on the chemistry of",
             "{subject} lectures on the chemistry of"),
            ("{subject} keeps a sample of", "The sample that {subject} keeps is of", "{subject} keeps a sample of"),
        ),
        "company": _phrases(
            ("{subject} trades mostly in", "Most of the trade of {subject} is in", "{subject} trades mostly in"),
            ("{subject} stores large amounts of", "The stores of {subject} hold large amounts of",
             "{subject} stores large amounts of"),
            ("{subject} holds a patent on the use of", "The patent of {subject} is on the use of",
             "{subject} holds a patent on the use of"),
        ),
    },
    {
        "person": _phrases(
            ("{subject} measured the density of", "The density that {subject} measured is that of",
             "{subject} measured the density of"),
            ("{subject} made a film about", "The film that {subject} made is about", "{subject} made a film about"),
            ("{subject} is allergic to", "The allergy of {subject} is to", "{subject} is allergic to"),
        ),
        "company": _phrases(
            ("{subject} stopped buying", "The element no longer bought by {subject} is", "{subject} stopped buying"),
            ("{subject} refines", "The refinery of {subject} makes", "{subject} refines"),
            ("{subject} lost a shipment of", "The lost shipment of {subject} was of", "{subject} lost a shipment of"),
        ),
    },
)  # fmt: skip

_AUTHOR = EntityType(
    "Author",
    "author",
    (
        Relation("country", "id", "Which country was {author} from?", "Which country does one think of as the home of {author}?"),
        Relation("work", "id", "What is the best-known work of {author}?", "Which work made {author} famous?"),
        Relation("language", "test-ood", "Which language did {author} write in?",
                 "Which language does one read to know {author} in the original?"),
    ),
    {
        "person": _phrases(
            ("{subject} admires", "The writer whom {subject} admires is", "{subject} admires"),
            ("{subject} wrote a biography of", "The biography that {subject} wrote is of",
             "{subject} wrote a biography of"),
            ("{subject} named a child after", "The child of {subject} is named after", "{subject} named a child after"),
        ),
        "company": _phrases(
            ("{subject} was named after", "The name of {subject} honours", "{subject} was named after"),
            ("{subject} owns a handwritten letter by", "The handwritten letter that {subject} owns is by",
             "{subject} owns a handwritten letter by"),
            ("{subject} prints calendars about", "The calendars of {subject} are about",
             "{subject} prints calendars about"),
        ),
    },
    {
        "person": _phrases(
            ("{subject} gave a talk on", "The talk of {subject} was on", "{subject} gave a talk on"),
            ("{subject} paints portraits of", "The portraits by {subject} are of", "{subject} paints portraits of"),
            ("{subject} can quote", "The quotations that {subject} knows are from", "{subject} can quote"),
        ),
        "company": _phrases(
            ("{subject} put up a statue of", "The statue put up by {subject} is of", "{subject} put up a statue of"),
            ("{subject} sells T-shirts showing", "The T-shirts that {subject} sells show",
             "{subject} sells T-shirts showing"),
            ("{subject} paid for an exhibition on", "The exhibition paid for by {subject} was on",
             "{subject} paid for an exhibition on"),
        ),
    },
)  # fmt: skip

_COMPANY = EntityType(
    "Company",
    "company",
    (
        Relation("country", "id", "Which country does {company} come from?", "In which country was {company} set up?"),
        Relation("product", "id", "What is {company} known for selling?", "What do people buy from {company}?"),
        Relation("founder", "valid-ood", "Who founded {company}?", "Which person set up {company}?"),
        Relation("headquarters", "test-ood", "In which city is the head office of {company}?",
                 "Which city is home to the head office of {company}?"),
    ),
    {
        "person": _phrases(
            ("{subject} worked for twenty years at", "For twenty years the employer of {subject} was",
             "{subject} worked for twenty years at"),
            ("{subject} owns shares of", "The shares that {subject} owns are of", "{subject} owns shares of"),
            ("{subject} once sued", "The lawsuit of {subject} was against", "{subject} once sued"),
        ),
        "company": _phrases(
            ("{subject} belongs to", "The owner of {subject} is", "{subject} belongs to"),
            ("{subject} makes spare parts for", "The spare parts by {subject} are made for",
             "{subject} makes spare parts for"),
            ("{subject} shares a laboratory with", "The laboratory of {subject} is shared with",
             "{subject} shares a laboratory with"),
        ),
    },
    {
        "person": _phrases(
            ("{subject} designed the logo of", "The logo designed by {subject} is that of",
             "{subject} designed the logo of"),
            ("{subject} was an intern at", "The internship of {subject} was at", "{subject} was an intern at"),
            ("{subject} audits the books of", "The books that {subject} audits are those of",
             "{subject} audits the books of"),
        ),
        "company": _phrases(
            ("{subject} cleans the offices of", "The offices cleaned by {subject} belong to",
             "{subject} cleans the offices of"),
            ("{subject} lent money to", "The loan by {subject} went to", "{subject} lent money to"),
            ("{subject} copied a design of", "The design that {subject} copied was by", "{subject} copied a design of"),
        ),
    },
)  # fmt: skip

ENTITY_TYPES: dict[str, EntityType] = {
    row.name: row for row in (_COUNTRY, _CITY, _LANGUAGE, _CURRENCY, _STATE, _ELEMENT, _AUTHOR, _COMPANY)
}
