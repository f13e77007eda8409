"""What a record of a data file must be, declared once: the shapes of its fields. Anything else is an error that names the field.

A loader declares ``Object({"prompt": TEXT}, optional={"aliases": ListOf(TEXT, least=0)})`` and reads with ``reading.read_records``;
what it is given then has these types. In an optional field null is the same as no field; other fields are ignored, and
``find_ignored`` lists them.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite, isnan
from typing import Any

from propmeta_edit.errors import DataError
from propmeta_edit.records import find_lone_surrogate


class Shape(ABC):
    """What a value may be."""

    @property
    @abstractmethod
    def what(self) -> str:
        """In words."""

    @property
    @abstractmethod
    def types(self) -> tuple[type, ...]:
        """Of the values of JSON that can be it."""

    def check_inside(self, value: Any, where: str) -> None:
        """Refuse a value of these types that is still not of this shape, its parts left out.

        Raises:
            DataError: naming the field.
        """
        return

    def parts_of(self, value: Any) -> Iterator[tuple[str, Any, Shape | None]]:
        """(where in it, value, shape) of what a value of this shape holds; None for the shape of what is ignored."""
        return iter(())


def check(shape: Shape, value: Any, where: str = "") -> None:
    """Hold a value against a shape.

    Raises:
        DataError: naming the field ``where`` it stands, what it must be and what it is.
    """
    if not isinstance(value, shape.types) or (isinstance(value, bool) and bool not in shape.types):
        raise DataError(f"{_name(where)} must be {shape.what}, got {show(value)}")
    shape.check_inside(value, where)
    for part, inner, inner_shape in shape.parts_of(value):
        if inner_shape is not None:
            check(inner_shape, inner, (where + part).removeprefix("."))


def find_ignored(shape: Shape, value: Any, where: str = "") -> set[str]:
    """The fields of a value of this shape that nothing reads, places in lists left out (``questions[].note``)."""
    found: set[str] = set()
    for part, inner, inner_shape in shape.parts_of(value):
        name = (where + ("[]" if part.startswith("[") else part)).removeprefix(".")
        found |= {name} if inner_shape is None else find_ignored(inner_shape, inner, name)
    return found


def show(value: Any) -> str:
    """A value as JSON has it, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _name(where: str) -> str:
    return repr(where) if where else "a record"


@dataclass(frozen=True)
class Text(Shape):
    """A string without halves of characters; not blank, unless it may be."""

    may_be_blank: bool = False

    @property
    def what(self) -> str:
        return "a string"

    @property
    def types(self) -> tuple[type, ...]:
        return (str,)

    def check_inside(self, value: str, where: str) -> None:
        if not self.may_be_blank and not value.strip():
            raise DataError(f"{_name(where)} must not be empty, got {value!r}")
        half = find_lone_surrogate(value)
        if half is not None:
            raise DataError(f"{_name(where)} holds {half}, half of a character, which is no text: {show(value)}")


@dataclass(frozen=True)
class Number(Shape):
    """A number; NaN only where that stands for something missing."""

    may_be_nan: bool = False
    is_whole: bool = False

    @property
    def what(self) -> str:
        return "a whole number" if self.is_whole else "a number"

    @property
    def types(self) -> tuple[type, ...]:
        return (int,) if self.is_whole else (int, float)

    def check_inside(self, value: float, where: str) -> None:
        if isinstance(value, float) and not (isfinite(value) or (self.may_be_nan and isnan(value))):
            raise DataError(f"{_name(where)} must be {self.what}, got {show(value)}")


@dataclass(frozen=True)
class ListOf(Shape):
    """A list of values of one shape, ``least`` of them or more."""

    item: Shape
    least: int = 1

    @property
    def what(self) -> str:
        return "a list"

    @property
    def types(self) -> tuple[type, ...]:
        return (list,)

    def check_inside(self, value: list[Any], where: str) -> None:
        if len(value) < self.least:
            wanted = "must not be an empty list" if self.least == 1 else f"must have {self.least} items or more, got {len(value)}"
            raise DataError(f"{_name(where)} {wanted}")

    def parts_of(self, value: Any) -> Iterator[tuple[str, Any, Shape | None]]:
        return ((f"[{number}]", inner, self.item) for number, inner in enumerate(value))


@dataclass(frozen=True)
class Object(Shape):
    """A JSON object with these fields; ``others`` is the shape of all further ones, None if they are ignored."""

    required: Mapping[str, Shape] = field(default_factory=dict)
    optional: Mapping[str, Shape] = field(default_factory=dict)
    others: Shape | None = None

    @property
    def what(self) -> str:
        return "a JSON object"

    @property
    def types(self) -> tuple[type, ...]:
        return (dict,)

    def check_inside(self, value: Mapping[str, Any], where: str) -> None:
        for name in self.required:
            if name not in value:
                place = f" in {where!r}" if where else ""
                raise DataError(f"missing key {name!r}{place}; found {', '.join(sorted(map(show_key, value))) or 'no keys'}")

    def parts_of(self, value: Any) -> Iterator[tuple[str, Any, Shape | None]]:
        for name, inner in value.items():
            if name in self.required:
                yield f".{name}", inner, self.required[name]
            elif name not in self.optional:
                yield f".{show_key(name)}", inner, self.others
            elif inner is not None:
                yield f".{name}", inner, self.optional[name]


def show_key(key: str) -> str:
    """A field's name as it can be printed."""
    return key.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass(frozen=True)
class OneOf(Shape):
    """A value of any of several shapes, told apart by their types; with ``or_null``, or null."""

    shapes: tuple[Shape, ...]
    or_null: bool = False

    @property
    def what(self) -> str:
        return " or ".join(shape.what for shape in self.shapes) + (" or null" if self.or_null else "")

    @property
    def types(self) -> tuple[type, ...]:
        return tuple(kind for shape in self.shapes for kind in shape.types) + ((type(None),) if self.or_null else ())

    def parts_of(self, value: Any) -> Iterator[tuple[str, Any, Shape | None]]:
        return ((("", value, shape)) for shape in self.shapes if isinstance(value, shape.types))


@dataclass(frozen=True)
class Nested(Shape):
    """A value of a shape, or a list of such, or lists within lists, any of them empty."""

    item: Shape

    @property
    def what(self) -> str:
        return f"{self.item.what} or a list of such"

    @property
    def types(self) -> tuple[type, ...]:
        return (*self.item.types, list)

    def parts_of(self, value: Any) -> Iterator[tuple[str, Any, Shape | None]]:
        if isinstance(value, list):
            return ((f"[{number}]", inner, self) for number, inner in enumerate(value))
        return iter((("", value, self.item),))


@dataclass(frozen=True)
class Anything(Shape):
    """Whatever the file has; it is known, and not looked into."""

    @property
    def what(self) -> str:
        return "anything"

    @property
    def types(self) -> tuple[type, ...]:
        return (object, bool)


TEXT, BLANK, WHOLE = Text(), Text(may_be_blank=True), Number(is_whole=True)
ID = OneOf((TEXT, WHOLE))  # a record's name
ANSWER = OneOf((TEXT, Number()))  # years may be numbers
ALIASES = ListOf(OneOf((BLANK, Number())), least=0)
ANSWER_OR_NONE = OneOf((TEXT, Number(may_be_nan=True)), or_null=True)
