"""Give rows of before their fields and data sets the names of today: ``python -m tools.convert_rows results/table2/rows.jsonl``.

Verdicts that are of locality are called so, and the offline world's sets, which were called like CRE's files, ``world-*``; sets
that were read from a file of the user's keep their names. The file of before is kept beside the new one (``rows.jsonl.before``).
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from propmeta_edit.data.world import CHECKSUMS, shipped_files
from propmeta_edit.files import write_text_atomically

FIELDS = {
    "second_hop_correct": "locality_second_hop",
    "other_fact_correct": "locality_other_fact",
    "neighbour_unchanged": "locality_neighbourhood",
}


def convert_row(row: Mapping[str, Any], offline: set[str]) -> dict[str, Any]:
    """A row under the names of today.

    Args:
        offline: the hashes of the offline world's files.
    """
    converted = {FIELDS.get(name, name): value for name, value in row.items()}
    if row["data_sha256"] in offline:
        converted["dataset"] = row["dataset"].replace("mquake-standin", "world-mquake").replace("cre-", "world-")
    return converted


def convert_file(path: Path) -> int:
    """Convert a file of rows in place; returns how many of its rows were changed."""
    offline = {line.split()[0] for line in (shipped_files() / CHECKSUMS).read_text(encoding="utf-8").splitlines()}
    before = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    after = [convert_row(row, offline) for row in before]
    changed: int = sum(old != new for old, new in zip(before, after, strict=True))
    if changed:
        shutil.copy2(path, path.with_name(path.name + ".before"))
        write_text_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in after))
    return changed


def main() -> None:
    """Convert the files that are named."""
    parser = argparse.ArgumentParser(prog="python -m tools.convert_rows", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="ROWS", help="a rows.jsonl")
    for path in parser.parse_args().files:
        print(f"{path}: {convert_file(path)} rows under other names")


if __name__ == "__main__":
    main()
