"""Architectures with a name: the YAML files in presets/, each a section `model`."""

from __future__ import annotations

import difflib
from importlib import resources
from typing import Any

import yaml
from pydantic import TypeAdapter

from dualray.errors import ConfigError
from dualray.model.config import ModelConfig

_FOLDER = resources.files("dualray.platform") / "presets"


def preset_names() -> list[str]:
    """Every preset, in alphabetical order."""
    names = (path.name for path in _FOLDER.iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def closest_preset(name: str) -> str | None:
    """The preset that `name` may have been meant to be."""
    return next(iter(difflib.get_close_matches(name, preset_names(), n=1)), None)


def load_preset(name: str) -> dict[str, Any]:
    """The fields of a preset. Raises ConfigError for a name that is none."""
    if name not in preset_names():
        close = closest_preset(name)
        raise ConfigError(
            f"model is {name!r} and must be a preset ({', '.join(preset_names())}) or a mapping",
            hint=f"did you mean {close}?" if close else "name a preset",
        )
    return yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def load_model(name: str) -> ModelConfig:
    """A preset's architecture. Raises ConfigError for a name that is none."""
    return TypeAdapter(ModelConfig).validate_python(load_preset(name))
