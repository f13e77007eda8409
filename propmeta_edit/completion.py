"""What a shell needs to complete the verbs of ``propmeta-edit`` and their options."""

from __future__ import annotations

import argparse
from typing import Literal

import docstring_parser

from propmeta_edit.cli import PROGRAM, VERBS, make_parser


def completion(shell: Literal["bash", "zsh", "tcsh"] = "bash") -> None:
    """Print what makes a shell complete verbs and options: source <(propmeta-edit completion bash), or once into its folder.

    Args:
        shell: bash, zsh or tcsh.
    """
    import shtab

    print(shtab.complete(_make_tree(), shell))


def _make_tree() -> argparse.ArgumentParser:
    """All verbs as subcommands, those of two words below their first; options are spelt with hyphens, as people type them."""
    root = argparse.ArgumentParser(prog=PROGRAM)
    verbs = root.add_subparsers()
    groups: dict[str, argparse._SubParsersAction[argparse.ArgumentParser]] = {}
    for name, verb in VERBS.items():
        first, _, second = name.partition(" ")
        if second and first not in groups:
            groups[first] = verbs.add_parser(first, help=first).add_subparsers()
        about = str(docstring_parser.parse(verb.read_docstring()).short_description)
        parser = (groups[first] if second else verbs).add_parser(second or first, help=about)
        for action in make_parser(name, verb.load(), verb.positional)._actions:
            for option in action.option_strings:
                if option.startswith("--") and option != "--help":
                    parser.add_argument(option.replace("_", "-"), help=str(action.help).partition("\n")[0])
    return root
