"""When a generated text counts as correct (CaKE's rule, for every script)."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

import regex

# Scripts that do not put spaces between words: a name may begin or end anywhere in a line.
# By their extensions: the long vowel mark of Japanese and its sound marks are of no one script.
_UNSPACED = "".join(rf"\p{{scx={name}}}" for name in ["Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan"])
_IN_A_WORD = rf"[[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}]]"
_GOES_ON = rf"[[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}\p{{Hangul}}]]"  # Korean sets its particles right after a name
_SETS = "(?V1)"  # sets of characters can be taken from one another


def normalise(text: str) -> str:
    """One form of a text for comparing: compatibility characters as their plain ones, composed, case folded (NFKC_Casefold).

    Invisible characters without meaning of their own (soft hyphens, joiners, variation selectors) are left out, as that form
    says.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    folded = unicodedata.normalize("NFKC", folded).casefold()  # folding can bring up what the other rule changes, and back
    return unicodedata.normalize("NFC", regex.sub(r"\p{Default_Ignorable_Code_Point}", "", folded))


def contains_answer(generated: str, answers: Iterable[str]) -> bool:
    """CaKE's rule: any accepted answer is a substring of the new text, both in one form of case and Unicode.

    Short answers can match inside words ("en" in "french"); ``contains_answer_at_word_boundary`` is reported beside it.
    """
    text = normalise(generated)
    return any(answer in text for answer in _normalised(answers))


def contains_answer_at_word_boundary(generated: str, answers: Iterable[str]) -> bool:
    """The same, but a match may not begin or end inside a longer word.

    Only an edge of the answer that is itself a letter or digit can be inside a word, so ".es" and "+33" need a boundary only
    after them; scripts that set no spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan) need none,
    and Korean needs one before the answer alone.
    """
    text = normalise(generated)
    return any(regex.search(_bounded(answer), text) is not None for answer in _normalised(answers))


def _normalised(answers: Iterable[str]) -> list[str]:
    """Without the spaces around them, which no training sets; those of which anything is left: what every text contains is none."""
    return [answer for answer in (normalise(answer).strip() for answer in answers) if answer]


def _bounded(answer: str) -> str:
    before = rf"(?<!{_IN_A_WORD})" if regex.match(_SETS + _IN_A_WORD, answer) else ""
    after = rf"(?!{_GOES_ON})" if regex.match(_SETS + _IN_A_WORD, answer[-1:]) else ""
    return f"{_SETS}{before}{regex.escape(answer, special_only=True)}{after}"
