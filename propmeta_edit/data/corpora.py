"""Plain texts to gather second moments from: a text file, JSON Lines, or a data set of the hub."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from propmeta_edit.errors import DataError


def read_texts(source: str, num_texts: int | None = None, seed: int = 0) -> list[str]:
    """Texts in an order drawn with ``seed``.

    Args:
        source: ``FILE.txt`` (texts separated by blank lines), ``FILE.jsonl`` (each line with a ``text``), or ``hub:owner/name``,
            ``hub:owner/name:configuration`` for the train split of a data set of the hub (the first ``num_texts`` of it, streamed).
        num_texts: how many; None for all.

    Raises:
        DataError: no such file, another format, a line without text, or fewer texts than asked for.
    """
    if source.startswith("hub:"):
        texts = list(islice(_stream_from_hub(source), num_texts))
    else:
        path = Path(source)
        if not path.is_file():
            raise DataError("no such file; give a .txt or .jsonl file, or hub:owner/name", path)
        readers = {".txt": _read_paragraphs, ".jsonl": _read_json_lines}
        if path.suffix not in readers:
            raise DataError(f"cannot read texts from {path.suffix or 'a file without suffix'}; give .txt or .jsonl", path)
        texts = list(readers[path.suffix](path))
    if not texts or (num_texts is not None and len(texts) < num_texts):
        raise DataError(f"{source} holds {len(texts)} texts, but {num_texts or 'at least 1'} are needed; lower --num-texts")
    return random.Random(seed).sample(texts, num_texts or len(texts))


def _read_paragraphs(path: Path) -> Iterator[str]:
    for paragraph in path.read_text(encoding="utf-8").split("\n\n"):
        if paragraph.strip():
            yield paragraph.strip()


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


def _stream_from_hub(source: str) -> Iterator[str]:
    from datasets import load_dataset

    _, name, *configuration = source.split(":")
    try:
        rows = load_dataset(name, *configuration, split="train", streaming=True)
    except Exception as error:  # whatever the hub's library raises: offline, no such data set, a configuration is needed
        raise DataError(f"{source} cannot be opened: {error}") from error
    for row in rows:
        if "text" not in row:
            raise DataError(f"{source} has no column text; it has {', '.join(row)}")
        yield row["text"]
