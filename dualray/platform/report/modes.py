"""How the run switched between training and serving: processes, memory, and every time it did."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from dualray.platform.metrics import BackToTraining, ModeChange, RunMetrics, Switch
from dualray.platform.mode_words import size
from dualray.platform.readable import number
from dualray.platform.report.html import section, table

_SHOWN = 20


def modes_section(metrics: RunMetrics) -> str:
    """Empty for a run that never did anything but train."""
    if not metrics.mode_changes:
        return ""
    body = ""
    if metrics.switch is not None:
        body += _from_training(metrics.switch)
    if len(metrics.mode_changes) > 1:
        body += _every_time(metrics.mode_changes)
    if metrics.switch is None:
        return section("Modes", body or _every_time(metrics.mode_changes))
    return section("From trainer to server", body)


def _from_training(switch: Switch) -> str:
    same = list(switch.workers_before) == list(switch.workers_after)
    verdict = (
        "The processes that trained are the processes that serve."
        if same
        else "The workers were replaced between training and serving."
    )
    seconds = number(switch.seconds_to_first_token, 2)
    text = f"<p>The first token was served {seconds} s after the last optimizer step. {verdict}</p>"
    head = ["worker", "process id in training", "process id in serving"]
    columns: list[Sequence[str]] = [
        [str(pid) for pid in switch.workers_before],
        [str(pid) for pid in switch.workers_after],
    ]
    for title, sizes in (
        ("optimizer state kept", switch.kept_bytes),
        ("optimizer state parked in host memory", switch.parked_bytes),
        ("optimizer state dropped", switch.dropped_bytes),
        ("gradient buffers given back", switch.gradient_bytes),
        ("latent cache", switch.cache_bytes),
    ):
        if any(sizes):
            head.append(title)
            columns.append([size(each) for each in sizes])
    rows = (
        [str(rank), *cells] for rank, cells in enumerate(zip_longest(*columns, fillvalue="none"))
    )
    return text + table(head, rows)


def _every_time(changes: Sequence[ModeChange]) -> str:
    head = (
        *("after step", "from", "to", "seconds", "what they are", "seconds of draining"),
        *("requests cut short", "optimizer state"),
    )
    more = f"<p>The last {_SHOWN} of {len(changes)} switches:</p>"
    rows = (_row(change) for change in changes[-_SHOWN:])
    return (more if len(changes) > _SHOWN else "") + table(head, rows)


def _row(change: ModeChange) -> tuple[str, ...]:
    if isinstance(change, Switch):
        since = {"train": "last step", "pause": "end of pause"}.get(change.came_from, "start")
        return (
            "-" if change.step is None else f"{change.step:,}",
            change.came_from,
            "serve",
            number(change.seconds_to_first_token, 2),
            f"{since} to first token",
            "-",
            "-",
            change.optimizer or "-",
        )
    drained = change.came_from == "serve"
    ended = (
        number(change.drain_s, 2) if drained else "-",
        str(change.num_cut) if drained else "-",
    )
    if isinstance(change, BackToTraining):
        return (
            f"{change.step - 1:,}",
            change.came_from,
            "train",
            number(change.seconds_to_first_step, 2),
            "workers free to first step",
            *ended,
            change.optimizer,
        )
    return (f"{change.step:,}", change.came_from, "pause", "-", "-", *ended, "-")
