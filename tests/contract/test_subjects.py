"""ROME and MEMIT, which put places for subjects into prompts by themselves, get prompts that have one."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.easyedit


@pytest.fixture(scope="module")
def report(form, run_script):
    return run_script(form, "script_subjects.py")


@pytest.mark.parametrize("method", ["ROME", "MEMIT"])
def test_a_subject_may_occur_twice_and_braces_are_an_error_of_ours(report, method):
    moved = {"ROME": 1, "MEMIT": 2}[method]
    assert report[f"{method}, twice"] == report[f"{method}, within a word"] == moved
    assert report[f"{method}, braces"].startswith(
        f"RequestError: request 0: {method} of EasyEdit takes braces for places of a subject"
    )
    assert "the target_new has some: '{Peru}'" in report[f"{method}, braces in the target"]
