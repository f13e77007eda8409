"""Rows without the text of the data that they are about, and whole again from it.

``python -m tools.pack_rows pack results/real/rows.jsonl FOLDER rows.jsonl.xz`` keeps ids, verdicts and what models said;
``python -m tools.pack_rows unpack rows.jsonl.xz FOLDER results/real/rows.jsonl`` puts back questions, answers and tags from the
released files in FOLDER, so that ``propmeta-edit table2 --data-folder FOLDER --output results/real`` goes on where they stopped.
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from propmeta_edit.errors import DataError
from propmeta_edit.evaluation.measures import as_record
from propmeta_edit.files import write_text_atomically, written_whole
from propmeta_edit.recipes.released import find_released
from propmeta_edit.records import Case
from propmeta_edit.studies.table2 import PAPERS_OWN, load_asked

FURTHER = ("mquake-4hop",)  # sets that are asked besides those of the folder, where it has them
ASKED_TOGETHER, MQUAKE_CASES = (2, 4, 8, 16), 300
Cases = Mapping[tuple[str, str], Case]  # by data set and id


def pack_row(row: Mapping[str, Any], case: Case) -> dict[str, Any]:
    """A row without question, answers, and the tags that its case has."""
    own = {name: value for name, value in row.items() if name not in ("question", "answers", "probes", "tags")}
    probes = [[probe["before"], probe["after"]] for probe in row["probes"]]
    return {**own, "probes": probes, "tags": {name: v for name, v in row["tags"].items() if case.tags.get(name) != v}}


def unpack_row(packed: Mapping[str, Any], case: Case) -> dict[str, Any]:
    """The row again.

    Raises:
        DataError: the case has other probes than the row.
    """
    if len(case.probes) != len(packed["probes"]):
        raise DataError(f"{packed['dataset']} {case.case_id} has {len(case.probes)} probes, its row {len(packed['probes'])}")
    probes = [as_record(probe, before, after) for probe, (before, after) in zip(case.probes, packed["probes"], strict=True)]
    about = {"question": case.question.text, "answers": list(case.question.answers), "probes": probes}
    return {**packed, **about, "tags": {**case.tags, **packed["tags"]}}


def find_cases(folder: str, seed: int = 0) -> Cases:
    """Every case that rows of the released files can be about."""
    items = [f"{name}={find_released(name, folder)}" for name in (*PAPERS_OWN, *FURTHER)]
    splits = load_asked(items, seed, ASKED_TOGETHER, str(find_released("cre-train", folder)), MQUAKE_CASES)
    return {(split.data.name, case.case_id): case for split in splits for case in split.data.cases}


def pack(rows: Path, packed: Path, cases: Cases) -> int:
    """Write the rows of a file without the data's text, compressed; returns how many."""
    lines = [json.loads(line) for line in rows.read_bytes().splitlines()]
    text = _as_lines(pack_row(row, cases[row["dataset"], row["case_id"]]) for row in lines)
    with written_whole(packed) as temporary:
        Path(temporary).write_bytes(lzma.compress(text.encode(), preset=9))
    return len(lines)


def unpack(packed: Path, rows: Path, cases: Cases) -> int:
    """Write the rows again; returns how many.

    Raises:
        DataError: a case that the files do not have, or ``rows`` exists.
    """
    if rows.exists():
        raise DataError("exists; remove it, or choose another file", rows)
    lines = [json.loads(line) for line in lzma.decompress(packed.read_bytes()).splitlines()]
    missing = [line["case_id"] for line in lines if (line["dataset"], line["case_id"]) not in cases]
    if missing:
        raise DataError(f"the files have no case {missing[0]} ({len(missing)} are missing)", packed)
    write_text_atomically(rows, _as_lines(unpack_row(line, cases[line["dataset"], line["case_id"]]) for line in lines))
    return len(lines)


def _as_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Pack or unpack the file that is named."""
    parser = argparse.ArgumentParser(prog="python -m tools.pack_rows", description=__doc__)
    parser.add_argument("what", choices=("pack", "unpack"))
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", help="of the released files")
    parser.add_argument("target", type=Path)
    given = parser.parse_args(arguments)
    number = {"pack": pack, "unpack": unpack}[given.what](given.source, given.target, find_cases(given.folder))
    print(f"{number} rows in {given.target}")


if __name__ == "__main__":
    main()
