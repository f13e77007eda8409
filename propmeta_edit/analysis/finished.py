"""Finished pieces of an analysis on disk, one JSON line each: what is there is not computed again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from propmeta_edit.errors import DataError
from propmeta_edit.files import append_line, cut_torn_line


class FinishedPieces:
    """``pieces.jsonl``: appended and synced line by line, all made with the same settings.

    A last line without its end (a run that was killed while writing) is cut off on opening.

    Args:
        path: the file; created with its folder at the first piece.
        settings: plain values that decide the pieces' content.

    Raises:
        DataError: a broken line that is not the last, or pieces made with other settings.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._settings = json.loads(json.dumps(settings))
        self.pieces: dict[str, Any] = {}
        cut_torn_line(self.path)
        lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                key, made_with, value = entry["key"], entry["settings"], entry["value"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError("broken line; remove it, its piece will be computed again", self.path, number) from error
            if made_with != self._settings:
                names = [n for n in {**made_with, **self._settings} if made_with.get(n) != self._settings.get(n)]
                told = "; ".join(f"{n} {made_with.get(n)!r} -> {self._settings.get(n)!r}" for n in names)
                raise DataError(f"made with other settings ({told}); choose another --output, or remove it", self.path, number)
            self.pieces[key] = value

    def add(self, key: str, value: Any) -> None:
        """Put a piece on disk before returning."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_line(self.path, json.dumps({"key": key, "settings": self._settings, "value": value}, ensure_ascii=False))
        self.pieces[key] = value
