"""The Python of the documentation runs as it is printed, on the bundled model; links in the README lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]


def python_of(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def run_python(code, folder):
    (folder / "hparams").symlink_to(ROOT / "hparams")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http", "#")):
            assert (ROOT / page).parent.joinpath(target.split("#")[0]).exists(), target


@pytest.mark.slow
def test_the_ten_lines(tmp_path):
    pages = [python_of(page) for page in ("README.md", "docs/index.md")]
    [code], [same] = ([block for block in blocks if "EditedModel(model, edit)):" in block] for blocks in pages)
    assert code == same
    before, after = run_python(code, tmp_path).splitlines()
    assert (before.strip(), after.strip()) == ("London.", "Hanoi."), "as the comment in it says"


@pytest.mark.slow
def test_the_page_on_edits(tmp_path):
    run_python("\n".join(python_of("docs/edits.md")), tmp_path)
    assert (tmp_path / "my-edit").is_dir() and (tmp_path / "my-lora").is_dir()


@pytest.mark.slow
def test_the_page_on_methods(tmp_path):
    method, *rest = python_of("docs/adding_a_method.md")
    (tmp_path / "my_method.py").write_text(method, encoding="utf-8")
    assert re.search(r"fact written [45] of 5, consequence follows \d of 5", run_python("\n".join(rest), tmp_path))
