"""Rows lose the data's text when they are packed, and are whole again with it."""

from __future__ import annotations

import json
import lzma
from dataclasses import asdict

import pytest

from propmeta_edit.errors import DataError
from propmeta_edit.evaluation.measures import as_record
from propmeta_edit.evaluation.rows import Row
from propmeta_edit.records import OTHER, Case, EditRequest, Probe, Question
from tools.pack_rows import pack, unpack

CASE = Case(
    "c1",
    (EditRequest("Ann Lee lives in", "Peru", "Ann Lee"),),
    Question("What does Ann Lee pay with?", ("sol",)),
    probes=(Probe(OTHER, Question("What does Bob Day pay with?", ("lev",)), ("sol",)),),
    tags={"relation": "currency"},
)
CASES = {("invented", "c1"): CASE}


@pytest.fixture
def rows(tmp_path):
    row = Row(
        **{"method": "CaKE", "dataset": "invented", "case_id": "c1", "model": "m", "seed": 0, "base_sha256": "b"},
        **{"model_sha256": "m", "data_sha256": "d", "hparams_sha256": "h"},
        question=CASE.question.text,
        answers=CASE.question.answers,
        generated=" the euro",
        probes=tuple(as_record(probe, " x", " y") for probe in CASE.probes),
        tags={**CASE.tags, "augmentation": "templates"},
    )
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(asdict(row)) + "\n")
    return path


def test_rows_come_back_as_they_were_and_no_text_of_the_data_is_kept(rows, tmp_path):
    packed, again = tmp_path / "rows.xz", tmp_path / "again.jsonl"
    assert pack(rows, packed, CASES) == unpack(packed, again, CASES) == 1
    assert json.loads(again.read_text()) == json.loads(rows.read_text())
    kept = lzma.decompress(packed.read_bytes()).decode()
    assert all(text not in kept for text in ("Ann", "Bob", "pay", "sol", "lev", "currency"))
    assert " the euro" in kept and "templates" in kept


def test_other_data_is_refused(rows, tmp_path):
    packed = tmp_path / "rows.xz"
    pack(rows, packed, CASES)
    with pytest.raises(DataError, match="exists; remove it"):
        unpack(packed, rows, CASES)
    with pytest.raises(DataError, match=r"the files have no case c1 \(1 are missing\)"):
        unpack(packed, tmp_path / "new", {})
    other = Case("c1", CASE.edits, CASE.question)
    with pytest.raises(DataError, match="c1 has 0 probes, its row 1"):
        unpack(packed, tmp_path / "new", {("invented", "c1"): other})
