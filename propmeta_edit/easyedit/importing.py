"""One finder on ``sys.meta_path`` through which both forms of EasyEdit import on light dependencies and on any device.

What it does, and only to ``easyeditor``:

- takes the package from ``EASYEDIT_HOME`` if that is set;
- in the PyPI form and in older clones, reads ``f"cuda:{x}"`` in the source as the device that x means; no file and no ``.pyc`` is
  written;
- where a multimodal part of EasyEdit does not import, puts a placeholder whose classes raise on construction, and the same, for as
  long as EasyEdit is being imported, for two third-party packages that methods we do not use want;
- lets its editor fill in the subject of a prompt with a place for it, for its evaluation as for the edit;
- puts back the random states and the root logger that EasyEdit's import changes, and installs our algorithms.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from propmeta_edit.easyedit.filled_prompts import fill_in_subjects
from propmeta_edit.easyedit.global_state import global_state_restored
from propmeta_edit.easyedit.registry import install_registered
from propmeta_edit.errors import EasyEditError

PACKAGE = "easyeditor"
OPTIONAL_PARTS = ("easyeditor.trainer.blip2_models", "easyeditor.dataset.processor")
OPTIONAL_PACKAGES = ("sentence_transformers", "zhipuai")
DEVICE_FUNCTION = "_propmeta_device_string"


def install() -> None:
    """Make ``import easyeditor`` work, now or later; calling it again changes nothing.

    Where EasyEdit is imported already it is left as it is, except that it learns our algorithms.
    """
    if any(isinstance(finder, EasyEditFinder) for finder in sys.meta_path):
        return
    if PACKAGE in sys.modules:
        install_registered()
    else:
        sys.meta_path.insert(0, EasyEditFinder())


def find_easyeditor() -> ModuleSpec | None:
    """Where ``import easyeditor`` would take (or took) it from; None if nowhere.

    Raises:
        EasyEditError: ``EASYEDIT_HOME`` names a folder that does not hold EasyEdit.
    """
    return sys.modules[PACKAGE].__spec__ if PACKAGE in sys.modules else _search_easyeditor()


def _search_easyeditor() -> ModuleSpec | None:
    home = os.environ.get("EASYEDIT_HOME")
    if not home:
        return _find_elsewhere(PACKAGE)
    folder = Path(home).expanduser()
    if not (folder / PACKAGE / "__init__.py").is_file():
        raise EasyEditError(
            f"EASYEDIT_HOME is {home!r}, but there is no package {PACKAGE}/ in it; it must name a clone of zjunlp/EasyEdit "
            "(or be unset, then the installed easyeditor is used)"
        )
    return PathFinder.find_spec(PACKAGE, [str(folder)])


def is_pypi_form(location: str | Path) -> bool:
    """Whether the package in this folder is the PyPI form, whose editor makes its requests itself."""
    return not (Path(location) / "editors" / "utils.py").is_file()


def knows_cuda_alone(location: str | Path) -> bool:
    """Whether it is the PyPI form or a clone from before June 2026, for which every device is a CUDA device."""
    return not (Path(location) / "util" / "device.py").is_file()


def _find_elsewhere(name: str) -> ModuleSpec | None:
    for finder in sys.meta_path:
        if not isinstance(finder, EasyEditFinder) and hasattr(finder, "find_spec"):
            spec = finder.find_spec(name, None)
            if spec is not None:
                return spec
    return None


class EasyEditFinder(importlib.abc.MetaPathFinder):
    """Finds EasyEdit and its parts; every other module is left to the other finders."""

    def __init__(self) -> None:
        self._importing = False
        self._trying_optional_part = False

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """See ``importlib.abc.MetaPathFinder``."""
        if fullname == PACKAGE:
            return self._find_package()
        if fullname.startswith(PACKAGE + "."):
            return self._find_part(fullname, path)
        if fullname in OPTIONAL_PACKAGES and self._importing and _imported_by_easyeditor() and _find_elsewhere(fullname) is None:
            return ModuleSpec(fullname, _PlaceholderLoader())
        return None

    def _find_package(self) -> ModuleSpec | None:
        spec = _search_easyeditor()
        if spec is not None and spec.submodule_search_locations and spec.loader is not None:
            if knows_cuda_alone(spec.submodule_search_locations[0]):
                _rewrite_devices(spec)
            spec.loader = _PackageLoader(spec.loader, self)
        return spec

    def _find_part(self, fullname: str, path: Sequence[str] | None) -> ModuleSpec | None:
        optional = not self._trying_optional_part and fullname.startswith(OPTIONAL_PARTS)
        rewritten = knows_cuda_alone(sys.modules[PACKAGE].__path__[0])
        if not (optional or rewritten):
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and rewritten:
            _rewrite_devices(spec)
        if spec is not None and optional and spec.loader is not None and spec.has_location:
            spec.loader = _OptionalLoader(spec.loader, self)
        return spec

    def run_package(self, loader: Any, module: ModuleType) -> None:
        """Execute EasyEdit, undo what that changes elsewhere, then add what is ours."""
        self._importing = True
        try:
            with global_state_restored():
                loader.exec_module(module)
        finally:
            self._importing = False
            for name in OPTIONAL_PACKAGES:
                if isinstance(getattr(sys.modules.get(name), "__loader__", None), _PlaceholderLoader):
                    del sys.modules[name]
        if is_pypi_form(module.__path__[0]):
            from propmeta_edit.easyedit.wheel_editor import supply_missing

            supply_missing()
        editor = getattr(module, "BaseEditor", None)
        if editor is not None:
            fill_in_subjects(editor)
        install_registered()

    def run_optional_part(self, loader: Any, module: ModuleType) -> None:
        """Execute a multimodal part; where it lacks an import, make it a placeholder and forget what it had imported of itself."""
        before = set(sys.modules)
        self._trying_optional_part = True
        try:
            loader.exec_module(module)
        except ImportError as error:
            for name in set(sys.modules) - before:
                if name.startswith(OPTIONAL_PARTS) and name != module.__name__:
                    del sys.modules[name]
            _make_placeholder(module, str(error))
        finally:
            self._trying_optional_part = False


class _DelegatingLoader(importlib.abc.Loader):
    """Everything as the real loader has it (``inspect`` and ``pickle`` ask it for more than the import does)."""

    def __init__(self, loader: Any, finder: EasyEditFinder) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module


class _PackageLoader(_DelegatingLoader):
    def exec_module(self, module: ModuleType) -> None:
        self._finder.run_package(self._loader, module)


class _OptionalLoader(_DelegatingLoader):
    def exec_module(self, module: ModuleType) -> None:
        self._finder.run_optional_part(self._loader, module)


class _PlaceholderLoader(importlib.abc.Loader):
    """For a third-party package that is not installed."""

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        _make_placeholder(module, f"the package {module.__name__} is not installed")


def _make_placeholder(module: ModuleType, reason: str) -> None:
    """Let every public name of a module be a class that raises when it is constructed."""
    for name in [name for name in vars(module) if not name.startswith("__")]:
        delattr(module, name)

    def get_placeholder(name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        placeholder = type(name, (), {"__new__": _refuse, "__module__": module.__name__, "reason": reason})
        setattr(module, name, placeholder)
        return placeholder

    module.__getattr__ = get_placeholder  # type: ignore[method-assign, assignment]


def _refuse(cls: Any, *args: Any, **kwargs: Any) -> Any:
    raise ImportError(f"{cls.__module__}.{cls.__name__} is not available here: {cls.reason}")


def _imported_by_easyeditor() -> bool:
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in (__name__, "importlib._bootstrap", "importlib"):
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and str(frame.f_globals.get("__name__")).startswith(PACKAGE + ".")


def _rewrite_devices(spec: ModuleSpec) -> None:
    if type(spec.loader) is SourceFileLoader:
        spec.loader = _DeviceRewritingLoader(spec.loader.name, spec.loader.path)


class _DeviceRewritingLoader(SourceFileLoader):
    """Compiles from source each time, so that no ``.pyc`` of the changed code is left for an import without us."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        tree = _DeviceStrings().visit(ast.parse(self.get_data(path), path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        from propmeta_edit.easyedit.devices import device_string

        vars(module)[DEVICE_FUNCTION] = device_string
        super().exec_module(module)


class _DeviceStrings(ast.NodeTransformer):
    """``f"cuda:{x}"`` becomes ``device_string(x)``."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        self.generic_visit(node)
        match node.values:
            case [ast.Constant(value="cuda:"), ast.FormattedValue(value=device, conversion=-1, format_spec=None)]:
                function = ast.Name(DEVICE_FUNCTION, ast.Load())
                return ast.copy_location(ast.Call(function, [device], []), node)
        return node
