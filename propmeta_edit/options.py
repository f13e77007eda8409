"""Lists as options that a command line and a YAML file share: written with commas, or as YAML has them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse.typing import register_type

from propmeta_edit.errors import ConfigError


class Names(list[str]):
    """Texts: ``a,b`` or ``[a, b]``; the second for texts that hold commas."""


class Files(Names):
    """The same of files, models, and ``NAME=`` before them: a comma in a path that exists parts nothing."""


class WholeNumbers(list[int]):
    """Whole numbers: ``2,5,8`` or ``[2, 5, 8]``."""


class Numbers(list[float]):
    """Numbers: ``0.1,0.25`` or ``[0.1, 0.25]``."""


def _split(value: Any, may_be_blank: bool, join: Callable[[list[str]], list[str]] = list) -> list[Any]:
    items = join(value.split(",")) if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else [value]
    stripped = [item.strip() if isinstance(item, str) else item for item in items]
    return [item for item in stripped if item != ""] if may_be_blank or not any(item != "" for item in stripped) else stripped


def _join_paths(pieces: list[str]) -> list[str]:
    """What stood between commas, those together that name what exists; the longest such name counts."""
    items, start = [], 0
    while start < len(pieces):
        ends = range(len(pieces), start, -1)
        end = next((end for end in ends if _exists(",".join(pieces[start:end]).strip())), start + 1)
        items.append(",".join(pieces[start:end]))
        start = end
    return items


def _exists(item: str) -> bool:
    name, _, file = item.partition("=")
    return os.path.exists(item) or ("," not in name and os.path.exists(file.strip()))


def _number(convert: Callable[[Any], Any], what: str) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        try:
            number = convert(value)
        except (TypeError, ValueError):
            number = None
        if number is None or isinstance(value, bool) or (convert is int and number != float(value)):
            raise ValueError(f"{what} are wanted, separated by commas, got {value!r}")
        return number

    return read


def _text(value: Any) -> str:
    if isinstance(value, dict | list):
        raise ValueError(f"texts are wanted, separated by commas, got {value!r}")
    return str(value)


def _list_of(
    kind: type[list[Any]],
    read: Callable[[Any], Any],
    may_be_blank: bool = False,
    join: Callable[[list[str]], list[str]] = list,
) -> None:
    def parse(value: Any) -> Any:
        items = kind(dict.fromkeys(read(item) for item in _split(value, may_be_blank, join)))  # each once
        if not items:
            raise ValueError(f"at least one value is wanted, got {value!r}")
        return items

    register_type(kind, serializer=list, deserializer=parse)


_list_of(Names, _text, may_be_blank=True)  # a comma too many does no harm among names
_list_of(Files, _text, may_be_blank=True, join=_join_paths)
_list_of(WholeNumbers, _number(int, "whole numbers"))
_list_of(Numbers, _number(float, "numbers"))


def read_pairs(option: str, items: Sequence[str]) -> dict[str, str]:
    """``["a=x", "b=y"]`` → ``{"a": "x", "b": "y"}``.

    Raises:
        ConfigError: an item without a name, a value, or the sign between them.
    """
    pairs = [item.partition("=") for item in items]
    if not all(name.strip() and value.strip() for name, _, value in pairs):
        raise ConfigError(f"--{option} takes NAME=VALUE, separated by commas, got {','.join(items)!r}")
    return {name.strip(): value.strip() for name, _, value in pairs}


def read_counts(option: str, items: Sequence[str]) -> dict[str, int]:
    """The same with whole numbers of 1 or more.

    Raises:
        ConfigError: as ``read_pairs``, or another number.
    """
    pairs = read_pairs(option, items)
    if not all(value.isdigit() and int(value) for value in pairs.values()):
        raise ConfigError(f"--{option} takes NAME=NUMBER of 1 or more, separated by commas, got {','.join(items)!r}")
    return {name: int(value) for name, value in pairs.items()}


def require_among(option: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Refuse a name that is not known, and a list without any.

    Raises:
        ConfigError: naming the option, the name, and the known ones.
    """
    unknown = [name for name in given if name not in known]
    if unknown or not given:
        raise ConfigError(f"--{option} takes {', '.join(known)}, got {', '.join(unknown) or 'none'}")


def require_at_least(least: float, **options: float | None) -> None:
    """Refuse a number that nothing can be done with; None, for one that was not given, is fine.

    Raises:
        ConfigError: naming the option and the number.
    """
    for name, value in options.items():
        if value is not None and not value >= least:
            raise ConfigError(f"--{name.replace('_', '-')} must be {least:g} or more, got {value}")


def require_positive(**options: float | None) -> None:
    """The same for what must be more than nothing.

    Raises:
        ConfigError: naming the option and the number.
    """
    for name, value in options.items():
        if value is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be more than 0, got {value}")
