"""The `smg` gateway, as it comes from PyPI, in front of a served model."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import openai

PATIENCE_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def gateway(target: str, log: Path) -> Iterator[openai.OpenAI]:
    """An unmodified client of a gateway that has taken the server at `target` for its worker."""
    port, metrics_port = free_port(), free_port()
    options = {
        "host": "127.0.0.1",
        "port": port,
        "prometheus-host": "127.0.0.1",
        "prometheus-port": metrics_port,
        "worker-urls": f"grpc://{target}",
        "worker-startup-check-interval": 1,
        # Every probe counts, so that a test need not wait for several.
        "health-check-interval-secs": 1,
        "health-failure-threshold": 1,
        "health-success-threshold": 1,
        "shutdown-grace-period-secs": 1,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "smg", "launch", *words, "--disable-retries"],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        url = f"http://127.0.0.1:{port}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
            until(lambda: _knows_the_model(client, process), log)
            yield client
    finally:
        process.kill()
        process.wait()


def until(holds: Callable[[], bool], log: Path) -> None:
    """Asks again and again: the gateway tells nobody when its view of a worker changes."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.05)


def _knows_the_model(client: openai.OpenAI, process: subprocess.Popen) -> bool:
    """It has read the tokenizer by then, too."""
    assert process.poll() is None, "the gateway has ended"
    with contextlib.suppress(openai.APIError):
        client.completions.create(model="tiny", prompt="a", max_tokens=1)
        return True
    return False
