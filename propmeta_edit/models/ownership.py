"""One thread at a time: who edits a model, or asks it edited, has it for that long."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from propmeta_edit.models.states import plain_torch
from propmeta_edit.models.wrappers import require_whole, unwrap
from propmeta_edit.protocols import LanguageModel

LOG = logging.getLogger(__name__)
PATIENCE = 60.0  # seconds of waiting after which a log line says for what

_LOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # one a model, of those that a thread can take again


@contextmanager
def owned(model: Any) -> Iterator[LanguageModel]:
    """Inside, this thread alone has the model, and torch is in its own state (``plain_torch``).

    Args:
        model: perhaps wrapped (``unwrap``).

    Yields:
        The model without its wrappers.

    Raises:
        ModelError: it cannot be edited as it is (``require_whole``); nothing was written.
    """
    plain = unwrap(model)
    with locked(plain):
        require_whole(plain)
        with plain_torch(plain):
            yield plain


@contextmanager
def locked(model: LanguageModel) -> Iterator[None]:
    """Inside, this thread alone has the model; it may take it again there. Other threads wait."""
    # One operation of a dict, and no lock around it: one that an interruption leaves taken would stop every later call.
    lock = _LOCKS.setdefault(model, threading.RLock())
    if not lock.acquire(timeout=PATIENCE):
        LOG.warning("another thread has had this model for %d seconds, to edit it or to ask it edited; waiting", PATIENCE)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
