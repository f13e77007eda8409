"""The comparison on Ray workers gives the rows of one process, each once, whichever worker dies."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch

from propmeta_edit.easyedit.algorithms import EditWith
from propmeta_edit.easyedit.hparams import MetaFTHyperParams
from propmeta_edit.easyedit.plugin import apply_metaft_to_model
from propmeta_edit.errors import ConfigError, PropMetaError
from propmeta_edit.evaluation.asking import Examiner
from propmeta_edit.evaluation.methods import Editing
from propmeta_edit.evaluation.rows import RowFile
from propmeta_edit.evaluation.runner import DataSet, Method, MethodSpec, run_methods
from propmeta_edit.evaluation.tables import summarise
from propmeta_edit.evaluation.workers import RayWorkers, count_fitting
from propmeta_edit.records import Case, EditRequest, Question

CASES = [
    Case(f"c{i}", (EditRequest(f"Ann {i} lives in", place),), Question(f"What is near Ann {i}?", (place[:2],)))
    for i, place in enumerate(["Peru", "Greece", "Lima", "Paris"] * 4)
]


@dataclass
class Mortal(Method):
    """Real edits of a tiny model in a process that is killed on a case, as often as there are files to take away."""

    inner: Editing
    folder: Path

    def evaluate_many(self, cases):
        lives = sorted(self.folder.glob("kill-*"))
        if cases[0].case_id == "c5" and lives:
            lives[0].unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        (self.folder / f"pid-{os.getpid()}").touch()
        return self.inner.evaluate_many(cases)


def build(folder):
    torch.set_num_threads(1)
    hparams = MetaFTHyperParams("tiny", device="cpu", layers=[1], lr=1e-2, num_steps=3)
    loaded = tiny.make_model("llama", dtype=torch.float32), tiny.make_tokenizer()
    return Mortal(Editing(Examiner(*loaded), EditWith(*loaded, apply_metaft_to_model, hparams)), folder)


def run(folder, deaths, execute=None):
    folder.mkdir()
    for number in range(deaths):
        (folder / f"kill-{number}").touch()
    rows = RowFile(folder / "rows.jsonl")
    spec = MethodSpec("MetaFT", "tiny", "weights", "h", build=partial(build, folder))
    failures = run_methods([spec], [DataSet("d", "data", CASES)], rows, limit=None, seed=0, versions={}, execute=execute)
    return {row.case_id: (row.generated, row.efficacy, row.correct) for row in rows.rows}, rows, failures


@pytest.fixture(scope="module")
def workers():
    ray = pytest.importorskip("ray")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(tiny.__file__).parent), str(Path(__file__).parent)])
    yield RayWorkers(2)
    ray.shutdown()
    del os.environ["PYTHONPATH"]


def test_two_workers_one_killed_give_the_same_table(tmp_path, workers):
    expected, one_process, _ = run(tmp_path / "one", deaths=0)
    found, rows, failures = run(tmp_path / "ray", deaths=1, execute=workers)
    assert found == expected and failures == 0
    assert len(rows.rows) == len(CASES), "every case once"
    strip = [{k: v for k, v in e.items() if "seconds" not in k} for e in (*summarise(rows.rows), *summarise(one_process.rows))]
    assert strip[0] == strip[1]
    assert len(list((tmp_path / "ray").glob("pid-*"))) == 3, "two workers and the one in the killed one's place"


def test_cases_that_kill_every_worker_end_the_run_and_keep_the_rest(tmp_path, workers):
    with pytest.raises(PropMetaError, match=r"workers died 3 times on MetaFT, d: c5"):
        run(tmp_path / "ray", deaths=9, execute=workers)
    assert RowFile(tmp_path / "ray" / "rows.jsonl").rows, "what was finished is on disk"


def test_no_more_workers_are_started_than_fit(tmp_path, workers, caplog):
    """One too many would wait for a place for ever, and the run for its cases."""
    more = RayWorkers(5)
    assert "Ray has room for 2 of 5 workers of 0 GPUs and 1 CPUs" in caplog.text
    _, rows, failures = run(tmp_path / "ray", deaths=0, execute=more)
    assert failures == 0 and len(rows.rows) == len(CASES) and len(list((tmp_path / "ray").glob("pid-*"))) == 2


@pytest.mark.parametrize(
    ("resources", "gpus", "cpus", "expected"),
    [
        ({"GPU": 1, "CPU": 16}, 1, 1, 1),
        ({"GPU": 4, "CPU": 16}, 1, 1, 4),
        ({"GPU": 4, "CPU": 2}, 1, 1, 2),
        ({"GPU": 2, "CPU": 16}, 0.5, 1, 4),
        ({"GPU": 2, "CPU": 16}, 0.6, 1, 2),  # a worker's share is of one GPU
        ({"GPU": 5, "CPU": 16}, 2, 1, 2),
        ({"CPU": 3}, 0, 0.5, 6),
    ],
)
def test_how_many_workers_fit(resources, gpus, cpus, expected):
    assert count_fitting(resources, gpus, cpus) == expected


def test_room_for_no_worker_is_refused():
    with pytest.raises(ConfigError, match="a worker needs 1 GPUs and 1 CPUs, but Ray has 0 and 8"):
        count_fitting({"CPU": 8}, 1, 1)


def test_no_workers_is_refused():
    with pytest.raises(ConfigError, match="must be 1 or more, got 0"):
        RayWorkers(0)
