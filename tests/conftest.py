"""Fixtures for all rooms."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

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
    """No test reads or writes the user's cache, except those that ask for the real model."""
    if "slow" not in request.keywords:
        monkeypatch.setenv("PROPMETA_HOME", str(tmp_path / "home"))
