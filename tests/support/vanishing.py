"""A worker's door on another emulated host, at the end of a cable that can be pulled."""

from __future__ import annotations

import ctypes
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from dualray.actors.plan_channel import Door
from dualray.platform.bench.hosts import Host, emulated_hosts

_CLONE_NEWNET = 0x40000000  # os.setns and its flags come with Python 3.12
_WORKER = """
import pickle, sys, time
from dualray.actors.plan_channel import PlanDoor

door = PlanDoor(sys.argv[1], lambda plan: time.sleep(plan.step))
print(pickle.dumps(door.at).hex(), flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True, kw_only=True)
class Cable:
    """Between the engine's host and the worker's."""

    engine: Host
    worker: Host

    def pull(self) -> None:
        """The worker's host says nothing more, not even that."""
        down = ["ip", "-n", self.worker.namespace, "link", "set", self.worker.interface, "down"]
        subprocess.run(down, check=True)

    def on_engine_s_host(self, act: Callable[[], None]) -> None:
        """Calls `act` in a thread whose sockets are that host's."""

        def there() -> None:
            with open(f"/run/netns/{self.engine.namespace}") as namespace:
                moved = ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET)
            assert moved == 0, os.strerror(ctypes.get_errno())
            act()

        with ThreadPoolExecutor(1) as threads:
            threads.submit(there).result()


@contextmanager
def across_a_cable() -> Iterator[tuple[Door, Cable]]:
    """The door of a worker whose steps take as many seconds as their plan's number."""
    with emulated_hosts(2) as network:
        engine, worker = network.hosts
        command = worker.command([sys.executable, "-c", _WORKER, worker.address])
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            door = pickle.loads(bytes.fromhex(process.stdout.readline()))
            yield door, Cable(engine=engine, worker=worker)
        finally:
            process.kill()
            process.communicate()
