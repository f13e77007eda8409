"""Progress bars: a few refreshes a second on a terminal, a line a minute in a file, none with ``TQDM_DISABLE``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from tqdm import tqdm
from tqdm.auto import tqdm as tqdm_here  # a notebook's own bars in a notebook

REFRESH_SECONDS, LINE_SECONDS = 0.3, 60.0


class _Lines(tqdm):  # type: ignore[misc]
    """A bar that is written anew on a line of its own, for what is no terminal."""

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        def print_status(text: str) -> None:
            if text.strip():
                print(text.strip(), file=file, flush=True)

        return print_status


def progress_bar(iterable: Any = None, *, hidden: bool = False, **options: Any) -> Any:
    """A bar of tqdm's, to stderr.

    Args:
        iterable: what to go through, if the bar is not moved by hand.
        hidden: none, as for all processes but the first.
        options: tqdm's own; ``disable`` is left to ``hidden`` and to ``TQDM_DISABLE``.
    """
    is_lines = tqdm_here.__module__ != "tqdm.notebook" and not sys.stderr.isatty()
    kind, seconds = (_Lines, LINE_SECONDS) if is_lines else (tqdm_here, REFRESH_SECONDS)
    shown = {"disable": True} if hidden else {}  # given as False it would outdo TQDM_DISABLE
    bar = kind(iterable, mininterval=seconds, maxinterval=max(seconds, 10.0), **options, **shown)
    for name in ("set_postfix", "set_postfix_str"):  # by themselves they write the bar anew, however often they are called
        setattr(bar, name, partial(getattr(bar, name), refresh=False))
    return bar
