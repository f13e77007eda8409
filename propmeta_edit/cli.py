"""The ``propmeta-edit`` command: each verb is a function, its options that function's parameters, its help their docstring."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import io
import json
import logging
import os
import pkgutil
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import docstring_parser
from jsonargparse import ArgumentError, ArgumentParser

import propmeta_edit
from propmeta_edit.config import read_yaml, without_retired
from propmeta_edit.errors import ConfigError, DataError, PropMetaError, did_you_mean
from propmeta_edit.settings import find_settings

PROGRAM, PACKAGE = "propmeta-edit", "propmeta_edit"


@dataclasses.dataclass(frozen=True)
class Verb:
    """A function as a verb.

    Args:
        function: ``module:name``; imported when the verb is called, or asked for help.
        positional: those of its parameters that are given without a name; one with a default may be left out, and one of several
            texts takes all that follow.
    """

    function: str
    positional: tuple[str, ...] = ()

    def load(self) -> Callable[..., int | None]:
        module, name = self.function.split(":")
        found: Callable[..., int | None] = getattr(importlib.import_module(module), name)
        return found

    def read_docstring(self) -> str:
        """The function's, from the source of its module: importing those of all verbs would take seconds."""
        module, name = self.function.split(":")
        source = pkgutil.get_data(PACKAGE, module.removeprefix(f"{PACKAGE}.").replace(".", "/") + ".py")
        [function] = [node for node in ast.parse(source or b"").body if isinstance(node, ast.FunctionDef) and node.name == name]
        return ast.get_docstring(function) or ""


