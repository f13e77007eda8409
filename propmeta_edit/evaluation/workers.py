"""A method's cases spread over Ray workers: several GPUs, several machines, and workers that die."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from propmeta_edit.errors import ConfigError, PropMetaError
from propmeta_edit.evaluation.rows import Row
from propmeta_edit.evaluation.runner import GroupRunner, MethodSpec, Work

LOG = logging.getLogger(__name__)
# With which workers find models and data as this process does. Not HF_TOKEN, which Ray would show: HF_TOKEN_PATH names its file.
HUB = ("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN_PATH", "TRANSFORMERS_OFFLINE")
PASSED_ON = ("PROPMETA_HOME", "PROPMETA_DATA", "EASYEDIT_HOME", "OMP_NUM_THREADS", *HUB)
MAX_DEATHS = 3  # of workers on one group of cases


class _Worker:
    """One process with the method's model loaded once."""

    def __init__(self, method: MethodSpec, seed: int, versions: Mapping[str, str]) -> None:
        self._run_group = GroupRunner(method, method.build(), seed, versions)

    def run(self, work: Work) -> list[Row]:
        return self._run_group(work)


class RayWorkers:
    """Runs a method's cases on Ray, each group of cases on one worker; to be given to ``run_methods`` as ``execute``.

    Rows come back to the one process that writes them, so each is written once, whichever worker died after making it.

    Args:
        num_workers: processes, each with a model of its own.
        address: of a running cluster; None starts Ray on this machine.
        num_gpus: GPUs of a worker, a fraction to share one.
        num_cpus: CPUs of a worker.

    Raises:
        ConfigError: Ray is missing, cannot be reached, or has no room for a single worker.
    """

    def __init__(self, num_workers: int, address: str | None = None, num_gpus: float = 0, num_cpus: float = 1) -> None:
        if num_workers < 1:
            raise ConfigError(f"the number of workers must be 1 or more, got {num_workers}")
        try:
            import ray
        except ModuleNotFoundError as error:
            raise ConfigError('workers need Ray: pip install "propmeta-edit[ray]"') from error
        self._ray: Any = ray
        self._options = {"num_gpus": num_gpus, "num_cpus": num_cpus}
        if not ray.is_initialized():
            environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
            own = {} if address else {"num_cpus": max(1, math.ceil(num_workers * num_cpus)), "include_dashboard": False}
            os.environ.setdefault("RAY_worker_niceness", "0")  # or its workers get what every other program leaves
            try:
                ray.init(address=address, runtime_env={"env_vars": environment}, log_to_driver=False, **own)
            except (ConnectionError, ValueError) as error:
                raise ConfigError(f"no Ray cluster at {address!r}: {error}") from error
        fitting = count_fitting(ray.cluster_resources(), num_gpus, num_cpus)
        if fitting < num_workers:  # one that never starts would be waited for without end
            LOG.warning("Ray has room for %d of %d workers of %g GPUs and %g CPUs", fitting, num_workers, num_gpus, num_cpus)
        self._num_workers = min(num_workers, fitting)

    def __call__(self, method: MethodSpec, work: Sequence[Work], seed: int, versions: Mapping[str, str]) -> Iterator[list[Row]]:
        """The rows of each group as they are finished, in no particular order.

        Raises:
            PropMetaError: workers died ``MAX_DEATHS`` times on the same cases, which are named.
        """
        ray = self._ray
        remote = ray.remote(**self._options)(_Worker)
        left = list(reversed(work))
        deaths: dict[int, int] = {}
        busy: dict[Any, tuple[Any, Work]] = {}

        def give(worker: Any) -> None:
            if left:
                item = left.pop()
                busy[worker.run.remote(item)] = (worker, item)

        for _ in range(min(self._num_workers, len(work))):
            give(remote.remote(method, seed, versions))
        while busy:
            [finished], _ = ray.wait(list(busy), num_returns=1)
            worker, item = busy.pop(finished)
            try:
                rows = ray.get(finished)
            except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
                if getattr(error, "actor_init_failed", False):
                    raise PropMetaError(f"{method.name} cannot be set up on a worker: {error}") from error
                deaths[id(item)] = deaths.get(id(item), 0) + 1
                names = ", ".join(case.case_id for case in item.group)
                if deaths[id(item)] >= MAX_DEATHS:
                    raise PropMetaError(
                        f"workers died {MAX_DEATHS} times on {method.name}, {item.data.name}: {names} ({error})"
                    ) from error
                LOG.warning("a worker died on %s, %s: %s; its cases run again on a new one", method.name, item.data.name, names)
                left.append(item)
                worker = remote.remote(method, seed, versions)
            else:
                yield rows
            give(worker)
            del worker  # one without work gives its GPU back: another may wait for it


def count_fitting(resources: Mapping[str, float], num_gpus: float, num_cpus: float) -> int:
    """How many workers Ray has room for; several share a GPU only if each takes a fraction that all of them fit into.

    Raises:
        ConfigError: not even one.
    """
    gpus, cpus = resources.get("GPU", 0), resources.get("CPU", 0)
    if gpus < num_gpus or cpus < num_cpus:
        raise ConfigError(f"a worker needs {num_gpus:g} GPUs and {num_cpus:g} CPUs, but Ray has {gpus:g} and {cpus:g}; lower it")
    room = [int(cpus / num_cpus)] if num_cpus else []
    if num_gpus:
        room.append(int(gpus) * int(1 / num_gpus) if num_gpus < 1 else int(gpus / num_gpus))
    return min(room, default=sys.maxsize)
