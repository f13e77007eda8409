"""The Python of the documentation runs as it is printed, on the bundled model; links in the README lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from propmeta_edit.cli import main
from tools.site_pages import make_cli_page, make_settings_page

ROOT = Path(__file__).resolve().parents[2]
MADE = ("reference/cli.md", "reference/settings.md")  # when the site is built
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
        if not target.startswith(("http", "#")) and target not in MADE:
            assert (ROOT / page).parent.joinpath(target.split("#")[0]).exists(), target


def test_the_readme_is_short():
    """At most 120 lines, and 16 words a sentence on average: of its prose, without code, tables, pictures and headings."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    without_code = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    prose = " ".join(line for line in without_code.splitlines() if line and not line.startswith(("#", "|", "!")))
    link_texts = re.sub(r"\]\([^)]*\)", "]", prose)
    sentences = re.split(r"(?<=[.:?!])(?<!\b[A-Z]\.)\s+", link_texts)  # an initial ends no sentence
    assert len(sentences) > 20 and len(link_texts.split()) / len(sentences) <= 16


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
def test_the_site_needs_nothing_from_elsewhere(tmp_path):
    """No page loads a script, a style or a picture from another machine; links to read on are no such thing."""
    pytest.importorskip("material", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    pages = list((tmp_path / "site").rglob("*.html"))
    assert {"index.html", "reference/cli/index.html", "reference/settings/index.html", "notebooks/first_edit/index.html"} <= {
        str(page.relative_to(tmp_path / "site")) for page in pages
    }
    loaded = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*\ssrc=[\"'](https?:)?//|<link\b[^>]*stylesheet[^>]*href=[\"'](https?:)?//"
    )
    assert not [page for page in pages if loaded.search(page.read_text(encoding="utf-8"))]


@pytest.mark.slow
@pytest.mark.easyedit
def test_the_page_on_measures(tmp_path):
    [code] = python_of("docs/adding_a_measure.md")
    said = run_python(code, tmp_path)
    assert "'brief_n': 4" in said and "difference" in said


def test_the_page_on_data_sets(tmp_path, capsys):
    """Each record that it prints is a whole file, which the command that it prints reads as the page says."""
    text = (ROOT / "docs/adding_a_data_set.md").read_text(encoding="utf-8")
    records = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    assert len(records) == 2
    for number, record in enumerate(records):
        path = tmp_path / f"mydata{number}.jsonl"
        path.write_text(record, encoding="utf-8")
        assert main(["data", "check", str(path)]) == 0
        assert f"mydata{number}.jsonl: CRE, 1 records, 1 questions" in capsys.readouterr().out


@pytest.mark.parametrize("make", [make_cli_page, make_settings_page])
def test_the_pages_that_are_made_tell_every_option_and_field(make):
    page = make()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 60 and all(line.count(" | ") == 2 for line in rows), "a stroke in a text would add a column"
    untold = [line for line in rows if line.split(" | ")[1].strip() in ("", "–")]
    assert not untold


@pytest.mark.slow
def test_the_page_on_methods(tmp_path):
    method, *rest = python_of("docs/adding_a_method.md")
    (tmp_path / "my_method.py").write_text(method, encoding="utf-8")
    assert re.search(r"fact written [45] of 5, consequence follows \d of 5", run_python("\n".join(rest), tmp_path))
