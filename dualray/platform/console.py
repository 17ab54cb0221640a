"""What `dualray train` prints: a live table on a terminal, plain aligned lines elsewhere.

Both show the same columns, decided by `cells`; the rest is drawing. The live table is
redrawn when a step arrives and by nothing else, so there is no thread to outlive a crash.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TextIO

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dualray.platform.metrics import StepMetrics
from dualray.platform.readable import count, duration, number

LIVE_ROWS = 12
MISSING = "-"
# What a narrow terminal loses first; the line below the table names the held-out value anyway.
_DISPENSABLE = ("held-out b/B", "lr", "grad norm", "MaxVio", "bubble")

# Title over the live column, label in the plain line, width of the value.
_COLUMNS = (
    ("step", "step", 0),
    ("loss", "loss", 7),
    ("MTP loss", "mtp", 7),
    ("tokens/s", "tok/s", 7),
    ("bubble", "bubble", 6),
    ("MaxVio", "maxvio", 6),
    ("grad norm", "grad", 7),
    ("held-out b/B", "held-out", 6),
    ("lr", "lr", 8),
    ("ETA", "eta", 6),
)


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What the console says about a run before its first step."""

    name: str
    """Name of the run."""
    model: str
    """The model in words, such as `tiny, 3.1M parameters (1.2M active)`."""
    layout: str
    """The layout in words, such as `2 pipeline x 2 expert ranks, dualpipe`."""
    corpus: str
    """The corpus in words, such as `data/shakespeare, 1.3M tokens`."""
    num_steps: int
    """Optimizer steps of the whole run."""
    first_step: int = 1
    """The step that comes next; above 1 when the run is resumed."""
    folder: str = ""
    """Where the run writes, such as `runs/demo`."""
    phases: str = ""
    """The run's phases in words, if it has several."""


def cells(metrics: StepMetrics, num_steps: int, eta_s: float | None) -> tuple[str, ...]:
    """The texts of one step, in the order of the columns."""
    depths = "/".join(number(loss, 4) for loss in metrics.mtp_loss)
    width = len(str(num_steps))
    return (
        f"{metrics.step:>{width}}/{num_steps}",
        number(metrics.loss, 4),
        depths or MISSING,
        count(metrics.tokens_per_s),
        f"{100 * metrics.bubble:.1f} %",
        MISSING if metrics.max_vio is None else number(metrics.max_vio, 2),
        number(metrics.grad_norm, 3),
        MISSING
        if metrics.heldout_bits_per_byte is None
        else number(metrics.heldout_bits_per_byte, 3),
        f"{metrics.lr:.2e}",
        MISSING if eta_s is None else duration(eta_s),
    )


class Console:
    """Shows a run's progress on a stream; a context manager.

    `live` draws a table in place and defaults to whether the stream is a capable terminal.
    Otherwise every `log_every`th step, the last one and each evaluated one make a line.
    """

    def __init__(
        self,
        *,
        stream: TextIO | None = None,
        log_every: int = 1,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._log_every = max(1, log_every)
        self._rich = RichConsole(file=self._stream, highlight=False)
        capable = self._stream.isatty() and not self._rich.is_dumb_terminal
        self._is_live = capable if live is None else live
        self._live: Live | None = None
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._num_steps = 0
        self._latest: tuple[str, ...] = ()
        self._latest_step = 0
        self._heldout = MISSING
        self._rows: deque[tuple[int, tuple[str, ...]]] = deque(maxlen=LIVE_ROWS)

    def header(self, summary: RunSummary) -> None:
        """Say what is about to run; call it before the first step."""
        self._num_steps = summary.num_steps
        steps = f"{summary.num_steps} steps"
        if summary.first_step > summary.num_steps:
            steps = f"none, the weights have {summary.first_step - 1}"
        elif summary.first_step > 1:
            steps += f", continuing at step {summary.first_step}"
        facts = (
            ("run", summary.name + (f" in {summary.folder}" if summary.folder else "")),
            ("model", summary.model),
            ("layout", summary.layout),
            ("corpus", summary.corpus),
            ("steps", steps),
            *([("phases", summary.phases)] if summary.phases else []),
        )
        for title, text in facts:
            self._say(f"{title:<8}{text}", style="bold" if title == "run" else "")

    def step(self, metrics: StepMetrics) -> None:
        """Show one finished step."""
        self._latest_step = metrics.step
        self._latest = cells(metrics, self._num_steps, self._eta_s(metrics))
        heldout = metrics.heldout_bits_per_byte
        last = metrics.step == self._num_steps
        keep = metrics.step % self._log_every == 0 or heldout is not None or last
        if keep:
            self._rows.append((metrics.step, self._latest))
        if heldout is not None:
            self._heldout = f"{number(heldout, 3)} at step {metrics.step}"
        if not self._is_live:
            if keep:
                self._say(_plain(self._latest))
            return
        if self._live is None:
            self._live = Live(console=self._rich, auto_refresh=False)
            self._live.start()
        self._live.update(self._picture(), refresh=True)

    def note(self, text: str) -> None:
        """Say something that belongs between the steps."""
        self._say(text)

    def warn(self, text: str) -> None:
        """Say something that the reader should not miss."""
        self._say(f"warning: {text}", style="bold yellow")

    def close(self) -> None:
        """Leave the last picture standing; safe to call twice and after an error."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _say(self, text: str, style: str = "") -> None:
        if self._is_live:
            self._rich.print(Text(text, style=style))
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

    def _eta_s(self, metrics: StepMetrics) -> float | None:
        """Seconds left at the pace since this console's first step, all pauses included."""
        now = self._clock()
        if self._first is None:
            self._first = (metrics.step, now)
        step, then = self._first
        done = metrics.step - step
        pace_s = (now - then) / done if done > 0 else metrics.step_time_s
        return max(0, self._num_steps - metrics.step) * pace_s

    def _picture(self) -> Group:
        rows = [row for _, row in self._rows]
        if not self._rows or self._rows[-1][0] != self._latest_step:
            rows.append(self._latest)
        shown = _columns_that_fit(rows, self._rich.width)
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 1))
        for column in shown:
            title, _, width = _COLUMNS[column]
            table.add_column(title, justify="right", no_wrap=True, min_width=width)
        for row in rows:
            cells_shown = [row[column] for column in shown]
            table.add_row(*cells_shown, style="bold" if row is self._latest else "")
        bar = ProgressBar(total=max(1, self._num_steps), completed=self._latest_step, width=40)
        foot = Table.grid(padding=(0, 2))
        done = 100 * self._latest_step / max(1, self._num_steps)
        foot.add_row(bar, Text(f"{done:.0f} %"), Text(f"held-out bits per byte {self._heldout}"))
        return Group(table, foot)


def _columns_that_fit(rows: list[tuple[str, ...]], width: int) -> list[int]:
    """Indices of the columns to draw on a terminal so many characters wide."""
    widths = [
        max(len(title), least, *(len(row[column]) for row in rows)) + 2
        for column, (title, _, least) in enumerate(_COLUMNS)
    ]
    shown = list(range(len(_COLUMNS)))
    for name in _DISPENSABLE:
        if sum(widths[column] for column in shown) - 2 <= width:
            break
        shown = [column for column in shown if _COLUMNS[column][0] != name]
    return shown


def _plain(row: tuple[str, ...]) -> str:
    return "  ".join(
        f"{label} {text:>{width}}" for (_, label, width), text in zip(_COLUMNS, row)
    ).rstrip()
