"""What a switch of modes means in words, for the console and for who asked for it."""

from __future__ import annotations

from collections.abc import Sequence

from dualray.actors.mode_answer import ModeAnswer
from dualray.platform.metrics import BackToTraining, ModeChange, Paused, Switch
from dualray.platform.modes import Mode


def sentences(change: ModeChange, *, has_device: bool = True) -> tuple[str, ...]:
    """One sentence or more; `has_device` says whether the workers have a memory of their own."""
    if isinstance(change, Switch):
        return (_first_token(change), *_memory(change, has_device))
    if isinstance(change, BackToTraining):
        since = "the workers were free" if change.came_from == Mode.SERVE else "the pause ended"
        return (
            f"training again, step {change.step} ended {change.seconds_to_first_step:.2f} s after "
            f"{since}{_drained(change)}",
        )
    return (f"paused after step {change.step}{_drained(change)}",)


def answer(change: ModeChange, *, step: int, target: str | None, has_device: bool) -> ModeAnswer:
    """The same for who asked; `step` is the number of optimizer steps done."""
    said = sentences(change, has_device=has_device)
    if isinstance(change, Switch):
        return ModeAnswer(
            mode=str(Mode.SERVE),
            switched=True,
            step=step,
            sentences=(f"serving at {target}", *said),
            came_from=change.came_from,
            target=target,
            first_token_s=change.seconds_to_first_token,
            optimizer=change.optimizer,
            kept_bytes=tuple(change.kept_bytes),
            parked_bytes=tuple(change.parked_bytes),
            dropped_bytes=tuple(change.dropped_bytes),
            gradient_bytes=tuple(change.gradient_bytes),
            cache_bytes=tuple(change.cache_bytes),
        )
    back = isinstance(change, BackToTraining)
    return ModeAnswer(
        mode=str(Mode.TRAIN if back else Mode.PAUSE),
        switched=True,
        step=step,
        sentences=said,
        came_from=change.came_from,
        first_step_s=change.seconds_to_first_step if back else None,
        drain_s=change.drain_s,
        num_cut=change.num_cut,
        optimizer=change.optimizer if back else None,
    )


def _first_token(change: Switch) -> str:
    seconds = f"first token {change.seconds_to_first_token:.2f} s after"
    if change.came_from != Mode.TRAIN:
        ended = "the pause ended" if change.came_from == Mode.PAUSE else "the switch began"
        return f"{seconds} {ended}"
    whole = f"{seconds} the last optimizer step"
    if change.switch_s is None:
        return whole
    return (
        f"{whole} ({change.switch_s:.2f} s for the switch itself, before it held-out evaluation "
        "and checkpoint)"
    )


def _memory(change: Switch, has_device: bool) -> tuple[str, ...]:
    cache = f"latent cache {in_all(change.cache_bytes)}"
    if change.optimizer is None:
        return (cache,)
    where, sizes = {
        "keep": ("kept where it is", change.kept_bytes),
        "park": ("parked in host memory", change.parked_bytes),
        "drop": ("dropped", change.dropped_bytes),
    }[change.optimizer]
    if change.optimizer == "park" and not has_device:
        where += ", where it always is without a GPU"
    freed = ""
    if any(change.gradient_bytes):
        freed = f", gradient buffers of {in_all(change.gradient_bytes)} given back"
    return (f"optimizer state {where}: {in_all(sizes)}{freed}; {cache}",)


def _drained(change: BackToTraining | Paused) -> str:
    if change.came_from != Mode.SERVE:
        return ""
    cut = f", {change.num_cut} did not and were ended" if change.num_cut else ""
    return f" (accepted requests ended in {change.drain_s:.2f} s{cut})"


def in_all(sizes: Sequence[int]) -> str:
    """Bytes over all workers, and of the fullest one if there are several."""
    if not sizes:
        return "none"
    text = size(sum(sizes))
    return f"{text} ({size(max(sizes))} on the fullest worker)" if len(sizes) > 1 else text


def size(num_bytes: float) -> str:
    """Bytes in a few characters: 12.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
