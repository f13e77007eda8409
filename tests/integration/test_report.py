"""The report: one page that needs nothing else, whatever a model said."""

from __future__ import annotations

import html.parser
import json

import report

from propmeta_edit.evaluation.comparisons import write_comparisons
from propmeta_edit.evaluation.rows import Row
from propmeta_edit.evaluation.runner import MethodSpec
from propmeta_edit.evaluation.tables import summarise, write_settings, write_tables

COMMON = {"model": "m", "model_sha256": "a" * 64, "data_sha256": "b" * 64, "hparams_sha256": "c" * 64, "seed": 0}


def make_results(folder):
    rows = [
        Row(
            method,
            "cre-id",
            str(n),
            question="What?",
            answers=("sol",),
            generated=said,
            correct=n % 2 == 0,
            efficacy=True,
            **COMMON,
        )
        for method, said in (("FT", "<script>alert(1)</script>"), ("MetaFT", " the sol | or so"))
        for n in range(6)
    ]
    write_tables(summarise(rows), folder)
    write_comparisons(rows, folder, ("FT",))


class Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]


def test_a_page_with_tables_pictures_and_origins(tmp_path):
    make_results(tmp_path / "table2")
    (tmp_path / "speed").mkdir()
    speed = {"what": "meta", "device": "2 CPU threads", "torch": "2", "engine_vs_reference": 3.14159, "rows": []}
    (tmp_path / "speed" / "speed.json").write_text(json.dumps(speed))
    (tmp_path / "speed" / "speed.csv").write_text("side,seconds a task\nengine,0.123456\n")
    output = tmp_path / "report"
    assert report.main([str(tmp_path / "table2"), str(tmp_path / "speed"), "--output", str(output)]) == 0
    page, markdown = (output / "report.html").read_text(), (output / "report.md").read_text()
    reader = Reader()
    reader.feed(page)
    assert "script" not in reader.tags and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert all(link.startswith(("data:image/png;base64,", "#part-")) for link in reader.links), "nothing is fetched"
    assert reader.tags.count("img") == 1 and reader.tags.count("table") >= 5
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    for text in (page, markdown):
        assert "50.0 [18.8, 81.2]" in text and "engine_vs_reference: 3.14" in text and "0.1235" in text and "aaaaaaaa" in text
    assert (output / "0-accuracy-cre-id.png").read_bytes()[:4] == b"\x89PNG"
    assert "![table2: accuracy-cre-id](0-accuracy-cre-id.png)" in markdown
    assert "- seed: 0" in markdown and "### Against FT, paired" in markdown, (
        "what is common is said once; no heading beside the parts"
    )


def test_settings_are_readable_and_said_once(tmp_path):
    make_results(tmp_path / "table2")
    common = {"device": "cpu", "loss_reduction": "mean"}
    specs = [
        MethodSpec(name, "m", "a" * 64, digit * 64, build=None, settings={**common, "lr": rate, "layers": [8]})
        for name, digit, rate in (("FT", "c", 0.002), ("MetaFT", "d", 0.001))
    ]
    write_settings(specs[:1], tmp_path / "table2")
    write_settings(specs[1:], tmp_path / "table2")
    assert report.main([str(tmp_path / "table2"), "--output", str(tmp_path / "out")]) == 0
    markdown = (tmp_path / "out" / "report.md").read_text()
    assert 'All: `device: "cpu"`, `loss_reduction: "mean"`, `layers: [8]`' in markdown
    assert (
        '- FT: `hparams_sha256: "cccccccc"`, `lr: 0.002`' in markdown
        and '- MetaFT: `hparams_sha256: "dddddddd"`, `lr: 0.001`' in markdown
    )
    assert "<code>lr: 0.002</code>" in (tmp_path / "out" / "report.html").read_text()


def test_every_method_has_examples_beside_the_unedited_answer(tmp_path):
    make_results(tmp_path / "table2")
    page = report.read_folder(tmp_path / "table2")[0]
    assert "| question | expected | FT | unedited |" in page and "| question | expected | MetaFT | unedited |" in page


def test_the_same_numbers_are_not_shown_twice(tmp_path):
    (tmp_path / "speed").mkdir()
    (tmp_path / "speed" / "speed.csv").write_text("side,seconds\nengine,0.123456\n")
    assert "### speed" in report.read_folder(tmp_path / "speed")[0]
    (tmp_path / "speed" / "speed.md").write_text("| side | seconds |\n|---|---|\n| engine | 0.12 |\n")
    text = report.read_folder(tmp_path / "speed")[0]
    assert "0.12 |" in text and "0.1235" not in text


def test_folders_without_results(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for folder, message in ((tmp_path / "empty", "holds nothing"), (tmp_path / "none", "is no folder")):
        assert report.main([str(folder), "--output", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