_COMMANDS, _STUDIES = "propmeta_edit.commands", "propmeta_edit.studies"
VERBS = {
    "prepare": Verb(f"{_COMMANDS}:prepare", ("names",)),
    "edit": Verb(f"{_COMMANDS}:edit", ("prompt", "target")),
    "ask": Verb(f"{_COMMANDS}:ask", ("questions",)),
    "demo": Verb(f"{_STUDIES}.demo:demo"),
    "meta-train": Verb(f"{_COMMANDS}:meta_train"),
    "choose-rate": Verb(f"{_COMMANDS}:choose_rate"),
    "choose-layer": Verb(f"{_STUDIES}.layer_choice:choose_layer"),
    "table1": Verb(f"{_STUDIES}.table1:table1"),
    "table2": Verb(f"{_STUDIES}.table2:table2"),
    "figure2": Verb(f"{_STUDIES}.figures:figure2"),
    "figure3": Verb(f"{_STUDIES}.figures:figure3"),
    "figure4": Verb(f"{_STUDIES}.figures:figure4"),
    "search": Verb(f"{_STUDIES}.search:search", ("method", "settings")),
    "dependent": Verb(f"{_STUDIES}.dependent:dependent"),
    "ability": Verb(f"{_STUDIES}.ability:ability", ("model",)),
    "analysis": Verb(f"{_STUDIES}.analysis:analysis"),
    "trace": Verb(f"{_STUDIES}.trace:trace", ("prompt", "target")),
    "convergence": Verb(f"{_STUDIES}.convergence:convergence"),
    "report": Verb(f"{_STUDIES}.report:report", ("folders",)),
    "speed edit": Verb("propmeta_edit.speed.run:speed_edit"),
    "speed meta": Verb("propmeta_edit.speed.run:speed_meta"),
    "speed ask": Verb("propmeta_edit.speed.run:speed_ask"),
    "data check": Verb(f"{_COMMANDS}:check_data", ("path",)),
    "statistics": Verb(f"{_COMMANDS}:statistics", ("model",)),
    "teach": Verb(f"{_COMMANDS}:teach", ("model",)),
    "rebuild": Verb(f"{_COMMANDS}:rebuild", ("name",)),
    "completion": Verb("propmeta_edit.completion:completion", ("shell",)),
    "export": Verb(f"{_COMMANDS}:export", ("checkpoint",)),
    "push": Verb(f"{_COMMANDS}:push", ("folder", "name")),
    "expand": Verb(f"{_COMMANDS}:expand", ("compact",)),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``propmeta-edit``; returns the exit code: 0, 1 if some cases failed, 2 for what the user can mend."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a letter that a terminal does not know is no reason to stop
    arguments = _set_loudness(list(sys.argv[1:] if argv is None else argv))
    if not arguments or arguments[0] in ("-h", "--help"):
        print(describe_verbs())
        return 0
    if arguments[0] == "--version":
        print(f"{PROGRAM} {propmeta_edit.__version__}")
        return 0
    try:
        function, values = read_arguments(arguments)
        return int(bool(function(**values)))
    except SystemExit as end:  # after help, or the configuration, was printed
        return int(end.code or 0)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from what was saved", file=sys.stderr)
        return 130
    except (PropMetaError, OSError) as error:
        print(f"error: {error}{_look_at(error, arguments)}", file=sys.stderr)
    except ImportError as error:
        print(f'error: {error}; install what this needs with: pip install "propmeta-edit[bench]"', file=sys.stderr)
    return 2


def _look_at(error: Exception, arguments: Sequence[str]) -> str:
    """Behind a complaint about a data file, the command that says what the file is."""
    if not isinstance(error, DataError) or error.path is None or not Path(error.path).is_file() or arguments[:1] == ["data"]:
        return ""
    return f"; what it is: {PROGRAM} data check {shlex.quote(str(error.path))}"


def _set_loudness(arguments: list[str]) -> list[str]:
    """Heed ``--quiet`` (no progress, no log but warnings) and ``--verbose``, wherever they stand; the rest is given back."""
    is_quiet, is_verbose = "--quiet" in arguments, "--verbose" in arguments
    handler = logging.StreamHandler()  # its level, since a run lowers that of the package for the run's own log file
    handler.setLevel(logging.WARNING if is_quiet else logging.NOTSET)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    if is_verbose:
        logging.getLogger(PACKAGE).setLevel(logging.DEBUG)
    if is_quiet:
        os.environ["TQDM_DISABLE"] = "1"
    if is_quiet or not sys.stderr.isatty():  # of transformers, for every file that it reads or writes
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_MININTERVAL", "60")  # of all other bars than ours, which do so by themselves
    return [argument for argument in arguments if argument not in ("--quiet", "--verbose")]


def describe_verbs() -> str:
    """What ``propmeta-edit --help`` prints: the first sentence of every verb's docstring."""
    lines = [
        f"usage: {PROGRAM} VERB ...     ({PROGRAM} VERB --help says what it takes; {PROGRAM} --version)",
        "       --quiet anywhere for warnings and results alone, --verbose for more",
        "",
    ]
    for name, verb in VERBS.items():
        lines.append(f"  {name:<14}{docstring_parser.parse(verb.read_docstring()).short_description}")
    return "\n".join(lines)


def read_arguments(arguments: Sequence[str]) -> tuple[Callable[..., int | None], dict[str, Any]]:
    """The function that a command line names, and what it is to be called with.

    Raises:
        ConfigError: an unknown verb, or an option that is unknown, missing or of another type.
    """
    name = next((name for name in VERBS if arguments[: len(name.split())] == name.split()), None)
    if name is None:
        alike = [verb for verb in VERBS if verb.split()[0] == arguments[0]]  # its second word is missing, or unknown
        named, known = " ".join(arguments[: 1 + bool(alike)]), alike or list(VERBS)
        near = "" if alike and len(arguments) == 1 else did_you_mean(named, known)
        raise ConfigError(f"unknown verb {named!r}; there are {', '.join(known)}{near}")
    verb, given = VERBS[name], list(arguments[len(name.split()) :])
    function = verb.load()
    parser = make_parser(f"{PROGRAM} {name}", function, verb.positional)
    given = normalise(given, {option: action for action in parser._actions for option in action.option_strings})
    given = [_found_config(argument, function) for argument in given]
    try:
        found = parser.parse_args(given)
    except ArgumentError as error:
        near = _nearest_option(str(error), [option for action in parser._actions for option in action.option_strings])
        raise ConfigError(f"{_readable(str(error))}{near} ({PROGRAM} {name} --help)") from error
    return function, _values_of(function, found)


def _nearest_option(message: str, known: Sequence[str]) -> str:
    """For a name that a parser does not know, on the command line or in a file of settings."""
    found = re.search(r"unrecognized arguments: .*?(--[^\s=]+)|Option '([\w.-]+)' is not accepted", message)
    if found is None:
        return ""
    given = (found[1] or f"--{found[2]}").replace("-", "_").replace("__", "--", 1)
    near = did_you_mean(given, [option for option in known if option.startswith("--")])
    return near if found[1] else near.replace("--", "")


def _found_config(argument: str, function: Callable[..., Any]) -> str:
    """``--config=`` with the path of its file, which may be one that comes with the package; broken YAML is named with its line.

    In place of a file that names retired settings of the function's the others stand, as JSON.
    """
    option, _, file = argument.partition("=")
    if option != "--config":
        return argument
    path = find_settings("MetaTrain", file)
    values = kept = read_yaml(path)
    for kind in get_type_hints(function).values():
        kept = without_retired(kind, kept, str(path))
    return f"{option}={path if kept == values else json.dumps(kept)}"


def make_parser(program: str, function: Callable[..., Any], positional: Sequence[str] = ()) -> ArgumentParser:
    """The options of a function. Parameters that are dataclasses stand for their fields; texts of which there may be several are
    given one by one."""
    documented = docstring_parser.parse(inspect.getdoc(function) or "")
    about = [documented.short_description, documented.long_description]
    parser = ArgumentParser(prog=program, description="\n\n".join(filter(None, about)), exit_on_error=False)
    parser.add_argument(
        "--config",
        action="config",
        help="a YAML file of settings, or a name in hparams/MetaTrain; what is given beside it wins",
    )
    helps = {parameter.arg_name: parameter.description for parameter in documented.params}
    types, own = get_type_hints(function), set()
    for name, parameter in inspect.signature(function).parameters.items():
        is_required, is_list = parameter.default is parameter.empty, types[name] == Sequence[str]
        if dataclasses.is_dataclass(types[name]):
            parser.add_class_arguments(types[name])
        elif name in positional:
            nargs = {"nargs": "+" if is_required else "*"} if is_list else {} if is_required else {"nargs": "?"}
            parser.add_argument(name, type=str if is_list else types[name], help=helps.get(name), **nargs)
        elif is_list:
            parser.add_argument(f"--{name}", type=str, action="append", required=is_required, help=helps.get(name))
        else:
            continue
        own.add(name)
    parser.add_function_arguments(function, skip=own, as_positional=False, fail_untyped=True)
    return parser


def normalise(arguments: Sequence[str], actions: dict[str, Any]) -> list[str]:
    """What has no name first, then the options, each with its value.

    ``--num-tasks`` is ``--num_tasks``, a switch needs no value (``--plan`` is ``--plan=true``), and the two kinds may be mixed.

    Args:
        actions: of the parser, by option.
    """
    unnamed: list[str] = []
    named: list[str] = []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        option, equals, value = argument.partition("=")
        if option.startswith("--") and option not in actions:
            option = "--" + option[2:].replace("-", "_")
        if option not in actions:
            (named if argument.startswith("--") else unnamed).append(argument)
            continue
        if not equals and _stands_alone(actions[option], left):
            named.append(f"{option}=true")
        elif not equals and actions[option].nargs is None and left:
            named.append(f"{option}={left.pop(0)}")
        else:
            named.append(f"{option}{equals}{value}")
    return [*unnamed, *named]


def _stands_alone(action: Any, following: Sequence[str]) -> bool:
    """Whether an option is a switch, or one that may be, and is given without a value."""
    kind = getattr(action, "_typehint", None)
    kinds = get_args(kind) or (kind,)
    if bool not in kinds:
        return False
    return not following or following[0].startswith("--") or (kinds == (bool,) and following[0] not in ("true", "false"))


def _values_of(function: Callable[..., Any], found: Any) -> dict[str, Any]:
    """Parameters by name; what was not given is left to the function's own defaults."""
    values: dict[str, Any] = {}
    for name, kind in get_type_hints(function).items():
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            values[name] = kind(**{field.name: found[field.name] for field in dataclasses.fields(kind)})
        elif name != "return" and found[name] is not None and not (kind == Sequence[str] and not found[name]):
            values[name] = found[name]
    return values


def _readable(message: str) -> str:
    """A parser's message as one line: the option, what it takes, and what it got."""
    found = re.search(r"Errors:\n(?P<errors>(?:\s+- .*\n)+)\s*Given value type: .*\n\s*Given value: (?P<value>.*)", message)
    if found:  # of an option that takes one of several types
        wanted = [line.strip(" -") for line in found["errors"].splitlines() if "NoneType" not in line]
        message = f"{message.partition(':')[0]}: {' or '.join(wanted)}" + (
            "" if "got " in wanted[0] else f", got {found['value']!r}"
        )
    message = re.sub(r'Parser key "([\w.]+)":\s*', lambda match: f"--{match[1].replace('_', '-')}: ", message)
    return re.sub(r"\s+", " ", re.sub(r"Not of type \w+: |<class '(\w+)'>", r"\1", message)).strip()


if __name__ == "__main__":
    sys.exit(main())
