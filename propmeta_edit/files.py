"""Files written whole or not at all, hashes of files and values, and names that tell folders apart."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A temporary file in the same folder to write to; at the end it takes the name ``path``: the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=path.name + ".", suffix=".partial", dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomically(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_atomically(path: str | Path, value: Any) -> None:
    """Write a value as JSON for people too: indented by one, letters of every script as they are."""
    write_text_atomically(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def shortest_names(folders: Sequence[Path]) -> list[str]:
    """Each folder's name, with as many of its parents' before it as tell it from the others, which must be other folders."""
    names = []
    for folder in folders:
        others = [other.parts for other in folders if other != folder]
        parts, length = folder.parts, 1
        while any(other[-length:] == parts[-length:] for other in others):
            length += 1
        names.append(Path(*parts[-length:]).as_posix())
    return names


def cut_torn_line(path: Path) -> None:
    """Cut off a last line without its end, which a process that was killed while writing left; no file is fine."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            file.truncate(whole)


def append_line(path: Path, line: str) -> None:
    """Put a line at the end of a file, on disk before returning."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def save_figure(figure: Any, path: Path) -> None:
    """A picture of matplotlib's, in the format of the file's ending, whole or not at all."""
    with written_whole(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=150)


def sha256_of_file(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hex digest of a value's JSON with sorted keys, so that equal values have equal digests."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
