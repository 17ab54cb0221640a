"""What a controller is asked to do: a run, and where it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualray.platform.folder import RunFolder
from dualray.platform.run_file import RunFile


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What a controller is asked to do."""

    run: RunFile
    folder: RunFolder
    trains: bool
    """False to serve a checkpoint only."""
    restore_from: Path | None = None
    """Checkpoint to start from."""
    first_step: int = 0
    """Optimizer steps already done: those of a resumed checkpoint, or of a served one."""
    resumes: bool = False
    """Take optimizer state and step from `restore_from`; otherwise its weights only."""
    remembered: dict[str, Any] | None = None
    """What the resumed checkpoint says of the scheduler's decision."""
    placement: dict[str, Any] | None = None
    """What the checkpoint says of where experts lived."""
