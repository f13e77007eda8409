"""Resumable work on disk: what is finished stays finished, and what was made from something else is refused, in one way.

``made from`` is the one word for identity here: whatever decides a row, a state, a piece of an analysis or a checkpoint, as plain
values by name (hashes of weights and data, settings, seeds).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from propmeta_edit.errors import DataError, OriginError
from propmeta_edit.files import append_line, cut_torn_line, write_text_atomically


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is otherwise now than it was before, as JSON has the values; what ``now`` does not name is of no account."""
    plain = json.loads(json.dumps(now))
    return [f"{name} {before.get(name)!r}, now {value!r}" for name, value in plain.items() if before.get(name) != value]


def require_made_from(now: Mapping[str, Any], before: Mapping[str, Any], place: str | Path, what: str, remedy: str) -> None:
    """Refuse to go on with what was made from something else.

    Args:
        now: what it would be made from, by name.
        before: what it was made from.
        place: the file or folder that holds it.
        what: it, as the message calls it.
        remedy: what the user can do.

    Raises:
        OriginError: naming what differs.
    """
    other = differences(before, now)
    if other:
        raise OriginError(f"{place}: {what} made from something else ({'; '.join(other)}); {remedy}")


class JsonLines:
    """A file of JSON objects, appended and synced line by line.

    A last line without its end (a process was killed while writing) is cut off on opening.

    Args:
        path: the file; created with its folder at the first line.
        remedy: what to do about a line that is broken.

    Attributes:
        entries: the objects, in their order.

    Raises:
        DataError: a broken line that is not the last (with its number).
    """

    def __init__(self, path: str | Path, remedy: str) -> None:
        self.path = Path(path)
        cut_torn_line(self.path)
        self.entries = read_lines(self.path, remedy)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Put an object on disk before returning."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_line(self.path, as_line(entry))
        self.entries.append(dict(entry))

    def rewrite(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Put others in their place, whole or not at all."""
        self.entries = [dict(entry) for entry in entries]
        write_text_atomically(self.path, "".join(as_line(entry) + "\n" for entry in self.entries))


def as_line(entry: Mapping[str, Any]) -> str:
    """An object as it stands on a line."""
    return json.dumps(entry, ensure_ascii=False)


def read_lines(path: Path, remedy: str) -> list[dict[str, Any]]:
    """The whole lines of a file, which is left as it is: another process may be writing to it. No file has none.

    Raises:
        DataError: a broken line that is not the last.
    """
    if not path.exists():
        return []
    found = []
    # Only "\n" ends a line: str.splitlines would also cut at U+0085 and U+2028, which a model can generate.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            entry = json.loads(line.decode("utf-8"))
            if not isinstance(entry, dict):
                raise ValueError(f"no object: {line[:80]!r}")
        except ValueError as error:
            raise DataError(f"broken line ({error}); {remedy}", path, number) from error
        found.append(entry)
    return found
