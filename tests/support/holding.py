"""Work of a thread that a test holds up."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest


@contextlib.contextmanager
def held(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Calls of a method begin within, which the event tells, and go on afterwards."""
    begun, released = threading.Event(), threading.Event()
    method = getattr(owner, name)

    def wait_and_go_on(*args: Any) -> Any:
        begun.set()
        assert released.wait(60)
        return method(*args)

    monkeypatch.setattr(owner, name, wait_and_go_on)
    try:
        yield begun
    finally:
        released.set()
