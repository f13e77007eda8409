"""Every YAML of every baseline is read by both forms of EasyEdit and fits the model it is for."""

from __future__ import annotations

import pytest
import tiny
from script_settings import FILES

from propmeta_edit.easyedit.algorithms import default_layers

pytestmark = pytest.mark.easyedit


@pytest.fixture(scope="module")
def report(form, run_script):
    return run_script(form, "script_settings.py")


@pytest.mark.parametrize(("method", "name"), FILES)
def test_it_is_read_and_fits(report, form, method, name):
    if method in ("FT-L", "FT-M") and form.kind == "pypi":
        assert "no objective_optimization" in report[name][method] and "EASYEDIT_HOME" in report[name][method]
    elif (method, name, form.kind) == ("LoRA", "qwen2.5-7b", "pypi"):
        assert "has adalora alone, not 'lora'" in report[name][method]
    else:
        assert report[name][method] == ""


def test_openings_come_in_fives(report):
    assert "[5, 3]" in report["openings"] and "multiple of 5" in report["openings"]


@pytest.mark.parametrize("name", tiny.SHAPES)
def test_layers_that_are_not_given_follow_from_the_depth(report, name):
    depth = tiny.SHAPES[name][1]
    for method, filled in report["filled"][name].items():
        algorithm = {"FT-L": "FT", "FT-M": "FT"}.get(method, method)
        if default_layers(algorithm, depth) is not None and filled is not None:
            loss_layer = None if algorithm == "FT" else depth - 1
            assert filled == [default_layers(algorithm, depth), loss_layer], method
