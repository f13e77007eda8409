"""Finished pieces of an analysis on disk, one JSON line each: what is there is not computed again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from propmeta_edit.errors import DataError
from propmeta_edit.store import JsonLines, require_made_from

REMEDY = "remove it, its piece will be computed again"


class FinishedPieces:
    """``pieces.jsonl``, all made from the same.

    Args:
        path: the file; created with its folder at the first piece.
        settings: plain values that decide the pieces' content.

    Raises:
        DataError: a broken line that is not the last.
        OriginError: pieces that were made from something else.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self._settings = json.loads(json.dumps(settings))
        self._lines = JsonLines(path, REMEDY)
        self.pieces: dict[str, Any] = {}
        for number, entry in enumerate(self._lines.entries, start=1):
            if not {"key", "settings", "value"} <= set(entry):
                raise DataError(f"not a piece of an analysis; {REMEDY}", path, number)
            where, remedy = f"{path}, line {number}", "choose another --output, or remove it"
            require_made_from(self._settings, entry["settings"], where, "holds a piece", remedy)
            self.pieces[entry["key"]] = entry["value"]

    def add(self, key: str, value: Any) -> None:
        """Put a piece on disk before returning."""
        self._lines.append({"key": key, "settings": self._settings, "value": value})
        self.pieces[key] = value
