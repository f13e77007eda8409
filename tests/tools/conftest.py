"""The generator is tested where the packages that it takes its facts from are there, in the versions that it is for."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

PINS = Path(__file__).resolve().parents[2] / "tools" / "world" / "requirements.txt"


@pytest.fixture(scope="session", autouse=True)
def _pinned_packages():
    for line in PINS.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            name, pinned = line.split("==")
            try:
                installed = version(name)
            except PackageNotFoundError:
                installed = "none"
            if installed != pinned:
                pytest.skip(f"needs {line}, not {installed}: pip install --requirement tools/world/requirements.txt")
