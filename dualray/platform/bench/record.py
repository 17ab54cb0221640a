"""Where a measurement was made: machine and versions, as one JSON line per run.

A figure without its machine is worthless a month later, so every line carries both.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import dualray
from dualray.errors import ConfigError

_PEERS = ("torch", "transformers")


def new_record(
    benchmark: str, config: dict[str, Any], results: list[dict[str, Any]]
) -> dict[str, Any]:
    """The JSON object of one run; `time` is UTC."""
    return {
        "benchmark": benchmark,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "config": config,
        "results": results,
    }


def machine() -> dict[str, Any]:
    """Processor name, cores this process may use, torch threads it does use."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str | None]:
    """Of Python, ours and the peers'; None for what is not installed or not a checkout."""
    return {
        "python": platform.python_version(),
        "dualray": dualray.__version__,
        "commit": _commit(),
        **{name: _version(name) for name in _PEERS},
    }


def check_target(path: Path | None) -> None:
    """Raises ConfigError if `append` could not write there: before minutes of measuring."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise _refused(path, os.strerror(errno.ENOENT))
    if path.is_dir():
        raise _refused(path, os.strerror(errno.EISDIR))
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise _refused(path, os.strerror(errno.EACCES))


def append(path: Path, record: dict[str, Any]) -> None:
    """Add `record` to `path` as one line, in a single write. Raises ConfigError."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise _refused(path, str(error.strerror)) from None


def _refused(path: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"--record is {path} and cannot be written ({reason})",
        hint="name a file in a folder that exists",
    )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with `-dirty` behind it where tracked files were changed."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    folder = Path(dualray.__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
