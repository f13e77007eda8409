"""The offline world as it is shipped: one archive of files in the formats of CRE and MQuAKE, made by ``tools/world``."""

from __future__ import annotations

import json
import lzma
import tarfile
from hashlib import sha256
from importlib import resources
from pathlib import Path

from propmeta_edit.errors import DataError
from propmeta_edit.records import Question

ARCHIVE, CHECKSUMS = "world.tar.xz", "world.sha256"
SINGLE_HOP = "single_hop.jsonl"  # the file of the single facts, each in two wordings


def shipped_files() -> Path:
    """The folder of the data files that come with the package."""
    return Path(str(resources.files("propmeta_edit.data").joinpath("files")))


def unpack_world(folder: Path) -> None:
    """Write the files of the shipped archive into a folder that exists, each checked against its checksum first.

    Raises:
        DataError: the archive or its checksums are missing or damaged.
    """
    path = shipped_files() / ARCHIVE
    try:
        checksums = (shipped_files() / CHECKSUMS).read_text(encoding="utf-8").splitlines()
        with tarfile.open(path, "r:xz") as archive:
            contents = {entry.name: archive.extractfile(entry).read() for entry in archive}  # type: ignore[union-attr]
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError) as error:
        raise DataError(f"the package's own data cannot be read ({error}); install it anew", path) from error
    if checksums != [f"{sha256(content).hexdigest()}  {name}" for name, content in contents.items()]:
        raise DataError(f"the package's own data is damaged: its checksums are not those of {CHECKSUMS}; install it anew", path)
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def load_single_hop(path: Path) -> list[Question]:
    """Every fact of the world as its one-hop question, each in its two wordings, one after the other."""
    questions = []
    with open(path, encoding="utf-8") as lines:
        for fact in map(json.loads, lines):
            questions += [Question(fact[wording], (fact["answer"],)) for wording in ("question", "paraphrase")]
    return questions
