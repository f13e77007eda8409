"""Typed, strict settings from YAML: unknown, missing and wrongly typed keys are errors that name the key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from propmeta_edit.errors import ConfigError, did_you_mean

T = TypeVar("T")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds one mapping.

    Raises:
        ConfigError: no such file, broken YAML (with its line), or something other than a mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no such settings file: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: broken YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of settings, got {type(values).__name__}")
    return values


def build_config(cls: type[T], values: Mapping[str, Any], source: str) -> T:
    """A settings dataclass from plain values, each checked against its type.

    Raises:
        ConfigError: unknown or missing keys, wrong types, or a value the dataclass itself refuses.
    """
    values = without_retired(cls, values, source)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(map(str, set(values) - set(fields)))
    if unknown:
        near = did_you_mean(unknown[0], fields)
        raise ConfigError(f"{source}: unknown setting {', '.join(unknown)}; known are {', '.join(fields)}{near}")
    required = [name for name, f in fields.items() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        raise ConfigError(f"{source}: missing setting {', '.join(missing)}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "settings")
    try:
        parsed = parser.parse_object({"settings": dict(values)})
        config: T = parser.instantiate(parsed).settings
        return config
    except ArgumentError as error:
        raise ConfigError(f"{source}: {_readable(str(error))}") from error
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def without_retired(cls: type, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Settings as a YAML or a card of an earlier version has them, without the switches that ``cls`` had then.

    Args:
        cls: with ``RETIRED``, why each of them went, by name, if it had any.

    Raises:
        ConfigError: one that is on.
    """
    retired: Mapping[str, str] = getattr(cls, "RETIRED", {})
    for name, why in retired.items():
        if values.get(name):
            raise ConfigError(f"{source}: {name} is {values[name]!r}, but the setting is gone: {why}; leave it out")
    return {name: value for name, value in values.items() if name not in retired}


def derive_settings(cls: type[T], source: Any, renamed: Mapping[str, str] = MappingProxyType({})) -> T:
    """A settings dataclass from those attributes of ``source`` that have its fields' names; the other fields keep their defaults.

    Args:
        renamed: by field, the attribute of ``source`` where it has another name.

    Raises:
        ConfigError: a value that the dataclass refuses.
    """
    same = [field.name for field in dataclasses.fields(cls) if field.name not in renamed]  # type: ignore[arg-type]
    names = {**{name: name for name in same if hasattr(source, name)}, **renamed}
    return cls(**{name: getattr(source, given) for name, given in names.items()})


def _readable(message: str) -> str:
    return " ".join(message.replace('"settings.', '"').replace("settings.", "").split())
