"""One HTML page that needs no other file, and the same as Markdown, of what studies left in folders."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from collections.abc import Mapping, Sequence
from html import unescape
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment
from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from propmeta_edit.errors import DataError
from propmeta_edit.evaluation.comparisons import describe_examples
from propmeta_edit.evaluation.measures import MEASURES
from propmeta_edit.evaluation.rows import read_rows
from propmeta_edit.evaluation.tables import SETTINGS_FILE, frame_to_markdown
from propmeta_edit.files import shortest_names, write_text_atomically

SUMMARIES = ("table.json", "summary*.json")  # of a comparison, of sweeps
CHAINS = "dependent"  # the table of chains of edits; each chain has a file of its own beside it
# Of a study's summary, the measures that its own table has no room for.
OUTCOMES = {measure.title: measure.column for measure in MEASURES if not measure.has_interval}
ROWS, COMPARISONS, SPEED = "rows.jsonl", "comparisons.md", "speed.json"
HTML, MARKDOWN = "report.html", "report.md"
SHORT = 24  # characters of a table's cell that stay on one line
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --line: #d0d0d0; --soft: #f3f4f6; --text: #1a1a1a; --back: #fff; --link: #0b57d0; }
@media (prefers-color-scheme: dark) {
  :root { --line: #444; --soft: #242424; --text: #e6e6e6; --back: #151515; --link: #8ab4f8; }
  img { filter: invert(.918) hue-rotate(180deg); }
}
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 0 auto; padding: 1rem; overflow-wrap: break-word; }
body { color: var(--text); background: var(--back); }
a { color: var(--link); }
h1, h2, h3, h4 { line-height: 1.2; margin: 2rem 0 .6rem; }
h1 { margin-top: .5rem; }
h2 { border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
p, ul { max-width: 68rem; }
ul { padding-left: 1.2rem; }
nav a { margin-right: 1rem; }
.wide { overflow: auto; width: fit-content; max-width: 100%; max-height: 44rem; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: left; vertical-align: top; }
td { min-width: 2rem; }
td.short { white-space: nowrap; }
td.long { min-width: 12rem; }
th { background: var(--soft); position: sticky; top: 0; z-index: 1; vertical-align: bottom; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; flex: 0 1 auto; min-width: 0; }
figcaption { font-size: .85rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
code { background: var(--soft); padding: 0 .2rem; overflow-wrap: anywhere; }
@media (max-width: 40rem) { th:first-child, td:first-child { position: sticky; left: 0; background: var(--back); } }
@media (max-width: 40rem) { th:first-child { z-index: 2; background: var(--soft); } td.long { min-width: 9rem; } }
@media print { .wide { max-height: none; overflow: visible; } }
</style></head><body>
<h1>{{ title }}</h1>
<nav>{% for part in parts %}<a href="#{{ part.anchor }}">{{ part.name }}</a>{% endfor %}</nav>
{% for part in parts %}<section id="{{ part.anchor }}"><h2>{{ part.name }}</h2>
<div class="pictures">{% for picture in part.pictures %}
<figure><img alt="{{ picture.alt }}" src="data:image/png;base64,{{ picture.data }}">
<figcaption>{{ picture.alt }}</figcaption></figure>{% endfor %}</div>
{{ part.body | safe }}</section>
{% endfor %}</body></html>
"""


def choose_folders(folders: Sequence[Path], output: Path) -> list[Path]:
    """The folders, each once and in full; those of reports are left out, since a report is no result.

    Raises:
        DataError: none is left.
    """
    chosen = []
    for folder in dict.fromkeys(folder.resolve() for folder in folders):
        if folder == output.resolve() or (folder / HTML).is_file():
            print(f"left out: {folder} is the folder of a report", file=sys.stderr)
        else:
            chosen.append(folder)
    if not chosen:
        raise DataError("nothing is left to report on; name folders of results, and choose another --output than they are")
    return chosen


