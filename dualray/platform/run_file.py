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
from dualray.parallel.experts_config import ExpertsConfig
from dualray.parallel.held import split_layers
from dualray.parallel.layout import Layout
from dualray.parallel.phases import ExtendConfig, Phase, plan_phases
from dualray.parallel.train_config import TrainConfig
from dualray.platform.preset import load_preset
from dualray.platform.scheduler import SchedulerConfig
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
    extend: ExtendConfig | None = None
    """Further phases at longer contexts."""
    layout: Layout = field(default_factory=Layout)
    """Workers and the schedule that drives them."""
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    """Where routed experts live, and how tokens get to them."""
    serve: ServeConfig = field(default_factory=ServeConfig)
    """What happens after the last step."""
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    """How schedule, micro-batches and cut are decided where layout.schedule is auto."""
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
        if not self.train.steps and (self.extend is None or self.train.init_from is None):
            raise ConfigError(
                "train.steps is 0 and must be at least 1, unless section extend continues "
                "train.init_from",
                hint="set train.steps to 1 or more",
            )
        start = self.layout.concrete
        schedule = make_schedule(start.schedule, start.pipeline, self.train.micro_batches)
        split_layers(self.model.num_hidden_layers, schedule.num_stages, start.layers)
        self.experts.first_placement(self.model, self.layout)
        if not self.layout.is_open and self.scheduler != SchedulerConfig():
            raise ConfigError(
                f"section scheduler is given and layout.schedule is {self.layout.schedule}, which "
                "leaves nothing to decide",
                hint="set layout.schedule to auto, or remove section scheduler",
            )
        if self.serve.compile_batch and self.layout.experts > 1:
            raise ConfigError(
                f"serve.compile_batch is {self.serve.compile_batch} and layout.experts is "
                f"{self.layout.experts}, but a step that exchanges tokens cannot be compiled",
                hint="leave serve.compile_batch out, or serve with layout.experts=1",
            )
        if self.train.dtype == "float64" and self.train.optimizer == "zero1":
            raise ConfigError(
                "train.optimizer is zero1 and train.dtype is float64, but zero1 keeps fp32 masters",
                hint="set train.optimizer to adamw",
            )
        self.phases()

    def phases(self) -> tuple[Phase, ...]:
        """What the workers do step by step; the last phase's model is the one that serves."""
        return plan_phases(self.model, self.train, self.layout.concrete, self.extend)


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
    _fill_in_original_context(merged)
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
        values["model"] = load_preset(str(model["preset"])) | own


def _fill_in_original_context(values: dict[str, Any]) -> None:
    """What is extended is the model's own context, unless section `extend` says otherwise."""
    extend, model = values.get("extend"), values.get("model")
    if not isinstance(extend, Mapping) or not isinstance(model, Mapping):
        return
    yarn, context = extend.get("rope_scaling"), model.get("max_position_embeddings")
    if isinstance(yarn, Mapping) and context is not None:
        filled = {"original_max_position_embeddings": context} | dict(yarn)
        values["extend"] = dict(extend) | {"rope_scaling": filled}


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r} is not KEY=VALUE", hint="write, say, train.steps=10")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(
            f"--set {override!r} has a value that is not YAML", hint="quote it for the shell"
        ) from None
    values |= _with(values, key.split("."), value)


def _with(values: Any, path: Sequence[str], value: Any) -> Any:
    """A copy of nested mappings and lists in which the place `path` holds `value`."""
    if not path:
        return value
    first, *rest = path
    if isinstance(values, list) and first.isdecimal() and int(first) < len(values):
        at = int(first)
        return [*values[:at], _with(values[at], rest, value), *values[at + 1 :]]
    known = values if isinstance(values, Mapping) else {}
    return {**known, first: _with(known.get(first), rest, value)}


def _refuse_unknown_keys(cls: type, values: Any, prefix: str) -> None:
    if isinstance(values, Sequence) and not isinstance(values, str):
        for number, value in enumerate(values):
            _refuse_unknown_keys(cls, value, f"{prefix}{number}.")
        return
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
