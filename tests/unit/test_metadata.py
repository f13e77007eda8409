"""What pip and the documents are told of the package: nothing left out, nothing said twice."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import propmeta_edit

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_package_is_installed_and_so_are_the_settings():
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "propmeta_edit").rglob("__init__.py")}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == there | {"propmeta_edit.hparams"}


def test_every_data_file_is_installed():
    for package, patterns in PYPROJECT["tool"]["setuptools"]["package-data"].items():
        folder = ROOT / PYPROJECT["tool"]["setuptools"]["package-dir"].get(package, package.replace(".", "/"))
        installed = {path for pattern in patterns for path in folder.glob(pattern)}
        files = [path for path in folder.rglob("*") if path.is_file() and (package.endswith("hparams") or "files" in path.parts)]
        assert installed and (package == "propmeta_edit" or set(files) <= installed), package


def test_the_version_is_said_once_and_read_without_importing():
    assert PYPROJECT["project"]["dynamic"] == ["version", "readme"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "propmeta_edit.__version__"}
    source = (ROOT / "propmeta_edit" / "__init__.py").read_text(encoding="utf-8")
    assert re.findall(r'^__version__ = "(.*)"$', source, flags=re.MULTILINE) == [propmeta_edit.__version__]
    assert f"\n## {propmeta_edit.__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_what_pip_shows_of_it_is_whole():
    project = PYPROJECT["project"]
    assert project["license"] == "MIT" and "the authors of propmeta-edit" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    versions = [name.rpartition(" ")[2] for name in project["classifiers"] if re.search(r":: 3\.\d+$", name)]
    assert project["requires-python"] == f">={versions[0]}" and versions == ["3.11", "3.12", "3.13"]
    assert (ROOT / "propmeta_edit" / "py.typed").is_file() and "Typing :: Typed" in project["classifiers"]


def test_the_api_reference_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    documented = {line.removeprefix("::: ") for line in page.splitlines() if line.startswith("::: ")}
    public = {f"{getattr(propmeta_edit, name).__module__}.{name}" for name in propmeta_edit.__all__}
    assert public - documented == set()