def read_folder(folder: Path) -> tuple[str, dict[str, bytes]]:
    """A folder's results as Markdown, and its pictures as PNG by name.

    Raises:
        DataError: no folder, or nothing in it that a benchmark writes.
    """
    if not folder.is_dir():
        raise DataError("is no folder; name the --output of a study, such as results/table2", folder)
    texts = [_describe_speed(folder)] if (folder / SPEED).is_file() else []
    texts += [_below_a_part(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.md"), key=_tables_first)]
    pictures = {path.stem: path.read_bytes() for path in sorted(folder.glob("*.png"))}
    summaries = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for pattern in SUMMARIES for path in sorted(folder.glob(pattern))
    }
    for stem, summary in summaries.items():
        pictures = pictures or draw_accuracies(summary)  # the sweeps have drawn the same
        if stem != "table":
            texts.append(f"### {stem}: further outcomes and costs\n\n{describe_outcomes(summary)}")
        texts.append(describe_origin(summary))
    if (folder / ROWS).is_file() and not (folder / COMPARISONS).is_file():  # those of a comparison are on that page
        texts.append(_below_a_part(describe_examples(read_rows(folder / ROWS), 1)))
    if (folder / SETTINGS_FILE).is_file():
        texts.append(describe_settings(json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))))
    texts += [f"### {name}\n\n{table}" for name, table in read_tables(folder).items()]
    if not texts:
        raise DataError(f"holds nothing that a study writes (table.md, {SPEED}, *.csv, ...)", folder)
    return "\n\n".join(texts), pictures


def _describe_speed(folder: Path) -> str:
    speed = json.loads((folder / SPEED).read_text(encoding="utf-8"))
    ratios = "".join(f"- {name}: {value:.2f}\n" for name, value in speed.items() if isinstance(value, float))
    return f"{speed['what']} on {speed['device']}, torch {speed['torch']}\n\n{ratios}"


def read_tables(folder: Path) -> dict[str, str]:
    """The CSV files as Markdown by name, without those whose numbers are shown already, by a page or in the table of all chains."""
    paths = [path for path in sorted(folder.glob("*.csv")) if not path.with_suffix(".md").is_file()]
    tables = {path.stem: frame_to_markdown(pd.read_csv(path), ".4g") for path in paths if not path.stem.startswith("summary")}
    together = set(tables.get(CHAINS, "").splitlines())
    return {name: table for name, table in tables.items() if name == CHAINS or not together.issuperset(table.splitlines())}


def _tables_first(path: Path) -> tuple[bool, str]:
    return path.stem != "table", path.stem


def _below_a_part(text: str) -> str:
    """The text with its headings below the second level, where the page's parts are."""
    return re.sub(r"(?m)^#+(?= )", lambda found: "#" * max(3, len(found[0]) + 1), text)


def draw_accuracies(summary: Sequence[dict[str, Any]]) -> dict[str, bytes]:
    """Accuracy of every row with its 95 % interval, a PNG a data set: a page puts them side by side or below each other."""
    pictures = {}
    for dataset in dict.fromkeys(entry["dataset"] for entry in summary):
        entries = [entry for entry in summary if entry["dataset"] == dataset]
        figure = Figure(figsize=(4, 0.8 + 0.26 * len(entries)), layout="constrained")
        panel = figure.subplots()
        for place, entry in enumerate(entries):
            low, high = entry["accuracy_ci95"]
            panel.plot([100 * low, 100 * high], [place, place], color="0.5")
            panel.plot(100 * entry["accuracy"], place, "o", color="black", markersize=4)
        panel.set(xlim=(0, 100), ylim=(len(entries) - 0.5, -0.5), xlabel=f"accuracy on {dataset}, %")
        panel.set_yticks(range(len(entries)), [entry["method"] for entry in entries])
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=96)
        pictures[f"accuracy-{dataset}"] = buffer.getvalue()
    return pictures


def describe_outcomes(summary: Sequence[dict[str, Any]]) -> str:
    """What a sweep's own table leaves out: the other verdicts, seconds, failures and notes; without columns that no row fills."""
    frame = pd.DataFrame(summary)
    table = frame[["method", "dataset"]].assign(**{title: 100 * frame[name].astype(float) for title, name in OUTCOMES.items()})
    table["s / edit"] = frame["seconds_per_edit"].astype(float).map("{:.2f}".format, na_action="ignore")
    table["cases / s"] = frame["cases_per_second"].astype(float).map("{:.2f}".format, na_action="ignore")
    table["cases at once"] = frame["cases_at_once"].where(frame["cases_per_second"].notna())
    table["once before, s"] = [", ".join(f"{name} {s:.0f}" for name, s in before.items()) for before in frame["precomputation"]]
    table["errors"] = frame["errors"]
    shown = table.replace("", None).dropna(axis="columns", how="all")
    notes = "".join(f"- {entry['method']} on {entry['dataset']}: {note}.\n" for entry in summary for note in entry["notes"])
    return f"{frame_to_markdown(shown)}\n{notes}"


