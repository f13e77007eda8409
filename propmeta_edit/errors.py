"""Every error a user can cause. The command line prints the message and exits with code 2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """``; did you mean X?`` behind a message about an unknown name, where one of the known ones is nearly it; else nothing."""
    found = get_close_matches(given, list(known), n=1, cutoff=0.7)
    return f"; did you mean {found[0]}?" if found else ""


class PropMetaError(Exception):
    """Base class: the message names the offending value, the allowed ones and the fix."""


class ConfigError(PropMetaError):
    """A YAML file or a setting that cannot be used."""


class RequestError(PropMetaError):
    """An edit request that cannot be carried out (empty target, subject not in its prompt, ...)."""


class ModelError(PropMetaError):
    """A model that cannot be found, loaded or edited as asked (unknown name, layer, architecture)."""


class OriginError(PropMetaError):
    """What is on disk was made from something else than it is asked to go on with: other settings, data or weights."""


class EasyEditError(PropMetaError):
    """EasyEdit is missing, broken, or its installed form lacks what was asked for."""


class DataError(PropMetaError):
    """A data file that cannot be read.

    Args:
        message: what is wrong and what was expected.
        path: the file, if there is one.
        line: 1-based line number in that file, if it is known.
    """

    def __init__(self, message: str, path: str | Path | None = None, line: int | None = None) -> None:
        where = "" if path is None else f"{path}: " if line is None else f"{path}, line {line}: "
        super().__init__(where + message)
        self.path = path
        self.line = line


@contextmanager
def record_named(what: str) -> Iterator[None]:
    """Inside, a text that cannot be used is an error that begins with the record it is from."""
    try:
        yield
    except (RequestError, ModelError) as error:
        raise type(error)(f"{what}: {error}") from error
