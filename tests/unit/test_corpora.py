"""Texts from files, and what is wrong with bad ones."""

from __future__ import annotations

import json
import random
import tracemalloc

import datasets
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
        ('{"t": 1}', "missing key 'text'; found t"),
        ("{", "broken JSON: Expecting property name"),
        ('{"text": " "}', "'text' must not be empty"),
        ("[1]", "a record must be a JSON object"),
    ):
        (files / "a.jsonl").write_text('{"text": "fine"}\n' + line, encoding="utf-8")
        with pytest.raises(DataError, match=f"line 2: .*{message}"):
            read_texts(str(files / "a.jsonl"))


def test_a_drawn_part_is_the_one_of_a_list_in_memory_and_alone_is_kept(tmp_path):
    path = tmp_path / "long.txt"
    texts = [f"text {number} " + "word " * 500 for number in range(2000)]
    path.write_text("\n\n\n".join(texts), encoding="utf-8")
    tracemalloc.start()
    found = read_texts(str(path), 20, seed=5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == random.Random(5).sample([text.strip() for text in texts], 20)
    assert peak < path.stat().st_size / 5, "the whole file was in memory"


def test_a_data_set_of_the_hub_is_drawn_from_as_a_stream(tmp_path, monkeypatch):
    """A folder stands for the hub's data set: ``datasets`` opens either by its name."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # five seconds a stream that is left early
    rows = [{"text": " " if number == 3 else f"text {number}"} for number in range(200)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "corpus" / "train.parquet")
    source = f"hub:{tmp_path / 'corpus'}"
    drawn = {seed: read_texts(source, 10, seed) for seed in (0, 1)}
    assert drawn[0] == read_texts(source, 10, 0) != drawn[1]
    assert all(len(set(some)) == 10 and set(some) != {f"text {number}" for number in range(10)} for some in drawn.values())
    assert sorted(read_texts(source)) == sorted(row["text"] for row in rows if row["text"].strip())
    with pytest.raises(DataError, match="holds 199 texts, but 300 are needed"):
        read_texts(source, 300)
    datasets.Dataset.from_list([{"content": "a"}]).to_parquet(tmp_path / "other" / "train.parquet")
    with pytest.raises(DataError, match="has no column text; it has content"):
        read_texts(f"hub:{tmp_path / 'other'}")


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("One.\nTwo.\nThree.\n", ["One.", "Three.", "Two."]),
        ("\nOne.\nTwo.\n\n\n", ["One.", "Two."]),
        ("One,\ngoing on.\n \nTwo.\n", ["One,\ngoing on.", "Two."]),
    ],
)
def test_one_text_a_line_where_no_blank_line_parts_them(tmp_path, text, texts):
    path = tmp_path / "texts.txt"
    path.write_text(text)
    assert sorted(read_texts(str(path))) == texts
    with pytest.raises(DataError, match=r"holds \d texts, but 9 are needed; .*one a line, or with blank lines"):
        read_texts(str(path), 9)
