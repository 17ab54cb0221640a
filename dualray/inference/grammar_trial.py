"""Tries grammars in a process of its own, which may die of them.

The compiler recurses once for each rule or reference, and what a regular expression takes is
only known once it was taken: limits of the library bound neither stack nor memory. So a grammar
is compiled here first, on a stack, in an address space and in a processor's time that are
limited, and nothing else is lost when they run out. It ends with its standard input, and thus
with whoever started it. Frames either way are a length of four bytes, big-endian, and JSON:

    < the tokenizer (its own bytes), then the id of its end
    > null, once it can be used
    < fields of a `StructuredOutputs`
    > {"size_bytes"}, or {"sentence", "hint", "field"}; with {"spent": true} it ends afterwards
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import resource
import signal
import sys
import threading
from typing import IO

from dualray.errors import RequestError
from dualray.inference.grammar_matcher import GrammarMatcher
from dualray.inference.grammars import Grammars
from dualray.inference.structured_outputs import StructuredOutputs
from dualray.inference.token_masks import ids_in

MEMORY_BYTES = 64 << 20
"""Address space of a grammar, from its text to its first masks."""
CPU_S = 1.0
"""Processor time of the same."""
STACK_BYTES = 4 << 20
"""Who compiles a grammar that has passed must have a stack of at least this. Chains of 400
references need less, of 900 more."""

_NUM_STEPS = 8


def write_frame(to: IO[bytes], data: bytes) -> None:
    to.write(len(data).to_bytes(4, "big") + data)
    to.flush()


def read_frame(source: IO[bytes]) -> bytes | None:
    """None where the other side has ended."""
    size = int.from_bytes(head, "big") if len(head := source.read(4)) == 4 else 0
    data = source.read(size)
    return data if data and len(data) == size else None


def encode(what: StructuredOutputs) -> bytes:
    return json.dumps(dataclasses.asdict(what)).encode()


def decode(data: bytes) -> StructuredOutputs:
    values = json.loads(data)
    return StructuredOutputs(**values | {"choice": tuple(values["choice"])})


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A signal that the starter ignores would be ignored here.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_serve, args=(sys.stdin.buffer, sys.stdout.buffer))
    thread.start()
    thread.join()


def _serve(source: IO[bytes], to: IO[bytes]) -> None:
    tokenizer, eos_id = read_frame(source), read_frame(source)
    if tokenizer is None or eos_id is None:
        return
    grammars = Grammars(tokenizer, int(eos_id))
    with contextlib.suppress(RequestError):  # told to whoever asks
        grammars.compile(StructuredOutputs(regex="a"))
    start_bytes = _address_space_bytes()
    write_frame(to, b"null")
    while (data := read_frame(source)) is not None:
        what = decode(data)
        _limit(_address_space_bytes() + MEMORY_BYTES, CPU_S)
        answer = _try(grammars, what)
        _limit(None, 0)
        spent = _address_space_bytes() > start_bytes + MEMORY_BYTES // 2
        write_frame(to, json.dumps(answer | {"spent": spent}).encode())
        if spent:  # what an allocator keeps would add up
            return


def _try(grammars: Grammars, what: StructuredOutputs) -> dict[str, object]:
    before_bytes = _resident_bytes()
    try:
        matcher = grammars.compile(what)
        _walk(matcher)
    except RequestError as error:
        return {"sentence": error.sentence, "hint": error.hint, "field": error.field}
    return {"size_bytes": max(0, _resident_bytes() - before_bytes)}


def _walk(matcher: GrammarMatcher) -> None:
    """Some steps of a completion; one that ends by its limits ends only itself."""
    for _ in range(_NUM_STEPS):
        tokens = [token for token in ids_in(matcher.allowed()) if token != matcher.eos_id]
        if not tokens or not matcher.accept(tokens[len(tokens) // 2]):
            return


def _limit(memory_bytes: int | None, cpu_s: float) -> None:
    """Whatever exceeds these ends the process: by SIGABRT and SIGPROF. None and 0: no limit."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard if memory_bytes is None else memory_bytes, hard))
    signal.setitimer(signal.ITIMER_PROF, cpu_s)


def _address_space_bytes() -> int:
    return _pages()[0]


def _resident_bytes() -> int:
    with contextlib.suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    return _pages()[1]


def _pages() -> tuple[int, int]:
    with open("/proc/self/statm") as statm:
        size, resident = statm.read().split()[:2]
    return int(size) * _PAGE_BYTES, int(resident) * _PAGE_BYTES


_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
