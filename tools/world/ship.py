"""Makes the offline world anew and packs it into the archive that the package ships, with the checksums of its files."""

from __future__ import annotations

import io
import lzma
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

from propmeta_edit.data.cre import save_cre
from propmeta_edit.data.world import ARCHIVE, CHECKSUMS, SINGLE_HOP, shipped_files
from propmeta_edit.files import sha256_of_file, write_text_atomically, written_whole
from tools.world.generate import single_hop_questions, write_world
from tools.world.mquake import write_mquake

SEED = 0


def write_files(folder: Path) -> list[Path]:
    """Write everything that is shipped of the world into a folder: its splits, the MQuAKE stand-ins and the single facts.

    Returns:
        The files, by name.
    """
    paths = [*write_world(folder, SEED).values(), *write_mquake(folder, SEED).values(), folder / SINGLE_HOP]
    both = single_hop_questions(paraphrases=True)
    pairs = zip(both[::2], both[1::2], strict=True)
    facts = [{"question": one.text, "paraphrase": other.text, "answer": one.answers[0]} for one, other in pairs]
    save_cre(facts, folder / SINGLE_HOP)
    return sorted(paths)


def list_checksums(files: Iterable[Path]) -> str:
    """The files' hashes and names, as ``sha256sum --check`` reads them."""
    return "".join(f"{sha256_of_file(file)}  {file.name}\n" for file in files)


def pack(files: Iterable[Path], archive: Path) -> None:
    """Write an archive of the files that is the same for the same files: no times, no owners."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for file in files:
            entry = tarfile.TarInfo(file.name)
            entry.size = file.stat().st_size
            with open(file, "rb") as opened:
                tar.addfile(entry, opened)
    with written_whole(archive) as temporary:
        temporary.write_bytes(lzma.compress(content.getvalue(), preset=9 | lzma.PRESET_EXTREME))


def main() -> None:
    """Replace the package's archive and its checksums."""
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Path(folder))
        pack(files, shipped_files() / ARCHIVE)
        write_text_atomically(shipped_files() / CHECKSUMS, list_checksums(files))


if __name__ == "__main__":
    main()
