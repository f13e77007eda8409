"""Files written by a thread of their own while the loop goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

LOG = logging.getLogger(__name__)


class BackgroundWriter:
    """One piece of work at a time, in a thread. What goes wrong there is raised here, by the next call or at the latest at the end.

    As a context manager it is over when all is written, whatever ends it. Where it ends by an error, that one is raised, and one of
    the thread's is logged.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._work: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin with this, after what was begun before."""
        self.wait()
        self._work = self._thread.submit(work)

    def check(self) -> None:
        """Raise what went wrong so far, without waiting."""
        if self._work is not None and self._work.done():
            self.wait()

    def wait(self) -> None:
        """Until what was begun is done."""
        work, self._work = self._work, None
        if work is not None:
            work.result()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._thread.shutdown(wait=True)
        try:
            self.wait()
        except Exception as own:
            if error is None:
                raise
            LOG.error("what was being saved meanwhile is not there: %s", own)