def describe_origin(summary: Sequence[dict[str, Any]]) -> str:
    """Models, data, settings and versions that the rows came from; what is the same for all of them is said once."""
    frame = pd.DataFrame(summary)
    hashes = {"model_sha256": 8, "data_sha256": 8, "hparams_sha256": 8}
    for name, length in hashes.items():
        frame[name] = frame[name].str[:length]
    frame["versions"] = [", ".join(f"{name} {version}" for name, version in row.items()) for row in frame["versions"]]
    common = [name for name in ("seed", "protocol", "device", "dtype", "versions") if frame[name].nunique() == 1]
    others = [name for name in ("seed", "protocol", "device", "dtype", "versions") if name not in common]
    lines = "".join(f"- {name}: {frame[name].iloc[0]}\n" for name in common)
    table = frame_to_markdown(frame[["method", "dataset", "model", *hashes, *others]])
    return f"### Where the rows come from\n\n{lines}\n{table}"


def describe_settings(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """The settings by method, from ``settings.json``; what all methods share is said once."""
    values = {method: {"hparams_sha256": entry["hparams_sha256"][:8], **entry["settings"]} for method, entry in settings.items()}
    first = next(iter(values.values()), {})
    common = {key: value for key, value in first.items() if all(key in own and own[key] == value for own in values.values())}
    lines = [f"- {method}: {_list_settings({k: v for k, v in own.items() if k not in common})}" for method, own in values.items()]
    shared = f"All: {_list_settings(common)}\n\n" if common else ""
    return f"### Settings\n\n{shared}" + "\n".join(lines) + "\n"


def _list_settings(settings: Mapping[str, Any]) -> str:
    """As spans of code, since names hold underscores, which no value can end."""
    texts = [f"{key}: {json.dumps(value, ensure_ascii=False)}".replace("`", "'") for key, value in settings.items()]
    return ", ".join(f"`{text}`" for text in texts) or "–"


def fit_tables(page: str) -> str:
    """Tables that scroll by themselves on a narrow screen, with cells that are told by their length."""
    page = page.replace("<table>", '<div class="wide" tabindex="0"><table>').replace("</table>", "</table></div>")

    def tell_length(found: re.Match[str]) -> str:
        length = len(unescape(found[1]))
        return f'<td class="{"short" if length <= SHORT else "long"}">{found[1]}</td>'

    return re.sub(r"<td>(.*?)</td>", tell_length, page, flags=re.DOTALL)


def remove_pictures(folder: Path) -> None:
    """Remove the pictures of the report that is in the folder, which its Markdown names on lines of their own."""
    page = folder / MARKDOWN
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    for name in re.findall(r"(?m)^!\[.*\]\((\d+-[^/\n]+\.png)\)$", text):
        (folder / name).unlink(missing_ok=True)


def report(folders: Sequence[str], title: str = "propmeta-edit: results", output: str = "results/report") -> None:
    """Put what other studies left in folders on one HTML page, which needs no other file, and the same in Markdown.

    Args:
        folders: what the others were given as --output; folders of reports are left out.
        title: of the page.
        output: folder for report.html and report.md.
    """
    to_html = MarkdownIt("commonmark", {"html": False}).enable("table")  # a model's answers must stay text
    chosen = choose_folders([Path(folder) for folder in folders], Path(output))
    titles = shortest_names(chosen)
    found = {name: read_folder(folder) for name, folder in zip(titles, chosen, strict=True)}  # all before anything is written
    folder = Path(output)
    remove_pictures(folder)
    sections, markdown = [], [f"# {title}", ""]
    for number, (name, (text, pictures)) in enumerate(found.items()):
        body = fit_tables(to_html.render(text))
        shown = [{"alt": f"{name}: {what}", "data": base64.b64encode(data).decode()} for what, data in pictures.items()]
        sections.append({"name": name, "anchor": f"part-{number}", "body": body, "pictures": shown})
        markdown += [f"## {name}", ""]
        for what, data in pictures.items():
            file = folder / f"{number}-{what}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            markdown += [f"![{name}: {what}]({file.name})", ""]
        markdown += [text, ""]
    page = Environment(autoescape=True).from_string(PAGE).render(title=title, parts=sections)
    write_text_atomically(folder / HTML, page)
    write_text_atomically(folder / MARKDOWN, "\n".join(markdown))
    print(f"wrote {folder / HTML}")
