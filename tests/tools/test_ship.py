"""What the package ships of the offline world is what the generator gives."""

from __future__ import annotations

import os

from propmeta_edit.data.world import CHECKSUMS, shipped_files
from tools.world.ship import list_checksums, pack, write_files


def test_the_generator_gives_the_shipped_files(tmp_path):
    assert list_checksums(write_files(tmp_path)) == (shipped_files() / CHECKSUMS).read_text(encoding="utf-8")


def test_the_archive_depends_on_names_and_contents_alone(tmp_path):
    archives = []
    for folder, seconds in (("one", 0), ("other", 10**9)):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "a.jsonl"
        file.write_text('{"a": 1}\n')
        os.utime(file, (seconds, seconds))
        pack([file], tmp_path / folder / "packed")
        archives.append((tmp_path / folder / "packed").read_bytes())
    assert archives[0] == archives[1]
