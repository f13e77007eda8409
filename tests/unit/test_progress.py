"""Progress bars where there is no terminal, and where nobody wants any."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from propmeta_edit.models.forwards import cache_argument
from propmeta_edit.progress import progress_bar

ROOT = Path(__file__).resolve().parents[2]


def test_in_a_file_there_is_a_line_at_the_start_and_one_at_the_end(capsys):
    with progress_bar(total=500, desc="counting", unit="step") as bar:
        for number in range(500):
            bar.update(1)
            bar.set_postfix(loss=number)
            bar.set_postfix_str(f"loss {number}")
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 2 and "0/500" in lines[0] and "500/500" in lines[1] and all("\r" not in line for line in lines)
    assert "loss 499" in lines[1]


@pytest.mark.parametrize("options", ["hidden=True", ""])
def test_hidden_bars_are_silent(options):
    code = f"from propmeta_edit.progress import progress_bar\nfor _ in progress_bar(range(3), {options}): pass"
    environment = os.environ | ({} if options else {"TQDM_DISABLE": "1"})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    assert done.stderr == ""


def test_a_cache_has_the_name_that_the_model_knows():
    class Newer(torch.nn.Module):
        def forward(self, input_ids=None, cache=None):
            return None

    body = type(tiny.make_model("llama").base_model)
    assert cache_argument(Newer.forward) == "cache"
    assert cache_argument(body.forward) in ("cache", "past_key_values")
