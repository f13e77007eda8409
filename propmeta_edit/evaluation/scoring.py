"""When a generated text counts as correct (as in CaKE's code)."""

from __future__ import annotations

import re
from collections.abc import Iterable


def contains_answer(generated: str, answers: Iterable[str]) -> bool:
    """CaKE's rule: any accepted answer is a substring of the new text, both lower-cased.

    Short answers can match inside words ("en" in "french"); ``contains_answer_at_word_boundary`` is reported beside it.
    """
    text = generated.lower()
    return any(answer.lower() in text for answer in answers)


def contains_answer_at_word_boundary(generated: str, answers: Iterable[str]) -> bool:
    """The same, but a match may not begin or end inside a longer word.

    Only an edge of the answer that is itself a letter or digit can be inside a word, so ".es" and "+33" need a boundary only
    after them.
    """
    text = generated.lower()
    return any(re.search(_bounded(answer.lower()), text) is not None for answer in answers)


def _bounded(answer: str) -> str:
    before = r"(?<![^\W_])" if answer[:1].isalnum() else ""
    after = r"(?![^\W_])" if answer[-1:].isalnum() else ""
    return before + re.escape(answer) + after
