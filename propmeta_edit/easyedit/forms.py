"""Which form of EasyEdit is at hand, what it can do, and a way to import it that explains what is missing."""

from __future__ import annotations

import ast
import importlib
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from propmeta_edit.easyedit.importing import find_easyeditor, install, is_pypi_form
from propmeta_edit.errors import EasyEditError

HOW_TO_GET_IT = (
    'install what EasyEdit needs with `pip install "propmeta-edit[easyedit]"`, and EasyEdit itself with '
    "`pip install --no-deps easyeditor==0.0.1.dev0`, or name a clone of its repository: EASYEDIT_HOME=<clone>"
)
OPTIONAL_FEATURES = ("edit_dataset", "edit_requests", "generate_edit", "requests", "sequential_edit")


@dataclass(frozen=True)
class EasyEditForm:
    """A form of EasyEdit.

    Args:
        kind: ``pypi`` (the wheel 0.0.1.dev0) or ``repository`` (a clone).
        location: the folder of the package ``easyeditor``.
        supports: what of ``OPTIONAL_FEATURES`` its ``BaseEditor`` has when it is imported through ``load_easyedit``: methods by
            name, ``sequential_edit`` of ``edit`` and ``batch_edit``, and ``requests`` of ``edit``.
        algorithms: the names in its own table of text editors.
    """

    kind: Literal["pypi", "repository"]
    location: Path
    supports: frozenset[str]
    algorithms: tuple[str, ...]

    @property
    def version(self) -> str:
        """What to write beside a result: the kind, and the commit of a clone (``repository 14cea82``)."""
        if self.kind == "pypi":
            return "pypi 0.0.1.dev0"
        command = ["git", "-C", str(self.location), "rev-parse", "--show-toplevel", "--short", "HEAD"]
        try:
            top, commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[:2]
        except (OSError, subprocess.CalledProcessError):  # an unpacked archive, or no git
            return "repository"
        # An unpacked archive may lie in a repository of something else.
        return f"repository {commit}" if Path(top).resolve() == self.location.parent.resolve() else "repository"


def find_form() -> EasyEditForm:
    """The form that ``import easyeditor`` would give, read from its files; nothing is imported.

    Raises:
        EasyEditError: there is none, or ``EASYEDIT_HOME`` names a folder without it.
    """
    spec = find_easyeditor()
    if spec is None or not spec.submodule_search_locations:
        raise EasyEditError(f"EasyEdit was not found; {HOW_TO_GET_IT}")
    location = Path(spec.submodule_search_locations[0])
    methods = _methods(location / "editors" / "editor.py", "BaseEditor")
    features = {name for name in OPTIONAL_FEATURES if name in methods}
    pypi = is_pypi_form(location)
    if pypi:
        features |= {"sequential_edit", "requests"}  # wheel_editor.py supplies them
    elif "edit" in methods:
        features |= {"sequential_edit"} & {argument.arg for argument in methods["edit"].args.args}
        features |= {"requests"} if _takes_out(methods["edit"], "requests") else set()
    return EasyEditForm(
        kind="pypi" if pypi else "repository",
        location=location,
        supports=frozenset(features),
        algorithms=_dict_keys(location / "util" / "alg_dict.py", "ALG_DICT"),
    )


def load_easyedit() -> Any:
    """EasyEdit, imported (ten seconds and more the first time) with our algorithms in it.

    Raises:
        EasyEditError: EasyEdit or a package it needs is missing, or its import fails; the message names the fix.
    """
    install()
    try:
        return importlib.import_module("easyeditor")
    except ImportError as error:
        if error.name == "easyeditor":
            raise EasyEditError(f"EasyEdit was not found; {HOW_TO_GET_IT}") from error
        raise EasyEditError(f"EasyEdit does not import: {error}; {HOW_TO_GET_IT}") from error


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise EasyEditError(f"{path} cannot be read ({error}), so this is no usable EasyEdit; {HOW_TO_GET_IT}") from error


def _methods(path: Path, class_name: str) -> dict[str, ast.FunctionDef]:
    classes = [node for node in _parse(path).body if isinstance(node, ast.ClassDef) and node.name == class_name]
    return {item.name: item for node in classes for item in node.body if isinstance(item, ast.FunctionDef)}


def _takes_out(function: ast.FunctionDef, keyword: str) -> bool:
    """Whether a keyword is popped from the function's extra ones: the repository as of 2026-07 reads ``requests`` but leaves it
    there, and so passes it on twice, which Python refuses."""
    calls = (node for node in ast.walk(function) if isinstance(node, ast.Call))
    for call in calls:
        match call:
            case ast.Call(func=ast.Attribute(attr="pop"), args=[ast.Constant(value=name), *_]) if name == keyword:
                return True
    return False


def _dict_keys(path: Path, name: str) -> tuple[str, ...]:
    keys: list[str] = []
    for node in _parse(path).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            targets = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if name in targets:
                keys.extend(str(key.value) for key in node.value.keys if isinstance(key, ast.Constant))
    return tuple(keys)
