"""Learning rate as a pure function of the step: linear warm-up, then a cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dualray.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LrConfig:
    """Peak, floor and length of the learning-rate schedule."""

    lr: float = 3e-4
    """Peak learning rate, reached at the end of the warm-up; above 0."""
    min_lr: float = 3e-5
    """Learning rate at the end of the cosine; 0 to `lr`."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up; the first step uses lr / warmup_steps."""
    steps: int = 1
    """Optimizer steps of the run or of its phase; the cosine reaches `min_lr` after the last."""

    def __post_init__(self) -> None:
        if not 0 < self.lr < float("inf"):
            raise ConfigError(
                f"train.lr is {self.lr} and must be above 0", hint="set train.lr to, say, 3e-4"
            )
        if not 0 <= self.min_lr <= self.lr:
            raise ConfigError(
                f"train.min_lr is {self.min_lr} and must lie between 0 and train.lr = {self.lr}",
                hint=f"set train.min_lr to {self.lr / 10:g}",
            )
        if self.steps < 1:
            raise ConfigError(
                f"train.steps is {self.steps} and must be at least 1", hint="set train.steps to 1"
            )
        if not 0 <= self.warmup_steps <= self.steps:
            raise ConfigError(
                f"train.warmup_steps is {self.warmup_steps} and must lie between 0 and "
                f"train.steps = {self.steps}",
                hint=f"set train.warmup_steps to {self.steps // 10}",
            )


def lr_at(step: int, config: LrConfig) -> float:
    """Learning rate of optimizer step `step`, counted from 0; `min_lr` past the end."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return config.min_lr + (config.lr - config.min_lr) * cosine
