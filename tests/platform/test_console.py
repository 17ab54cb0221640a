"""What training prints, on a terminal and off one."""

import io
import math

import pytest
from synthetic_run import make_steps

from dualray.platform.console import LIVE_ROWS, Console, RunSummary
from dualray.platform.metrics import StepMetrics
from dualray.platform.readable import count, duration, number

SUMMARY = RunSummary(
    name="demo",
    model="tiny, 3.4M parameters",
    layout="2 pipeline x 2 expert ranks, dualpipe",
    corpus="data/shakespeare",
    num_steps=40,
    folder="runs/demo",
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def step(number: int, **changes) -> StepMetrics:
    values = {
        "step": number,
        "tokens": 100,
        "loss": 3.25,
        "grad_norm": 0.5,
        "lr": 1e-3,
        "tokens_per_s": 12_345.0,
        "step_time_s": 2.0,
        "bubble": 0.125,
    }
    return StepMetrics(**{**values, **changes})


def test_plain_lines_say_everything_once():
    stream = io.StringIO()
    with Console(stream=stream, clock=lambda: 0.0) as console:
        console.header(SUMMARY)
        console.step(step(1))
        console.note("checkpoint step-1 written")
        console.warn("no held-out text")
        console.step(
            step(2, mtp_loss=(4.5, 5.0), max_vio=0.75, heldout_bits_per_byte=2.125, grad_norm=12.5)
        )
    assert stream.getvalue() == (
        "run     demo in runs/demo\n"
        "model   tiny, 3.4M parameters\n"
        "layout  2 pipeline x 2 expert ranks, dualpipe\n"
        "corpus  data/shakespeare\n"
        "steps   40 steps\n"
        "step  1/40  loss  3.2500  mtp       -  tok/s   12.3k  bubble 12.5 %  maxvio      -"
        "  grad   0.500  held-out      -  lr 1.00e-03  eta  1m18s\n"
        "checkpoint step-1 written\n"
        "warning: no held-out text\n"
        "step  2/40  loss  3.2500  mtp 4.5000/5.0000  tok/s   12.3k  bubble 12.5 %  maxvio   0.75"
        "  grad  12.500  held-out  2.125  lr 1.00e-03  eta     0s\n"
    )


def test_plain_lines_are_aligned_and_have_no_control_codes():
    stream = io.StringIO()
    with Console(stream=stream) as console:
        console.header(SUMMARY)
        for metrics in make_steps(40):
            console.step(metrics)
    lines = stream.getvalue().splitlines()[5:]
    assert len(lines) == 40
    assert {line.index("  held-out") for line in lines} == {lines[0].index("  held-out")}
    assert stream.getvalue().isascii()
    assert all(character.isprintable() for line in lines for character in line)


def test_log_every_keeps_evaluated_steps_and_the_last():
    stream = io.StringIO()
    with Console(stream=stream, log_every=10) as console:
        console.header(RunSummary(name="a", model="", layout="", corpus="", num_steps=23))
        for number_ in range(1, 24):
            heldout = 2.0 if number_ == 7 else None
            console.step(step(number_, heldout_bits_per_byte=heldout))
    shown = [line.split()[1] for line in stream.getvalue().splitlines()[5:]]
    assert shown == ["7/23", "10/23", "20/23", "23/23"]


def test_eta_follows_the_pace_since_the_first_step():
    now = iter((100.0, 110.0, 130.0))
    stream = io.StringIO()
    with Console(stream=stream, clock=lambda: next(now)) as console:
        console.header(SUMMARY)
        for number_ in (11, 12, 13):
            console.step(step(number_))
    # First by the step's own 2 s, then 10 s a step, then 15 s a step.
    etas = [line.split()[-1] for line in stream.getvalue().splitlines()[5:]]
    assert etas == ["58s", "4m40s", "6m45s"]


def test_a_resumed_run_says_where_it_continues():
    done = RunSummary(name="a", model="", layout="", corpus="", num_steps=40, first_step=41)
    stream = io.StringIO()
    Console(stream=stream, live=False).header(done)
    assert "steps   none, the weights have 40" in stream.getvalue()
    summary = RunSummary(name="a", model="", layout="", corpus="", num_steps=40, first_step=21)
    Console(stream=stream).header(summary)
    assert "steps   40 steps, continuing at step 21\n" in stream.getvalue()


def test_live_table_shows_recent_steps_and_leaves_the_cursor(terminal):
    with Console(stream=terminal) as console:
        console.header(SUMMARY)
        for number_ in range(1, 31):
            heldout = 2.345 if number_ == 10 else None
            console.step(step(number_, heldout_bits_per_byte=heldout))
    text = terminal.getvalue()
    last = text[text.rindex("tokens/s") :]
    assert "MaxVio" in last
    assert "held-out bits per byte 2.345 at step 10" in last
    assert "75 %" in last
    rows = [line for line in last.splitlines() if "/40" in line]
    assert len(rows) == LIVE_ROWS
    assert "30/40" in rows[-1]
    # Hidden while drawing, shown again at the end.
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_live_table_shows_the_newest_step_between_logged_ones(terminal):
    with Console(stream=terminal, log_every=10) as console:
        console.header(SUMMARY)
        for number_ in range(1, 14):
            console.step(step(number_))
    last = terminal.getvalue()[terminal.getvalue().rindex("tokens/s") :]
    assert [row for row in ("10/40", "12/40", "13/40") if row in last] == ["10/40", "13/40"]


def test_narrow_terminal_drops_columns_instead_of_cutting_them(terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with Console(stream=terminal) as console:
        console.header(SUMMARY)
        console.step(step(1))
    last = terminal.getvalue()
    assert "held-out b/B" not in last
    assert "ETA" in last
    assert "\u2026" not in last


def test_notes_and_warnings_are_printed_as_they_are(terminal):
    with Console(stream=terminal) as console:
        console.header(SUMMARY)
        console.step(step(1))
        console.note("saved [bold]runs/demo[/bold]")
        console.warn("low memory")
    assert "saved [bold]runs/demo[/bold]" in terminal.getvalue()
    assert "warning: low memory" in terminal.getvalue()


def test_close_after_an_error_and_twice(terminal):
    console = Console(stream=terminal)

    def fail():
        with console:
            console.header(SUMMARY)
            console.step(step(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    console.close()
    assert terminal.getvalue().endswith("\x1b[?25h")


def test_dumb_terminal_gets_plain_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with Console(stream=terminal) as console:
        console.header(SUMMARY)
        console.step(step(1))
    assert "\x1b" not in terminal.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999.4, "999"),
        (999.5, "1.00k"),
        (12_345, "12.3k"),
        (999_499, "999k"),
        (999_500, "1.00M"),
        (671e9, "671B"),
        (14.8e12, "14.8T"),
        (5e18, "5000000T"),
        (math.inf, "inf"),
    ],
)
def test_count(value, text):
    assert count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m00s"), (187, "3m07s"), (8040, "2h14m"), (273_600, "3d04h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(1.23456, "1.235"), (-0.5, "-0.500"), (123_456.0, "1.23e+05")]
)
def test_number(value, text):
    assert number(value, 3) == text
    assert number(math.nan, 3) == "nan"
