"""Plain texts: a text file, JSON Lines, or a data set of the hub; and the held-out ones that come with the package."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from propmeta_edit.data.world import shipped_files
from propmeta_edit.errors import DataError

HELD_OUT = "held_out.txt"  # a paragraph a line
SHUFFLE_BUFFER = 10_000  # texts of a data set of the hub that wait to be drawn from


def read_texts(source: str, num_texts: int | None = None, seed: int = 0) -> list[str]:
    """Texts drawn with ``seed``, in an order drawn with it too. In memory are those alone that are returned.

    Args:
        source: ``FILE.txt`` (texts separated by blank lines), ``FILE.jsonl`` (each line with a ``text``), or ``hub:owner/name``,
            ``hub:owner/name:configuration`` for the train split of a data set of the hub. A file is read twice, the hub once:
            its files in drawn order, and texts out of ``SHUFFLE_BUFFER`` of them at a time.
        num_texts: how many; None for all.

    Raises:
        DataError: no such file, another format, a line without text, or fewer texts than asked for.
    """
    if source.startswith("hub:"):
        texts = list(islice(_stream_from_hub(source, seed), num_texts))
        _require(source, len(texts), num_texts)
        return texts
    path = Path(source)
    if not path.is_file():
        raise DataError("no such file; give a .txt or .jsonl file, or hub:owner/name", path)
    readers = {".txt": _read_paragraphs, ".jsonl": _read_json_lines}
    if path.suffix not in readers:
        raise DataError(f"cannot read texts from {path.suffix or 'a file without suffix'}; give .txt or .jsonl", path)
    read = readers[path.suffix]
    count = sum(1 for _ in read(path))
    _require(source, count, num_texts)
    chosen = random.Random(seed).sample(range(count), num_texts or count)
    wanted = set(chosen)
    kept = {number: text for number, text in enumerate(read(path)) if number in wanted}
    return [kept[number] for number in chosen]


def read_held_out() -> list[str]:
    """The paragraphs of plain English that come with the package, in their order: nothing here is trained on them."""
    return (shipped_files() / HELD_OUT).read_text(encoding="utf-8").splitlines()


def _require(source: str, count: int, num_texts: int | None) -> None:
    if count < (num_texts or 1):
        raise DataError(f"{source} holds {count} texts, but {num_texts or 'at least 1'} are needed; lower --num-texts")


def _read_paragraphs(path: Path) -> Iterator[str]:
    lines: list[str] = []
    with open(path, encoding="utf-8") as opened:
        for line in chain(opened, ["\n"]):
            if line != "\n":
                lines.append(line)
                continue
            paragraph = "".join(lines).strip()
            lines = []
            if paragraph:
                yield paragraph


def _read_json_lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f'every line must be JSON with a "text" ({error!r})', path, number) from error
            if not isinstance(text, str) or not text.strip():
                raise DataError(f'"text" must be a non-empty string, got {text!r}', path, number)
            yield text


def _stream_from_hub(source: str, seed: int) -> Iterator[str]:
    from datasets import load_dataset

    _, name, *configuration = source.split(":")
    try:
        rows = load_dataset(name, *configuration, split="train", streaming=True).shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    except Exception as error:  # whatever the hub's library raises: offline, no such data set, a configuration is needed
        raise DataError(f"{source} cannot be opened: {error}") from error
    for row in rows:
        if "text" not in row:
            raise DataError(f"{source} has no column text; it has {', '.join(row)}")
        if row["text"].strip():
            yield row["text"]
