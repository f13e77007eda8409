"""EasyEdit's sequential mode leaves what stands known to the edits to come, and what it puts back forgotten."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.easyedit


def test_whitened_edits_know_of_those_that_stand_and_of_no_others(form, run_script):
    report = run_script(form, "script_standing.py")
    assert report["form"] == form.kind
    assert report["put_back"] == 0
    assert report["after_put_back"] < 1e-6 < 1e-3 < report["moved"], "an edit that was put back is not remembered"
    assert report["one_after_another"] < 1e-6 < 1e-4 < report["forgetful"]
