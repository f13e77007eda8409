"""Fixtures for all rooms."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: workers that take all cores each wait for one another
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

sys.path.insert(0, str(Path(__file__).parent))

import tiny


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.make_tokenizer()


@pytest.fixture(params=tiny.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(autouse=True)
def _private_cache(request, tmp_path, monkeypatch):
    """No test reads or writes the user's cache, except those that ask for the real model; none reads the user's data."""
    monkeypatch.delenv("PROPMETA_DATA", raising=False)
    if "slow" not in request.keywords:
        monkeypatch.setenv("PROPMETA_HOME", str(tmp_path / "home"))
