"""Where the first sentence of a generated text ends."""

from __future__ import annotations

import regex

# A line's end, a full stop of Chinese or Japanese, or a Western one with a space after it; the last are kept when they belong to an
# abbreviation or an initial ("St. Paul", "J. K. Rowling", "the U.S. dollar").
_END = regex.compile(r"\n|[。！？]|(?P<dot>[.!?][\"'”’)\]]*)(?=\s)")
_TITLES = r"dr|mr|mrs|ms|st|jr|sr|prof|gen|gov|sen|rep|no|vs|mt|ft|co|inc|ltd|approx|e\.g|i\.e"
_ABBREVIATED = regex.compile(rf"\b(?:{_TITLES}|\p{{L}})\.$", regex.I)


def find_sentence_end(text: str) -> int | None:
    """How many characters the first sentence of ``text`` has, its mark included; None where it is not seen to end.

    Leading white space belongs to the sentence.
    """
    start = len(text) - len(text.lstrip())
    for found in _END.finditer(text, start):
        end: int = found.start() if found[0] == "\n" else found.end()
        if found["dot"] is None or not _ABBREVIATED.search(text[start : found.start() + 1]):
            return end
    return None


def first_sentence(text: str) -> str:
    """The first sentence of a text, or all of it where none is seen to end."""
    return text[: find_sentence_end(text)]
