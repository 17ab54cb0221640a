"""A run's folder: runs/NAME with run.yaml, run.json, metrics, loads, trace, checkpoints, report."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dualray.errors import RunError

RUNS = Path("runs")


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run. Nothing is created before `create`."""

    path: Path

    @classmethod
    def named(cls, name: str) -> RunFolder:
        """runs/NAME below the working directory, as an absolute path: actors have another one."""
        return cls((RUNS / name).absolute())

    @classmethod
    def find(cls, name_or_path: str) -> RunFolder:
        """The folder of an existing run, by name or by path. Raises RunError if there is none."""
        for path in (RUNS / name_or_path, Path(name_or_path)):
            if (path / "run.json").is_file():
                return cls(path.absolute())
        known = sorted(p.parent.name for p in RUNS.glob("*/run.json"))
        raise RunError(
            f"run {name_or_path} has no run.json in {RUNS / name_or_path}",
            hint=f"runs here: {', '.join(known)}" if known else "no run was started here yet",
        )

    @property
    def run_yaml(self) -> Path:
        return self.path / "run.yaml"

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def loads(self) -> Path:
        """Folder of the tables that say how many tokens each expert computed."""
        return self.path / "loads"

    @property
    def trace(self) -> Path:
        return self.path / "trace.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    def refuse_if_used(self) -> None:
        """Raises RunError if an earlier run left metrics or checkpoints here."""
        from dualray.checkpoint.store import steps  # loads torch, which `status` has no use for

        can_resume = bool(steps(self.checkpoints))
        for left in (self.metrics, self.checkpoints):
            if left.exists():
                raise RunError(
                    f"{_shown(self.path)} already holds the {left.name} of a run",
                    hint="continue it with --resume, or give this run another name"
                    if can_resume
                    else "it has no checkpoint: delete it, or give this run another name",
                )

    def create(self, configuration: dict[str, Any]) -> None:
        """Make the folder and write the complete configuration."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.run_yaml.write_text(yaml.safe_dump(configuration, sort_keys=False), encoding="utf-8")

    def write_state(self, state: dict[str, Any]) -> None:
        """Replace run.json at once; readable by its owner only, since it may hold Ray's token."""
        temporary = self.run_json.with_suffix(".tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(state, file, indent=1)
        temporary.replace(self.run_json)

    def read_state(self) -> dict[str, Any]:
        return json.loads(self.run_json.read_text(encoding="utf-8"))


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
