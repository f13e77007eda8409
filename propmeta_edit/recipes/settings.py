"""The settings that come with the package, one YAML a method and model."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from propmeta_edit.errors import ConfigError


def has_hparams(method: str, model: str) -> bool:
    """Whether settings for a method and a model come with the package."""
    return (_hparams_root() / method / f"{model}.yaml").is_file()


def _hparams_root() -> Path:
    beside_the_package = Path(__file__).resolve().parents[2] / "hparams"
    return beside_the_package if beside_the_package.is_dir() else Path(str(resources.files("propmeta_edit") / "hparams"))


def hparams_file(method: str, model: str) -> Path:
    """The settings that come with the package for a method and a model, e.g. ``("MetaTrain", "smollm2-135m")``.

    Raises:
        ConfigError: there are none; the message lists those there are.
    """
    root = _hparams_root()
    path = root / method / f"{model}.yaml"
    if not path.is_file():
        known = sorted(str(p.relative_to(root)) for p in root.glob("*/*.yaml"))
        raise ConfigError(f"no settings for {method} on {model!r}; there are {', '.join(known)}")
    return path
