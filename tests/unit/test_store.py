"""Lines that are kept, and the one way to refuse what was made from something else."""

from __future__ import annotations

import pytest

from propmeta_edit.errors import DataError, OriginError
from propmeta_edit.store import JsonLines, differences, read_lines, require_made_from


def test_lines_are_kept_and_a_torn_one_is_cut_off(tmp_path):
    path = tmp_path / "deep" / "lines.jsonl"
    lines = JsonLines(path, "remove it")
    lines.append({"a": "São\u2028"})
    lines.append({"b": [1.5, None]})
    with open(path, "a") as file:
        file.write('{"c": ')
    assert read_lines(path, "") == [{"a": "São\u2028"}, {"b": [1.5, None]}] and path.read_text().endswith('{"c": ')
    again = JsonLines(path, "remove it")
    assert again.entries == lines.entries and path.read_text().endswith("}\n")
    again.rewrite(again.entries[1:])
    assert JsonLines(path, "").entries == [{"b": [1.5, None]}]


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"a": ', "\udcff"])
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line.encode("utf-8", "surrogateescape") + b'\n{"b": 2}\n')
    with pytest.raises(DataError, match=r"lines\.jsonl, line 2: broken line .*; do this"):
        JsonLines(path, "do this")


def test_what_differs_is_named_as_json_has_it():
    before = {"layers": [1], "rate": 0.5, "more": 1}
    assert differences(before, {"layers": (1,), "rate": 0.5}) == [], "what is not asked for is of no account"
    assert differences(before, {"layers": [2], "new": None, "rate": 0.5}) == ["layers [1], now [2]"]
    require_made_from({"rate": 0.5}, before, "folder", "holds a run", "remove it")
    with pytest.raises(
        OriginError, match=r"^folder: holds a run made from something else \(rate 0\.5, now 1; x None, now 2\); remove it$"
    ):
        require_made_from({"rate": 1, "x": 2}, before, "folder", "holds a run", "remove it")
