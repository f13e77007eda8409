"""Editing algorithms of ours that EasyEdit is to know.

A dict of its own, so that rooms can register before EasyEdit is imported and nothing here needs EasyEdit: the import hook calls
``install_registered`` once EasyEdit is there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from propmeta_edit.errors import EasyEditError

ALGORITHM_MODULE = "easyeditor.util.alg_dict"
BATCH_MODULE = "easyeditor.editors.batch_editor"


@dataclass(frozen=True)
class RegisteredAlgorithm:
    """One algorithm of ours.

    Args:
        name: EasyEdit's ``alg_name``.
        apply: ``(model, tok, requests, hparams, ...) -> (edited model, {parameter name: value before the edit})``.
        batchable: whether ``BaseEditor.batch_edit`` may call it with several requests.
        only_where_missing: a form of EasyEdit that has one by that name keeps its own.
    """

    name: str
    apply: Callable[..., Any]
    batchable: bool = True
    only_where_missing: bool = False


_ALGORITHMS: dict[str, RegisteredAlgorithm] = {}
_INSTALLED: dict[str, Callable[..., Any]] = {}  # what we put into EasyEdit's table, to tell it from EasyEdit's own


def register_algorithm(name: str, apply: Callable[..., Any], batchable: bool = True, only_where_missing: bool = False) -> None:
    """Let EasyEdit know an algorithm, at once if it is imported, else as soon as it is. A later one of the same name takes over.

    Raises:
        EasyEditError: EasyEdit is imported and has an algorithm of its own by that name (not if ``only_where_missing``).
    """
    if not only_where_missing:
        _check_free(name)
    _ALGORITHMS[name] = RegisteredAlgorithm(name, apply, batchable, only_where_missing)
    install_registered()


def registered_algorithms() -> Mapping[str, RegisteredAlgorithm]:
    """All algorithms of ours by name, read-only."""
    return MappingProxyType(_ALGORITHMS)


def install_registered() -> None:
    """Put our algorithms into the imported EasyEdit, and let its batch check pass them; nothing happens where it is not imported.

    Raises:
        EasyEditError: EasyEdit has an algorithm of its own by one of our names.
    """
    table = getattr(sys.modules.get(ALGORITHM_MODULE), "ALG_DICT", None)
    if table is not None:
        for name, algorithm in _ALGORITHMS.items():
            if algorithm.only_where_missing and name in table and table[name] is not _INSTALLED.get(name):
                continue
            _check_free(name)
            table[name] = _INSTALLED[name] = algorithm.apply
    batch_editor = getattr(sys.modules.get(BATCH_MODULE), "BatchEditor", None)
    if batch_editor is not None:
        _widen_batch_check(batch_editor)


def _check_free(name: str) -> None:
    table = getattr(sys.modules.get(ALGORITHM_MODULE), "ALG_DICT", {})
    if name in table and table[name] is not _INSTALLED.get(name):
        own = ", ".join(key for key, apply in table.items() if apply is not _INSTALLED.get(key))
        raise EasyEditError(f"EasyEdit has an algorithm {name!r} of its own; register ours by a name not among {own}")


class _WidenedCheck:
    """EasyEdit's check of batchable names, and ours."""

    def __init__(self, original: Callable[[str], bool]) -> None:
        self._original = original

    def __call__(self, alg_name: str) -> bool:
        ours = _ALGORITHMS.get(alg_name)
        return ours.batchable if ours is not None else self._original(alg_name)


def _widen_batch_check(batch_editor: Any) -> None:
    original = batch_editor.is_batchable_method
    if not isinstance(original, _WidenedCheck):
        batch_editor.is_batchable_method = staticmethod(_WidenedCheck(original))
