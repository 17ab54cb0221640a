"""The run file: YAML in, frozen configuration out, or one sentence about what is wrong.

Sections are the dataclasses that lie beside what they configure; this file only composes
them, checks what spans several of them, and refuses keys nobody knows.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from dualray.actors.cluster import ClusterConfig
from dualray.data.loader import DataConfig
from dualray.errors import ConfigError
from dualray.inference.serve_config import ServeConfig
from dualray.k8s.config import KubernetesConfig
from dualray.model.config import ModelConfig
from dualray.parallel.held import split_layers
from dualray.parallel.layout import Layout
from dualray.parallel.placement import contiguous_placement
from dualray.parallel.train_config import TrainConfig
from dualray.schedule.make import make_schedule

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class RunFile:
    """One run, from text to served model."""

    name: str
    """Name of the run; its folder is runs/NAME."""
    model: ModelConfig
    """The architecture, or the name of a preset."""
    data: DataConfig
    """Token shards."""
    train: TrainConfig
    """Steps, batches, optimizer."""
    layout: Layout = field(default_factory=Layout)
    """Workers and the schedule that drives them."""
    serve: ServeConfig = field(default_factory=ServeConfig)
    """What happens after the last step."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Where the workers run."""
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)
    """What `dualray k8s render` writes besides."""
    seed: int = 0
    """Seeds initialisation and the order of samples."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"name is {self.name!r} and must be letters, digits, '.', '_' or '-', starting "
                "with a letter or digit",
                hint="choose a name that can be a folder",
            )
        if self.train.seq_len > self.model.max_position_embeddings:
            raise ConfigError(
                f"train.seq_len {self.train.seq_len} exceeds model.max_position_embeddings "
                f"{self.model.max_position_embeddings}",
                hint="shorten the sequences or raise model.max_position_embeddings",
            )
        schedule = make_schedule(
            self.layout.schedule, self.layout.pipeline, self.train.micro_batches
        )
        split_layers(self.model.num_hidden_layers, schedule.num_stages)
        contiguous_placement(self.model, self.layout.experts)
        if self.train.dtype == "float64" and self.train.optimizer == "zero1":
            raise ConfigError(
                "train.optimizer is zero1 and train.dtype is float64, but zero1 keeps fp32 masters",
                hint="set train.optimizer to adamw",
            )


def load_run_file(path: Path | str, overrides: Sequence[str] = ()) -> RunFile:
    """Read a run file and apply `KEY.KEY=VALUE` overrides, whose values are YAML.

    Raises ConfigError naming the file or field.
    """
    return parse_run_file(read_mapping(Path(path)), overrides)


class _StrictLoader(yaml.SafeLoader):
    """YAML whose mappings name every key once; plain YAML keeps the last of equals silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_mapping(path: Path) -> dict[str, Any]:
    """The YAML mapping in a file. Raises ConfigError if there is none."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except FileNotFoundError:
        raise ConfigError(f"run file {path} does not exist", hint="check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"run file {path} cannot be read ({error})", hint="check it") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where is not None else ""
        problem = getattr(error, "problem", None) or "bad syntax"
        raise ConfigError(f"run file {path}{line} is not YAML ({problem})", hint="fix it") from None
    if not isinstance(values, dict):
        raise ConfigError(f"run file {path} holds no sections", hint="see examples/") from None
    return values


def parse_run_file(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunFile:
    """Check and convert the contents of a run file."""
    merged: dict[str, Any] = dict(values)
    _name_preset(merged)
    for override in overrides:
        _apply(merged, override)
        _name_preset(merged)
    _fill_in_preset(merged)
    _refuse_unknown_keys(RunFile, merged, "")
    try:
        return TypeAdapter(RunFile).validate_python(merged)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"].startswith("missing"):
            raise ConfigError(f"{where} is missing", hint=f"set {where}") from None
        message = first["msg"][0].lower() + first["msg"][1:]
        raise ConfigError(
            f"{where} is {first['input']!r}: {message}", hint=f"correct {where}"
        ) from None


def to_mapping(run: RunFile) -> dict[str, Any]:
    """The complete configuration as plain data; `parse_run_file` takes it back."""
    return dataclasses.asdict(run)


def _name_preset(values: dict[str, Any]) -> None:
    """`model: demo` means `model: {preset: demo}`; overrides may change either."""
    if isinstance(values.get("model"), str):
        values["model"] = {"preset": values["model"]}


def _fill_in_preset(values: dict[str, Any]) -> None:
    """Replace a preset's name by its values, under what the run file says itself."""
    model = values.get("model")
    if isinstance(model, Mapping) and "preset" in model:
        own = {key: value for key, value in model.items() if key != "preset"}
        values["model"] = _preset(str(model["preset"])) | own


def _preset(name: str) -> dict[str, Any]:
    folder = resources.files("dualray.platform") / "presets"
    known = sorted(
        p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml")
    )
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(
            f"model is {name!r} and must be a preset ({', '.join(known)}) or a mapping",
            hint=f"did you mean {close[0]}?" if close else "name a preset",
        )
    return yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r} is not KEY=VALUE", hint="write, say, train.steps=10")
    *sections, last = key.split(".")
    target = values
    for section in sections:
        inner = target.get(section)
        target[section] = dict(inner) if isinstance(inner, Mapping) else {}
        target = target[section]
    try:
        target[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(
            f"--set {override!r} has a value that is not YAML", hint="quote it for the shell"
        ) from None


def _refuse_unknown_keys(cls: type, values: Any, prefix: str) -> None:
    if not isinstance(values, Mapping):
        return
    hints = get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key, value in values.items():
        if key not in names:
            close = difflib.get_close_matches(str(key), names, n=1)
            raise ConfigError(
                f"{prefix}{key} is not a field of the run file",
                hint=f"did you mean {prefix}{close[0]}?"
                if close
                else f"{prefix.rstrip('.') or 'the run file'} has {', '.join(names)}",
            )
        for candidate in (hints[key], *getattr(hints[key], "__args__", ())):
            if dataclasses.is_dataclass(candidate) and isinstance(candidate, type):
                _refuse_unknown_keys(candidate, value, f"{prefix}{key}.")
