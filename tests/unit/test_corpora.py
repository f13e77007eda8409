"""Texts from files, and what is wrong with bad ones."""

from __future__ import annotations

import json

import pytest

from propmeta_edit.data.corpora import read_texts
from propmeta_edit.errors import DataError


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a.txt").write_text("one\nline\n\n two \n\n\n\nthree é", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ("one", "two", "three")), encoding="utf-8")
    return tmp_path


def test_paragraphs_and_json_lines_in_a_drawn_order(files):
    assert sorted(read_texts(str(files / "a.txt"))) == ["one\nline", "three é", "two"]
    orders = {tuple(read_texts(str(files / "a.jsonl"), seed=seed)) for seed in range(20)}
    assert len(orders) > 1 and all(sorted(order) == ["one", "three", "two"] for order in orders)
    assert read_texts(str(files / "a.jsonl"), 2, seed=3) == read_texts(str(files / "a.jsonl"), 2, seed=3)


def test_bad_files_are_named_with_their_line(files):
    with pytest.raises(DataError, match="holds 3 texts, but 4 are needed"):
        read_texts(str(files / "a.txt"), 4)
    with pytest.raises(DataError, match="no such file"):
        read_texts(str(files / "b.txt"))
    (files / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"cannot read texts from \.csv"):
        read_texts(str(files / "a.csv"))
    for line, message in (
        ('{"t": 1}', "KeyError"),
        ("{", "JSONDecodeError"),
        ('{"text": " "}', "non-empty string"),
        ("[1]", "TypeError"),
    ):
        (files / "a.jsonl").write_text('{"text": "fine"}\n' + line, encoding="utf-8")
        with pytest.raises(DataError, match=f"line 2: .*{message}"):
            read_texts(str(files / "a.jsonl"))
