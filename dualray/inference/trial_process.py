"""The process that grammars are tried in (`grammar_trial`), as whoever starts it holds it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dualray
from dualray.errors import RequestError
from dualray.inference.grammar_trial import CPU_S, MEMORY_BYTES, encode, read_frame, write_frame
from dualray.inference.grammars import refusal
from dualray.inference.structured_outputs import StructuredOutputs

WALL_S = 30.0
"""Most time of a grammar, or of the process's start, on a machine that has much else to do."""

_ENVIRONMENT = {
    # Arenas of threads reserve more address space than a grammar may take.
    "MALLOC_ARENA_MAX": "1",
    # Nothing is multiplied there.
    "OPENBLAS_NUM_THREADS": "1",
}
_STOPPING = "the server is stopping"
_REASONS = {
    signal.SIGSEGV: "it is nested too deeply",
    signal.SIGBUS: "it is nested too deeply",
    signal.SIGABRT: f"it takes more than {MEMORY_BYTES >> 20} MB of memory",
    signal.SIGPROF: f"it takes more than {CPU_S:g} s of a processor",
    signal.SIGKILL: f"it takes more than {WALL_S:g} s",
}


class TrialProcess:
    """Started when the first grammar comes, and again after one it has died of. Takes one after
    another. Safe to use from several threads."""

    def __init__(self, tokenizer_json: bytes, eos_id: int) -> None:
        self._tokenizer = (tokenizer_json, str(eos_id).encode())
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    @property
    def pid(self) -> int | None:
        """None while there is no process."""
        return None if self._process is None else self._process.pid

    def size_bytes(self, what: StructuredOutputs) -> int:
        """Memory that a matcher holds, of a grammar that can be compiled.

        Raises:
            RequestError: it makes no sense, or takes too much stack, memory or time.
        """
        with self._lock:
            if self._is_closed:
                raise refusal(what, _STOPPING)
            process = self._process or self._start()
            answer = self._ask(process, encode(what))
            if answer is None:
                self._process = None
                reason = _reason(_end(process))
                raise refusal(what, _STOPPING if self._is_closed else reason)
            if answer["spent"]:
                self._process = None
                _end(process)
        if "size_bytes" in answer:
            return answer["size_bytes"]
        raise RequestError(answer["sentence"], hint=answer["hint"], field=answer["field"])

    def close(self) -> None:
        """Ends the process at once; what is being tried in it is refused."""
        self._is_closed = True
        if (process := self._process) is not None:
            process.kill()
        with self._lock:
            process, self._process = self._process, None
            if process is not None:
                process.kill()
                _end(process)

    def _start(self) -> subprocess.Popen[bytes]:
        # What is importable here is there; nothing open here is open there, but its pipes.
        root = str(Path(dualray.__file__).parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "dualray.inference.grammar_trial"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        self._process = process
        if self._is_closed:  # `close` may have looked before there was one
            process.kill()
        if self._ask(process, *self._tokenizer, is_start=True) is None:
            self._process = None
            raise RuntimeError(f"no grammar can be tried: the process has {_end(process)}")
        return process

    def _ask(
        self, process: subprocess.Popen[bytes], *frames: bytes, is_start: bool = False
    ) -> dict[str, Any] | None:
        """Its answer; None if it has died, or was killed for its time."""
        assert process.stdin is not None
        assert process.stdout is not None
        with _killed_after(process, WALL_S):
            try:
                for frame in frames:
                    write_frame(process.stdin, frame)
                answer = read_frame(process.stdout)
            except OSError:  # a broken pipe
                return None
        if answer is None:
            return None
        return {} if is_start else json.loads(answer)


@contextlib.contextmanager
def _killed_after(process: subprocess.Popen[bytes], seconds: float) -> Iterator[None]:
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end(process: subprocess.Popen[bytes]) -> int:
    """Waits for a process that has ended or is about to; its exit code."""
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            assert pipe is not None
            pipe.close()
    with _killed_after(process, WALL_S):
        return process.wait()


def _reason(exit_code: int) -> str:
    return _REASONS.get(-exit_code, f"its trial ended with {exit_code}")  # type: ignore[arg-type]
