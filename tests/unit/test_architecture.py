"""The rooms and the direction of their imports, as docs/architecture.md tells."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import propmeta_edit

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "propmeta_edit"
ORDER = [
    "base",
    "data",
    "text",
    "models",
    "finetune",
    "edits",
    "metatrain",
    "baselines",
    "easyedit",
    "evaluation",
    "analysis",
    "recipes",
    "studies",
    "speed",
    "command",
]
BASE = {"errors", "records", "files", "config", "options", "progress", "protocols", "settings", "store", "__init__"}
COMMAND = {"cli", "commands", "completion"}
NAMED = re.compile(r"(propmeta_edit|easyeditor)(\.\w+)+(:\w+)?")
FILES = sorted(PACKAGE.rglob("*.py"))


def room(module):
    part = module.split(".")[1] if "." in module else "__init__"
    return "base" if part in BASE else "command" if part in COMMAND else part


def imports(path, top_level_only=False):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and NAMED.fullmatch(node.value):
            yield node.value.partition(":")[0]  # what importlib is given, here or elsewhere, is an import too


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_room_imports_only_rooms_above_it(path):
    name = module_name(path)
    if name == "propmeta_edit":  # the front door
        return
    here = room(name)
    for imported in imports(path):
        if imported.startswith("propmeta_edit") and imported != "propmeta_edit":
            there = room(imported)
            assert there == here or ORDER.index(there) < ORDER.index(here), f"{name} imports {imported}"
            assert {here, there} != {"metatrain", "easyedit"}, "they meet only in finetune/"
        assert imported.split(".")[0] not in ("benchmarks", "tests"), name
        if imported.split(".")[0] == "easyeditor":
            assert here == "easyedit", f"{name} imports EasyEdit"


def test_a_module_named_in_a_string_is_an_import(tmp_path):
    file = tmp_path / "x.py"
    file.write_text('import importlib\nimportlib.import_module("propmeta_edit.recipes.bundled")\nVERB = "propmeta_edit.cli:main"\n')
    assert sorted(imports(file)) == ["importlib", "propmeta_edit.cli", "propmeta_edit.recipes.bundled"]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_benchmarks_import_public_names_alone(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] in sys.stdlib_module_names for alias in node.names), path.name
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] not in sys.stdlib_module_names:
            assert node.module == "propmeta_edit" and {alias.name for alias in node.names} <= set(propmeta_edit.__all__)


def test_easyedit_is_never_imported_while_importing():
    for path in FILES:
        assert not [m for m in imports(path, top_level_only=True) if m.split(".")[0] == "easyeditor"], path


def test_importing_the_package_is_light():
    code = "import sys, propmeta_edit; print([m for m in ('torch', 'transformers', 'easyeditor', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip() == "[]"


def test_the_architecture_page_names_every_module_and_only_those():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = page.split("```")[1]
    named = set(re.findall(r"(\w+)\.py", tree))
    there = {path.stem for path in FILES if path.stem != "__init__"}
    assert there - named == set() and named - there == set()


def test_every_function_named_in_equations_exists():
    page = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")
    names = re.findall(r"`((?:metatrain|finetune|evaluation|models)\.\w+)\.(\w+)`", page)
    assert len(names) >= 6
    for module, function in names:
        source = (PACKAGE / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        assert re.search(rf"(def|class) {function}\b", source), (module, function)
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    for name in re.findall(r"`(?:[\w/.]+::)?(test_\w+)`", page):
        assert f"def {name}(" in tests, name
