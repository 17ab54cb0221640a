"""A run's folder as the report sees it; every part but the folder itself may be missing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dualray.errors import ConfigError, RunError
from dualray.parallel.layout import Layout
from dualray.platform.metrics import RunMetrics
from dualray.platform.metrics_log import read_metrics
from dualray.platform.report.loads import LoadHistory, read_history
from dualray.platform.trace import Trace, read_trace

# A folder with one of these was written by a run.
_SIGNS = ("run.yaml", "run.json", "metrics.jsonl")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What is known about one run."""

    folder: Path
    name: str
    run_yaml: str = ""
    """Text of the run file; empty if there is none."""
    config: dict[str, Any]
    """The parsed run file, unvalidated, so that a report outlives changes of the schema."""
    state: dict[str, Any]
    """The parsed run.json."""
    metrics: RunMetrics
    loads: LoadHistory | None = None
    """Who computed how many tokens; None without experts, and in runs from before tables."""
    trace: Trace | None = None
    kept_checkpoints: tuple[str, ...] = ()
    """Committed checkpoints that are still in the folder, by step."""

    @property
    def layout(self) -> Layout | None:
        section = self.section("layout")
        names = ("pipeline", "experts", "replicas", "schedule")
        try:
            return Layout(**{key: section[key] for key in names if key in section})
        except (ConfigError, TypeError):
            return None

    def section(self, name: str) -> dict[str, Any]:
        """A section of the run file; empty if it is missing or not a mapping."""
        value = self.config.get(name)
        return value if isinstance(value, dict) else {}


def read_run(folder: Path) -> RunRecord:
    """Read a run's folder. Raises RunError if it is none, or if a file in it is damaged."""
    if not folder.is_dir():
        raise RunError(f"{folder} is not a folder", hint=_remedy(folder))
    if not any((folder / sign).exists() for sign in _SIGNS):
        raise RunError(
            f"{folder} holds none of {', '.join(_SIGNS)} and so is not the folder of a run",
            hint=_remedy(folder),
        )
    text = _text(folder / "run.yaml")
    config = _mapping(yaml.safe_load, text, yaml.YAMLError, folder / "run.yaml")
    state = _mapping(json.loads, _text(folder / "run.json"), ValueError, folder / "run.json")
    trace_path = folder / "trace.json"
    trace = read_trace(trace_path) if trace_path.exists() else None
    committed = sorted(
        (path.parent.name for path in folder.glob("checkpoints/step-*/COMMIT")),
        key=lambda name: (len(name), name),
    )
    return RunRecord(
        folder=folder,
        name=str(config.get("name") or state.get("name") or folder.resolve().name),
        run_yaml=text,
        config=config,
        state=state,
        metrics=read_metrics(folder / "metrics.jsonl"),
        loads=read_history(folder / "loads"),
        trace=trace if trace is not None and trace.spans else None,
        kept_checkpoints=tuple(committed),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise RunError(
            f"byte {error.start} of {path} is not UTF-8",
            hint="restore the file or delete it",
        ) from None


def _mapping(parse: Any, text: str, failure: type[Exception], path: Path) -> dict[str, Any]:
    if not text.strip():
        return {}
    try:
        value = parse(text)
    except failure:
        value = None
    if not isinstance(value, dict):
        raise RunError(f"{path} cannot be parsed", hint="restore the file or delete it")
    return value


def _remedy(folder: Path) -> str:
    """Point at the runs nearby, if there are any."""
    for place in (folder, folder.parent, Path("runs")):
        found = sorted({path.parent for sign in _SIGNS for path in place.glob(f"*/{sign}")})
        if found:
            return f"name the folder of a run, for instance {found[0]}"
    return "name a folder that `dualray train` wrote, such as runs/demo"
