"""Rows of before are read under the names of today."""

from __future__ import annotations

import json

from propmeta_edit.data.world import CHECKSUMS, shipped_files
from propmeta_edit.evaluation.rows import read_rows
from tools.convert_rows import convert_file


def test_rows_of_before_are_converted_once(tmp_path):
    checksums = (shipped_files() / CHECKSUMS).read_text().splitlines()
    offline = {line.split()[1]: line.split()[0] for line in checksums}
    common = {"model": "m", "model_sha256": "a", "base_sha256": "a", "hparams_sha256": "c", "seed": 0, "correct": True}
    verdicts = {"second_hop_correct": True, "other_fact_correct": None, "neighbour_unchanged": False}
    sets = [
        ("cre-ood", offline["test_data_ood.jsonl"], "world-ood"),
        ("cre-ood", "of the user's", "cre-ood"),
        ("mquake-standin-3hop", offline["mquake-standin-3hop.json"], "world-mquake-3hop"),
        ("valid-id", offline["valid_data_id.jsonl"], "valid-id"),
    ]
    path = tmp_path / "rows.jsonl"
    rows = [
        {"method": "FT", "dataset": name, "case_id": str(n), "data_sha256": sha256, **common, **verdicts}
        for n, (name, sha256, _) in enumerate(sets)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert convert_file(path) == 4
    found = read_rows(path)
    assert [row.dataset for row in found] == [name for *_, name in sets]
    assert {(row.locality_second_hop, row.locality_other_fact, row.locality_neighbourhood) for row in found} == {
        (True, None, False)
    }
    assert json.loads((tmp_path / "rows.jsonl.before").read_text().splitlines()[0]) == rows[0]
    assert convert_file(path) == 0, "nothing is left to convert"
