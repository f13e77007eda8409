"""What a record of a data file must be, declared once: the shapes of its fields. Anything else is an error that names the field.

A loader declares ``object_of({"prompt": TEXT}, optional={"aliases": list_of(TEXT, least=0)})`` and reads with
``reading.read_records``; what it is given then has these types. In an optional field null is the same as no field; other fields are
ignored, and ``find_ignored`` lists them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite, isnan
from typing import Any

from propmeta_edit.errors import DataError
from propmeta_edit.records import find_lone_surrogate

A_RECORD = "a record"  # how errors call the whole of it
Parts = Iterable[tuple[str, Any, "Shape | None"]]


@dataclass(frozen=True)
class Shape:
    """What a value may be.

    Args:
        what: in words.
        types: of the values of JSON that can be it; of these bool is no int.
        fault: what is wrong with a value of these types, given how errors call it; None if nothing is.
        parts: (where in it, value, shape) of what the value holds; None for the shape of what is ignored.
    """

    what: str
    types: tuple[type, ...]
    fault: Callable[[Any, str], str | None] = lambda value, name: None
    parts: Callable[[Any], Parts] = lambda value: ()


def check(shape: Shape, value: Any, where: str = "") -> None:
    """Hold a value against a shape.

    Raises:
        DataError: naming the field ``where`` it stands, what it must be and what it is.
    """
    is_fitting = isinstance(value, shape.types) and not (isinstance(value, bool) and bool not in shape.types)
    name = repr(where) if where else A_RECORD
    fault = shape.fault(value, name) if is_fitting else f"{name} must be {shape.what}, got {show(value)}"
    if fault is not None:
        raise DataError(fault)
    for part, inner, inner_shape in shape.parts(value):
        if inner_shape is not None:
            check(inner_shape, inner, (where + part).removeprefix("."))


def find_ignored(shape: Shape, value: Any, where: str = "") -> set[str]:
    """The fields of a value of this shape that nothing reads, places in lists left out (``questions[].note``)."""
    found: set[str] = set()
    for part, inner, inner_shape in shape.parts(value):
        name = (where + ("[]" if part.startswith("[") else part)).removeprefix(".")
        found |= {name} if inner_shape is None else find_ignored(inner_shape, inner, name)
    return found


def show(value: Any) -> str:
    """A value as JSON has it, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def show_keys(mapping: Mapping[str, Any]) -> str:
    """The names of an object's fields, such that they can be printed."""
    return ", ".join(sorted(map(_show_key, mapping))) or "no keys"


def _show_key(key: str) -> str:
    return key.encode("utf-8", "backslashreplace").decode("utf-8")


def text(may_be_blank: bool = False) -> Shape:
    """A string without halves of characters, which says something unless it may be blank."""

    def fault(value: str, name: str) -> str | None:
        if not may_be_blank and not value.strip():
            return f"{name} must not be empty, got {value!r}"
        half = find_lone_surrogate(value)
        return None if half is None else f"{name} holds {half}, half of a character, which is no text: {show(value)}"

    return Shape("a string", (str,), fault)


def number(may_be_nan: bool = False) -> Shape:
    """A number; NaN only where that stands for something missing."""

    def fault(value: float, name: str) -> str | None:
        is_one = isinstance(value, int) or isfinite(value) or (may_be_nan and isnan(value))
        return None if is_one else f"{name} must be a number, got {show(value)}"

    return Shape("a number", (int, float), fault)


def list_of(item: Shape, least: int = 1) -> Shape:
    """A list of values of one shape, ``least`` of them or more."""

    def fault(value: list[Any], name: str) -> str | None:
        if len(value) >= least:
            return None
        return f"{name} must " + ("not be an empty list" if least == 1 else f"have {least} items or more, got {len(value)}")

    return Shape("a list", (list,), fault, lambda value: _items(value, item))


def _items(values: list[Any], shape: Shape) -> Parts:
    return ((f"[{place}]", value, shape) for place, value in enumerate(values))


def object_of(
    required: Mapping[str, Shape] | None = None, optional: Mapping[str, Shape] | None = None, others: Shape | None = None
) -> Shape:
    """A JSON object with these fields; ``others`` is the shape of all further ones, None if they are ignored."""
    needed, known = required or {}, {**(optional or {}), **(required or {})}

    def fault(value: Mapping[str, Any], name: str) -> str | None:
        missing = next((key for key in needed if key not in value), None)
        place = "" if name == A_RECORD else f" in {name}"
        return None if missing is None else f"missing key {missing!r}{place}; found {show_keys(value)}"

    def parts(value: Mapping[str, Any]) -> Iterator[tuple[str, Any, Shape | None]]:
        for name, inner in value.items():
            if inner is not None or name in needed or name not in known:
                yield f".{_show_key(name)}", inner, known.get(name, others)

    return Shape("a JSON object", (dict,), fault, parts)


def one_of(*shapes: Shape) -> Shape:
    """A value of any of several shapes, no two of which share a type."""
    types = tuple(kind for shape in shapes for kind in shape.types)
    what = " or ".join(shape.what for shape in shapes)
    return Shape(what, types, parts=lambda value: [("", value, shape) for shape in shapes if isinstance(value, shape.types)])


def nested(item: Shape) -> Shape:
    """A value of a shape, or a list of such, or lists within lists, any of them empty."""

    def parts(value: Any) -> Parts:
        return _items(value, shape) if isinstance(value, list) else [("", value, item)]

    shape = Shape(f"{item.what} or a list of such", (*item.types, list), parts=parts)
    return shape


TEXT, BLANK, NULL = text(), text(may_be_blank=True), Shape("null", (type(None),))
WHOLE, ANYTHING = Shape("a whole number", (int,)), Shape("anything", (object, bool))
ID = one_of(TEXT, WHOLE)  # a record's name
ANSWER = one_of(TEXT, number())  # years may be numbers
ALIASES = list_of(one_of(BLANK, number()), least=0)
ANSWER_OR_NONE = one_of(TEXT, number(may_be_nan=True), NULL)
