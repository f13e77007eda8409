"""Plain texts: a text file, JSON Lines, or a data set of the hub; and the held-out ones that come with the package."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path

from propmeta_edit.data.fields import TEXT, check, object_of
from propmeta_edit.data.reading import Record, iterate_lines, opened_text, read_json
from propmeta_edit.data.world import shipped_files
from propmeta_edit.errors import DataError

_WITH_TEXT = object_of({"text": TEXT})
HELD_OUT = "held_out.txt"  # a paragraph a line
_TABLES = (".csv", ".tsv")  # which their content cannot tell from text
SHUFFLE_BUFFER = 10_000  # texts of a data set of the hub that wait to be drawn from


def read_texts(source: str, num_texts: int | None = None, seed: int = 0) -> list[str]:
    """Texts drawn with ``seed``, in an order drawn with it too. In memory are those alone that are returned, but for a JSON list.

    Args:
        source: a file of texts, one a line or with blank lines between them, or of JSON objects with a ``text`` each (JSON Lines,
            or one JSON list), which is told by its first letter; or ``hub:owner/name``, ``hub:owner/name:configuration`` for the
            train split of a data set of the hub. A file is read twice, the hub once: its files in drawn order, and texts out of
            ``SHUFFLE_BUFFER`` of them at a time.
        num_texts: how many; None for all.

    Raises:
        DataError: no such file, a record without text, or fewer texts than asked for.
    """
    if source.startswith("hub:"):
        texts = list(islice(_stream_from_hub(source, seed), num_texts))
        _require(source, len(texts), num_texts)
        return texts
    path = Path(source)
    if not path.is_file():
        raise DataError("no such file; give one of texts, plain or as JSON, or hub:owner/name", path)
    if path.suffix in _TABLES:
        raise DataError(f"cannot read texts from {path.suffix}: a table is no text; give one of texts, plain or as JSON", path)
    read = _find_reader(path)
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
        remedy = "; lower --num-texts" if count else "; name another file with --corpus"
        layout = "" if source.startswith("hub:") else "; plain texts stand one a line, or with blank lines between them"
        raise DataError(f"{source} holds {count} texts, but {num_texts or 'at least 1'} are needed{remedy}{layout}")


def _find_reader(path: Path) -> Callable[[Path], Iterator[str]]:
    """How a file of texts is read: objects begin with a brace, a list of them with a bracket and a brace, all else is text."""
    with opened_text(path) as opened:
        start = "".join(next((line for line in opened if line.strip()), "").split())
        if start == "[":
            start += "".join(next((line for line in opened if line.strip()), "").split())
    if start.startswith("{"):
        return _read_json_lines
    return _read_json_list if start.startswith("[{") else _read_paragraphs if _has_blank_lines(path) else _read_lines


def _has_blank_lines(path: Path) -> bool:
    """Whether texts are parted by blank lines; those before the first and after the last part nothing."""
    seen = blank = False
    with opened_text(path) as opened:
        for line in opened:
            if line.strip() and blank:
                return True
            seen, blank = seen or bool(line.strip()), seen and not line.strip()
    return False


def _read_lines(path: Path) -> Iterator[str]:
    with opened_text(path) as opened:
        yield from filter(None, map(str.strip, opened))


def _read_paragraphs(path: Path) -> Iterator[str]:
    lines: list[str] = []
    with opened_text(path) as opened:
        for line in chain(opened, ["\n"]):
            if line.strip():
                lines.append(line)
                continue
            paragraph = "".join(lines).strip()
            lines = []
            if paragraph:
                yield paragraph


def _read_json_lines(path: Path) -> Iterator[str]:
    with opened_text(path) as opened:
        for record in iterate_lines(opened, path):
            yield _text_of(record)


def _read_json_list(path: Path) -> Iterator[str]:
    return map(_text_of, read_json(path))


def _text_of(record: Record) -> str:
    with record.named():
        check(_WITH_TEXT, record.value)
    return str(record.value["text"])


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
