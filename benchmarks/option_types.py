"""Types of options that several benchmarks have; what is refused is said by the parser."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence


def whole_number(text: str, least: int = 1) -> int:
    """An option's value for the parser, which says what it must be if it is something else."""
    if not re.fullmatch(r"\s*\d+\s*", text) or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of {least} or more, got {text!r}")
    return int(text)


def whole_numbers(text: str, least: int = 1) -> list[int]:
    """The same of numbers separated by commas."""
    return [whole_number(number, least) for number in text.split(",")]


def names_among(known: Sequence[str], text: str) -> list[str]:
    """An option's names, separated by commas, for the parser, which says what they must be if one is something else."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(known)}, got {unknown[0]!r}")
    return names
