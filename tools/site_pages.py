"""Pages of the site that are made from the code when it is built: the command line, and every setting.

A hook of mkdocs; ``make docs`` calls it.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import docstring_parser
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from propmeta_edit.cli import PROGRAM, VERBS, Verb, make_parser
from propmeta_edit.easyedit.alphaedit import AlphaEditHyperParams
from propmeta_edit.easyedit.cake import CaKEHyperParams
from propmeta_edit.easyedit.hparams import MetaFTHyperParams
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.recipes.teaching import TeachingSettings

SETTINGS = (MetaTrainConfig, MetaFTHyperParams, EditSettings, TeachingSettings, CaKEHyperParams, AlphaEditHyperParams)
CLI, ALL_SETTINGS = "reference/cli.md", "reference/settings.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages to those that stand in the folder."""
    for path, make in ((CLI, make_cli_page), (ALL_SETTINGS, make_settings_page)):
        files.append(File.generated(config, path, content=make()))
    return files


def make_cli_page() -> str:
    """A section a verb: what it does, and a line an option."""
    lines = [
        "# Command line",
        "",
        f"`{PROGRAM} VERB --help` prints the same. Options are written `--num-tasks` or `--num_tasks`; a switch needs no value;",
        "`--config FILE` takes settings from YAML, and what is given beside it wins. `--quiet` and `--verbose` go anywhere.",
        "",
    ]
    for name, verb in VERBS.items():
        lines += [f"## {name}", "", *_describe_verb(name, verb), ""]
    return "\n".join(lines)


def _describe_verb(name: str, verb: Verb) -> Iterator[str]:
    parser = make_parser(f"{PROGRAM} {name}", verb.load(), verb.positional)
    yield str(parser.description or "")
    yield from ("", "| option | what it is | default |", "|---|---|---|")
    for action in parser._actions:
        if action.dest in ("help", "config") or action.dest.startswith("print_"):
            continue
        option = action.option_strings[0].replace("_", "-") if action.option_strings else action.dest.upper()
        yield f"| `{option}` | {_in_a_cell(action.help)} | {_default(action.default)} |"


def make_settings_page() -> str:
    """A section a class of settings, a line a field."""
    lines = ["# Settings", "", "The fields of the YAML files in `hparams/`, and of the classes that Python takes.", ""]
    for kind in SETTINGS:
        documented = docstring_parser.parse(inspect.getdoc(kind) or "")
        helps = {name.strip(): one.description for one in documented.params for name in one.arg_name.split(",")}
        lines += [
            f"## {kind.__name__}",
            "",
            documented.short_description or "",
            "",
            "| field | what it is | default |",
            "|---|---|---|",
        ]
        for field in dataclasses.fields(kind):
            lines.append(f"| `{field.name}` | {_in_a_cell(helps.get(field.name))} | {_default(_default_of(field))} |")
        lines.append("")
    return "\n".join(lines)


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _default(value: Any) -> str:
    if value is dataclasses.MISSING or str(value) == "==SUPPRESS==":
        return "(required)"
    return f"`{value}`" if value is not None else "–"


def _in_a_cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")
