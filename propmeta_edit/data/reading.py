"""The one way from a file to its text and its records: what a file is is told by its content, not by its name.

Plain or gzipped; UTF-8 with or without the mark that Windows puts first, or UTF-16 with it; lines that end in any way; one JSON
list of records, or JSON Lines. What is no data at all, as a Git LFS pointer or a web page in its place, is named for what it is.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from propmeta_edit.data.fields import Shape, check
from propmeta_edit.errors import DataError, RequestError, did_you_mean

_GZIP = b"\x1f\x8b"
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
# How a file begins that is no data, what it is, and what to do about it.
_POINTER = "the pointer to a file, not the file itself (Git LFS): git lfs pull gets it, or download it from its page"
_NO_DATA = {
    b"version https://git-lfs.github.com/spec/": _POINTER,
    b"/annex/objects/": "the pointer to a file, not the file itself (git-annex): git annex get gets it",
    b"PK\x03\x04": "a zip archive: unpack it, and name the file in it",
    b"\xfd7zXZ\x00": "compressed by xz: unpack it first (gzip alone is read as it is)",
    b"BZh": "compressed by bzip2: unpack it first (gzip alone is read as it is)",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it first (gzip alone is read as it is)",
    b"PAR1": "a Parquet file: load it with datasets, and save it as JSON (to_json)",
}
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")
_PAGE = "a web page saved in place of the data (of a login or an error, perhaps): download the file itself (on GitHub, Raw)"


@dataclass(frozen=True)
class Record:
    """A record of a file, and where it stands.

    Args:
        value: as JSON has it.
        index: its place among the file's records, from 0.
        line: its line where each has one, else None.
    """

    value: Any
    path: Path
    index: int
    line: int | None = None

    @property
    def number(self) -> int:
        """Its line, or its place from 1 where records have no lines."""
        return self.index + 1 if self.line is None else self.line

    def __str__(self) -> str:
        case_id = self.value.get("case_id") if isinstance(self.value, dict) else None
        is_named = isinstance(case_id, str | int) and not isinstance(case_id, bool)
        return f"record {self.index}" + (f" (case_id {case_id!r})" if is_named else "")

    @contextmanager
    def named(self) -> Iterator[None]:
        """Inside, whatever is wrong with the record is an error that names its file and its place there.

        Raises:
            DataError: naming them.
        """
        try:
            yield
        except (DataError, RequestError) as error:
            message = str(error) if self.line is not None else f"{self}: {error}"
            raise DataError(message, self.path, self.line) from error
        except RecursionError as error:
            raise DataError(f"{self} holds lists within lists without end", self.path, self.line) from error


@contextmanager
def opened_text(path: Path) -> Iterator[TextIO]:
    """A text file to read from, whatever its encoding, line ends and compression by gzip.

    Raises:
        DataError: it cannot be read, now or later inside, or is no text.
    """
    try:
        with open(path, "rb") as raw:
            is_gzip = raw.peek(2)[:2] == _GZIP
            with io.BufferedReader(gzip.GzipFile(fileobj=raw)) if is_gzip else raw as buffered:
                start = buffered.peek(512)[:512]
                _refuse_what_is_no_data(start, path)
                encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8")
                yield io.TextIOWrapper(buffered, encoding=encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 text ({error.reason} at byte {error.start})", path) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"is damaged: its gzip compression cannot be undone ({error}); download it again", path) from error
    except OSError as error:
        near = did_you_mean(path.name, os.listdir(path.parent)) if path.parent.is_dir() and not path.exists() else ""
        raise DataError(f"cannot be read: {error.strerror or error}{near}", path) from error


def _refuse_what_is_no_data(start: bytes, path: Path) -> None:
    for beginning, what in _NO_DATA.items():
        if start.startswith(beginning):
            raise DataError(f"is {what}", path)
    if start.removeprefix(codecs.BOM_UTF8).lstrip().lower().startswith(_PAGES):
        raise DataError(f"is {_PAGE}", path)


def read_records(path: str | Path, shape: Shape) -> list[Record]:
    """The records of a JSON list or of JSON Lines, each held against what it must be; empty lines are skipped.

    Raises:
        DataError: it cannot be read, is neither, holds no record, or one that is not of this shape (with its place and the field).
    """
    records = read_json(path)
    for record in records:
        with record.named():
            check(shape, record.value)
    return records


def read_json(path: str | Path) -> list[Record]:
    """The records of a JSON list or of JSON Lines, whatever they are.

    Raises:
        DataError: as ``read_records``.
    """
    path = Path(path)
    with opened_text(path) as opened:
        text = opened.read()
    records = _parse_list(text, path) if text.lstrip()[:1] == "[" else _parse_lines(text, path)
    if not records:
        raise DataError("it holds no record; expected a JSON list of objects, or one object a line", path)
    return records


def _parse_list(text: str, path: Path) -> list[Record]:
    with _json_errors_named(path):
        return [Record(value, path, index) for index, value in enumerate(json.loads(text))]


def _parse_lines(text: str, path: Path) -> list[Record]:
    records: list[Record] = []
    try:
        # Not splitlines: JSON strings may hold U+2028 and the like unescaped.
        records.extend(iterate_lines(text.split("\n"), path))
    except DataError:
        if not _is_one_object(text):
            raise
        return [Record(json.loads(text), path, 0)]
    return records


def iterate_lines(lines: Iterable[str], path: Path) -> Iterator[Record]:
    """The records of JSON Lines, one after the other.

    Raises:
        DataError: a line is no JSON.
    """
    index = 0
    for number, line in enumerate(lines, start=1):
        if line.strip():
            with _json_errors_named(path, number):
                value = json.loads(line)
            yield Record(value, path, index, number)
            index += 1


def _is_one_object(text: str) -> bool:
    """Whether all of a text is one JSON object, over several lines."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


@contextmanager
def _json_errors_named(path: Path, line: int | None = None) -> Iterator[None]:
    try:
        yield
    except json.JSONDecodeError as error:
        raise DataError(f"broken JSON: {error.msg} (column {error.colno})", path, line or error.lineno) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        raise DataError(f"cannot be read as JSON: {error}", path, line) from error
