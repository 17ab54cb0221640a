"""The command line in processes of its own, as a person runs it, and what it leaves behind."""

from __future__ import annotations

import json
import os
import queue
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil
import yaml

from dualray.data.shards import build

LIMIT_S = 240.0
"""For one thing to happen; on two busy cores a start of Ray and its actors took over a minute."""

WORDS = "the cat sat on a mat while dogs ran and birds flew over green fields".split()


def make_corpus(folder: Path, tokenizer: str = "bytes") -> Path:
    """A few thousand words as token shards in `folder`."""
    rng = random.Random(0)
    text = folder.with_suffix(".txt")
    text.write_text("\n".join(" ".join(rng.choices(WORDS, k=9)) for _ in range(600)))
    build([text], tokenizer, folder)
    return folder


def write_run_file(path: Path, data: Path, **sections) -> Path:
    """A tiny run over `data`; `sections` add to it or replace single fields."""
    values = {
        "name": path.stem,
        "model": {"preset": "tiny"},
        "data": {"path": str(data)},
        "layout": {"pipeline": 2, "experts": 2, "schedule": "dualpipe"},
        "train": {
            "steps": 4, "seq_len": 16, "micro_batches": 4, "micro_batch_size": 1, "lr": 3e-3,
            "eval_batches": 1,
        },
        "serve": {"port": 0},
    }  # fmt: skip
    for name, section in sections.items():
        merge = isinstance(section, dict) and isinstance(values.get(name), dict)
        values[name] = values[name] | section if merge else section
    path.write_text(yaml.safe_dump(values))
    return path


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


class Dualray:
    """`dualray ARGS` in a session of its own, which marks all of its descendants."""

    def __init__(self, *args: str | Path, cwd: Path) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dualray.platform.cli", *map(str, args)],
            cwd=cwd,
            env=environment | {"OMP_NUM_THREADS": "1", "COLUMNS": "500"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._out: list[str] = []
        self._err: list[str] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read, args=(self._process.stdout, self._out, True)),
            threading.Thread(target=self._read, args=(self._process.stderr, self._err, False)),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: IO[str], lines: list[str], is_output: bool) -> None:
        with stream:
            for line in stream:
                lines.append(line)
                if is_output:
                    self._lines.put(line)
        if is_output:
            self._lines.put(None)

    def line(self, pattern: str) -> re.Match[str]:
        """The next line of output that matches; fails once there can be none."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            try:
                line = self._lines.get(timeout=max(deadline - time.monotonic(), 0.01))
            except queue.Empty:
                raise AssertionError(f"no line {pattern!r} within {LIMIT_S} s: {self}") from None
            if line is None:
                raise AssertionError(f"ended without a line {pattern!r}: {self}")
            if match := re.search(pattern, line):
                return match

    def session(self) -> list[psutil.Process]:
        """Every living process of the command's session."""
        return [process for process in psutil.process_iter() if self._owns(process)]

    def _owns(self, process: psutil.Process) -> bool:
        try:
            return os.getsid(process.pid) == self.pid and process.status() != psutil.STATUS_ZOMBIE
        except (ProcessLookupError, psutil.NoSuchProcess):
            return False

    def signal_group(self, number: signal.Signals) -> None:
        """What a terminal does on Ctrl-C."""
        os.killpg(self.pid, number)

    def end(self) -> Ended:
        """Waits for the end; by then every process of its session must be gone."""
        try:
            code = self._process.wait(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end within {LIMIT_S} s: {self}") from None
        left = [process.name() for process in self.session()]
        assert not left, f"processes left behind: {left}"
        return self.ended(code)

    def ended(self, code: int) -> Ended:
        for reader in self._readers:
            reader.join()
        return Ended(code, "".join(self._out), "".join(self._err))

    def kill_session(self) -> None:
        """For a test that has failed: nothing may outlive it."""
        for process in self.session():
            process.kill()
        self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join()

    def __repr__(self) -> str:
        return (
            f"code {self._process.poll()}\n{''.join(self._out[-40:])}\n{''.join(self._err[-40:])}"
        )


@contextmanager
def started(*args: str | Path, cwd: Path) -> Iterator[Dualray]:
    """A running command; whatever is left of it at the end of the block is killed."""
    command = Dualray(*args, cwd=cwd)
    try:
        yield command
    finally:
        command.kill_session()


def dualray(*args: str | Path, cwd: Path) -> Ended:
    """A command from start to end."""
    with started(*args, cwd=cwd) as command:
        return command.end()


def metrics_of(run: Path) -> list[dict]:
    """The records of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses_of(run: Path) -> dict[int, float]:
    """Loss by step, in the order of the file; every step must be there once."""
    rows = [row for row in metrics_of(run) if "loss" in row]
    losses = {row["step"]: row["loss"] for row in rows}
    assert list(losses) == list(range(1, len(rows) + 1))
    return losses


def state_of(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())
