"""Importing EasyEdit: light, with nothing else changed, and with our algorithms in it."""

from __future__ import annotations

import ast
import hashlib
import importlib
import re
import subprocess
import sys

import pytest

from propmeta_edit.easyedit import find_form, install, load_easyedit
from propmeta_edit.easyedit.devices import device_string
from propmeta_edit.easyedit.importing import DEVICE_FUNCTION, EasyEditFinder, _DeviceStrings, knows_cuda_alone
from propmeta_edit.errors import ConfigError, EasyEditError
from propmeta_edit.models.devices import resolve_device


def _files(form):
    """Every file of the PyPI form; of the repository the sources, as Python itself keeps compiled files there."""
    pattern = "*" if form.kind == "pypi" else "*.py"
    files = (path for path in sorted(form.location.rglob(pattern)) if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files}


@pytest.fixture(scope="module")
def report(form, run_script):
    before = _files(form)
    result = run_script(form, "script_importing.py")
    assert _files(form) == before
    return result


@pytest.mark.easyedit
def test_the_package_itself_is_light(report):
    assert report["heavy"] == []


@pytest.mark.easyedit
def test_the_form_is_recognised_without_importing_it(report, form):
    supports = {
        "pypi": ["edit_dataset", "edit_requests", "requests", "sequential_edit"],
        "repository": ["edit_requests", "generate_edit", "sequential_edit"],
    }
    assert report["form"] == {"kind": form.kind, "location": str(form.location), "supports": supports[form.kind]}
    assert {"FT", "LoRA", "MEMIT", "ROME"} <= set(report["algorithms"])
    assert ("AlphaEdit" in report["algorithms"]) == (form.kind == "repository")


@pytest.mark.easyedit
def test_random_states_and_root_logger_are_as_before(report):
    assert report["draws_as_before"] and report["root_logger_as_before"]
    assert report["name"] == "easyeditor.editors.editor"


@pytest.mark.easyedit
def test_algorithms_registered_before_and_after_the_import_are_known(report):
    assert report["table"] == [True, True, True] and report["own_algorithms_kept"]
    assert report["batchable"] == [True, False, True, False, False]
    assert "'FT'" in report["name_taken"]
    assert report["finders"] == 1


@pytest.mark.easyedit
def test_the_pypi_form_holds_no_cuda_string_and_the_repository_is_unaided(report, form):
    assert report["modules"] > 50
    assert report["cuda_strings"] == [] or form.kind == "repository"
    assert report["loaders"] == (["_DeviceRewritingLoader"] if form.kind == "pypi" else ["SourceFileLoader"])


@pytest.mark.easyedit
def test_placeholders_raise_and_fool_nobody_else(report):
    assert report["placeholder"] == "real" or "NoSuchModel is not available here" in report["placeholder"]
    assert report["fooled"] == [] and report["never_placed"] == []


def test_a_wrong_easyedit_home_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("EASYEDIT_HOME", str(tmp_path))
    with pytest.raises(EasyEditError, match=r"EASYEDIT_HOME .*no package easyeditor/"):
        find_form()
    with pytest.raises(EasyEditError, match="EASYEDIT_HOME"):
        importlib.import_module("easyeditor")


def test_a_clone_from_before_devices_is_no_wheel_and_an_archive_has_no_commit(monkeypatch, tmp_path):
    """Only a clone has ``editors/utils.py``; the commit of a repository that an archive lies in is not its own."""
    package = tmp_path / "archive" / "easyeditor"
    for file, text in (
        ("__init__.py", ""),
        ("editors/editor.py", "class BaseEditor:\n    def edit(self, sequential_edit): pass\n"),
        ("util/alg_dict.py", "ALG_DICT = {'FT': 1}\n"),
    ):
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text(text)
    monkeypatch.setenv("EASYEDIT_HOME", str(tmp_path / "archive"))
    assert find_form().kind == "pypi" and knows_cuda_alone(package)
    (package / "editors" / "utils.py").write_text("")
    assert find_form().kind == "repository" and knows_cuda_alone(package)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, "-C", str(tmp_path), "commit", "-q", "--allow-empty", "-m", "another"], check=True)
    assert find_form().version == "repository"
    subprocess.run(["git", "init", "-q", str(tmp_path / "archive")], check=True)
    subprocess.run(["git", *identity, "-C", str(tmp_path / "archive"), "commit", "-q", "--allow-empty", "-m", "own"], check=True)
    assert re.fullmatch("repository [0-9a-f]{7,}", find_form().version)


def test_a_missing_easyedit_names_both_ways_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "easyeditor", None)
    with pytest.raises(EasyEditError, match=r"pip install --no-deps easyeditor==0\.0\.1\.dev0.*EASYEDIT_HOME"):
        load_easyedit()


def test_a_missing_dependency_is_named(monkeypatch, tmp_path):
    (tmp_path / "easyeditor").mkdir()
    (tmp_path / "easyeditor" / "__init__.py").write_text("import no_such_package\n")
    monkeypatch.setenv("EASYEDIT_HOME", str(tmp_path))
    with pytest.raises(EasyEditError, match=r"No module named 'no_such_package'.*\[easyedit\]"):
        load_easyedit()
    assert "easyeditor" not in sys.modules


def test_installing_twice_leaves_one_finder():
    install()
    install()
    assert sum(isinstance(finder, EasyEditFinder) for finder in sys.meta_path) == 1


@pytest.mark.parametrize(
    ("device", "expected"), [(0, "cuda:0"), ("1", "cuda:1"), ("cpu", "cpu"), ("mps", "mps"), ("cuda:1", "cuda:1"), ("cuda", "cuda")]
)
def test_device_strings(device, expected):
    source = 'where(f"cuda:{device}")'
    tree = ast.fix_missing_locations(_DeviceStrings().visit(ast.parse(source, mode="eval")))
    names = {"where": lambda text: text, "device": device, DEVICE_FUNCTION: device_string}
    assert eval(compile(tree, "<test>", "eval"), names) == expected


@pytest.mark.parametrize("source", ['f"cuda:{x}!"', 'f"a cuda:{x}"', 'f"cuda:{x:d}"', 'f"cuda:{x!r}"', 'f"cpu:{x}"', '"cuda:0"'])
def test_other_strings_are_left_as_they_are(source):
    assert ast.unparse(_DeviceStrings().visit(ast.parse(source))) == ast.unparse(ast.parse(source))


def test_a_device_that_is_not_there_is_refused():
    assert resolve_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="auto, cpu, mps, cuda"):
        resolve_device("tpu-ish")
    with pytest.raises(ConfigError, match="CUDA devices"):
        resolve_device(99)
