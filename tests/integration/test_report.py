"""The report: one page that needs nothing else, whatever a model said."""

from __future__ import annotations

import html.parser
import json
from dataclasses import asdict

from propmeta_edit.cli import main
from propmeta_edit.evaluation.comparisons import write_comparisons
from propmeta_edit.evaluation.rows import Row
from propmeta_edit.evaluation.runner import MethodSpec
from propmeta_edit.evaluation.tables import summarise, write_settings, write_tables
from propmeta_edit.studies import report

COMMON = {
    "model": "m",
    "model_sha256": "a" * 64,
    "base_sha256": "a" * 64,
    "data_sha256": "b" * 64,
    "hparams_sha256": "c" * 64,
    "seed": 0,
}


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
    assert main(["report", str(tmp_path / "table2"), str(tmp_path / "speed"), "--output", str(output)]) == 0
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
    assert main(["report", str(tmp_path / "table2"), "--output", str(tmp_path / "out")]) == 0
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
        assert main(["report", str(folder), "--output", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err


def make_speed(folder):
    folder.mkdir(parents=True)
    (folder / "speed.csv").write_text("side,seconds\nengine,0.123456\n")
    return str(folder)


def test_a_report_is_no_part_of_the_next_one(tmp_path, capsys):
    make_results(tmp_path / "results" / "table2")
    make_speed(tmp_path / "results" / "speed")
    output = tmp_path / "results" / "report"
    first = ["--output", str(output), str(tmp_path / "results" / "speed"), str(tmp_path / "results" / "table2")]
    assert main(["report", *first]) == 0
    page, pictures = (output / "report.html").read_text(), sorted(output.glob("*.png"))
    assert [path.name for path in pictures] == ["1-accuracy-cre-id.png"]
    (output / "7-mine.png").write_bytes(b"of somebody else")
    everything = [str(path) for path in sorted((tmp_path / "results").iterdir())]
    assert len(everything) == 3 and main(["report", *everything[1:], everything[0], "--output", str(output)]) == 0
    assert f"left out: {everything[0]} is the folder of a report" in capsys.readouterr().err
    assert (output / "report.html").read_text() == page and sorted(output.glob("[01]*.png")) == pictures
    assert main(["report", everything[2], "--output", str(output)]) == 0
    assert sorted(path.name for path in output.glob("*.png")) == ["0-accuracy-cre-id.png", "7-mine.png"], "its own alone are gone"
    assert main(["report", everything[0], "--output", str(tmp_path / "other")]) == 2
    assert "nothing is left to report on" in capsys.readouterr().err and not (tmp_path / "other").exists()
    assert main(["report", everything[1], "--output", everything[1]]) == 2, "results and report in one folder would be mixed up"
    assert "choose another --output" in capsys.readouterr().err


def test_sections_have_names_of_their_own(tmp_path, monkeypatch):
    folders = [make_speed(tmp_path / name) for name in ("one/speed", "two/speed", "alone")]
    assert main(["report", *folders, folders[0] + "/.", "--output", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    names = ["one/speed", "two/speed", "alone"]
    assert [page.count(f">{name}</a>") for name in names] == [page.count(f"<h2>{name}</h2>") for name in names] == [1, 1, 1]
    monkeypatch.chdir(tmp_path / "alone")
    assert main(["report", ".", "--output", str(tmp_path / "out")]) == 0
    assert "\n## alone\n" in (tmp_path / "out" / "report.md").read_text()


def test_a_sweep_shows_what_its_own_table_leaves_out(tmp_path):
    rows = [
        Row(
            "m layer 8",
            "valid-ood",
            str(n),
            correct=n < 2,
            correct_word_boundary=n < 1,
            efficacy=True,
            second_hop_correct=n < 3,
            neighbour_unchanged=n < 2,
            seconds_per_edit=1.25,
            error="Traceback" if n == 3 else None,
            note="out of memory with 8 cases at once",
            precomputation={"meta-training": 263.2},
            **COMMON,
        )
        for n in range(4)
    ]
    (tmp_path / "figure2.md").write_text("| series | layer | accuracy |\n|---|---|---|\n| m | 8 | 50.0 |\n")
    (tmp_path / "summary-figure2.json").write_text(json.dumps([{**entry, "split": "validation"} for entry in summarise(rows)]))
    (tmp_path / "summary-figure2.csv").write_text("method,accuracy\nm layer 8,0.5\n")
    text = report.read_folder(tmp_path)[0]
    header = "| method | dataset | at word boundary % | second hop % | neighbour same % | s / edit | once before, s | errors |"
    assert f"### summary-figure2: further outcomes and costs\n\n{header}" in text
    assert "| m layer 8 | valid-ood | 25.0 | 75.0 | 50.0 | 1.25 | meta-training 263 | 1 |" in text
    assert "- m layer 8 on valid-ood: out of memory with 8 cases at once." in text
    assert "| m layer 8 | 0.5 |" not in text and text.count("### ") == 2
    half = json.dumps({"method": "m layer 8"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows) + half)
    text = report.read_folder(tmp_path)[0]
    assert "### m layer 8 right on valid-ood" in text and "### m layer 8 wrong on valid-ood" in text
    assert (tmp_path / "rows.jsonl").read_text().endswith(half), "another process may be writing it"


def test_chains_are_shown_once(tmp_path):
    header = "method,mode,facts,efficacy\n"
    chains = {
        "FT-joint-0a": "FT,joint,1,0.123456\n",
        "FT-sequential-0a": "FT,sequential,1,1.0\n",
        "FT-joint-0b": "FT,joint,9,1.0\n",
    }
    for name, lines in chains.items():
        (tmp_path / f"{name}.csv").write_text(header + lines)
    assert report.read_folder(tmp_path)[0].count("### ") == 3
    (tmp_path / "dependent.csv").write_text(header + chains["FT-joint-0a"] + chains["FT-sequential-0a"])
    text = report.read_folder(tmp_path)[0]
    assert text.count("0.1235") == 1 and text.count("### ") == 2, "of other settings: not among those of the last command"
    assert "### dependent" in text and "### FT-joint-0b" in text
