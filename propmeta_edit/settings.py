"""The settings that come with the package, one YAML a method and model, and how those and one's own are named."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from propmeta_edit.errors import ConfigError

SUFFIXES = (".yaml", ".yml", ".json")


def has_hparams(method: str, model: str, own: str | Path | None = None) -> bool:
    """Whether there are settings for a method and a model in a folder of one's own, or with the package."""
    return any((root / method / f"{model}.yaml").is_file() for root in _roots(own))


def _roots(own: str | Path | None) -> list[Path]:
    return [*([Path(own)] if own is not None else []), _hparams_root()]


def _hparams_root() -> Path:
    """Inside the package where it was installed; beside it in a clone. A folder of that name elsewhere is somebody else's."""
    inside = Path(str(resources.files("propmeta_edit"))) / "hparams"
    return inside if inside.is_dir() else inside.parents[1] / "hparams"


def hparams_file(method: str, model: str, own: str | Path | None = None) -> Path:
    """The settings for a method and a model, e.g. ``("MetaTrain", "smollm2-135m")``, that come with the package.

    Args:
        own: a folder that is laid out like ``hparams/`` and looked into first.

    Raises:
        ConfigError: there are none; the message lists those there are.
    """
    paths = [root / method / f"{model}.yaml" for root in _roots(own)]
    for path in paths:
        if path.is_file():
            return path
    known = sorted({path.stem for root in _roots(own) for path in (root / method).glob("*.yaml")})
    raise ConfigError(
        f"no settings for {method} on {model!r}; for {method} there are those of {', '.join(known) or 'none'} (--hparams NAME); "
        f"one's own are found with --hparams-dir FOLDER, as FOLDER/{method}/{model}.yaml: begin with a copy of one in "
        f"{_hparams_root() / method}"
    )


def find_settings(method: str, name_or_path: str | Path) -> Path:
    """A settings file: the path that is given, ``.yaml`` added if it has no ending; else the file that comes with the package under
    that path (``hparams/FT/smollm2-135m.yaml``), or for ``method`` under that name (``smollm2-135m``).

    Raises:
        ConfigError: none of these; the message lists the names there are.
    """
    given = str(name_or_path)
    own = Path(given if given.endswith(SUFFIXES) else given + ".yaml")
    root = _hparams_root()
    shipped = root.joinpath(method, own.name) if own.parent == Path() else root.joinpath(*own.parts[-2:])
    for path in (own, shipped):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in (root / method).glob("*.yaml"))) or "none"
    raise ConfigError(
        f"no such settings file: {own}; give the path of one, or a name of those that come with the package for {method}: {known}"
    )
