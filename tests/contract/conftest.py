"""EasyEdit's two forms cannot live in one process: each is tried in a process of its own, which reports JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@dataclass
class Form:
    kind: str
    location: Path
    environment: dict[str, str]


@pytest.fixture(scope="session", params=["pypi", "repository"])
def form(request: pytest.FixtureRequest) -> Form:
    """A form of EasyEdit at hand, and the environment in which a process finds it."""
    environment = {name: value for name, value in os.environ.items() if name not in ("EASYEDIT_HOME", "PYTHONDONTWRITEBYTECODE")}
    search_path = [str(ROOT), str(ROOT / "tests"), environment.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, search_path)), "HF_HUB_OFFLINE": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # tiny models: more threads only wait for each other
    if request.param == "repository":
        home = os.environ.get("EASYEDIT_HOME")
        if not home:
            pytest.skip("EASYEDIT_HOME names no clone of EasyEdit")
        return Form("repository", Path(home) / "easyeditor", environment | {"EASYEDIT_HOME": home})
    spec = PathFinder.find_spec("easyeditor")
    if spec is None or spec.origin is None:
        pytest.skip("easyeditor is not installed")
    location = Path(spec.origin).parent
    if (location / "util" / "device.py").is_file():
        pytest.skip(f"the installed easyeditor in {location} is not the PyPI form")
    return Form("pypi", location, environment)


@pytest.fixture(scope="session")
def run_script(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Form, str], dict[str, Any]]:
    """Run a script of this folder under a form, in an empty folder; it writes its report to the file it is given."""

    def run(form: Form, script: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(form.kind)
        report = folder / "report.json"
        command = [sys.executable, str(Path(__file__).parent / script), str(report)]
        done = subprocess.run(command, cwd=folder, env=form.environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(report.read_text(encoding="utf-8"))

    return run
