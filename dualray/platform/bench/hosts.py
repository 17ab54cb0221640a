"""Emulated hosts: network namespaces on this machine, joined by links of a chosen rate.

Loopback moves gigabytes a second, so on one machine communication costs nothing and hiding it
gains nothing. Here each host is a network namespace with an `eth0` of its own, and a token bucket
(tbf) on either end of every link lets it pass as many bits a second as a real network would.
Two hosts hang on one cable; more hang on a switch, a bridge in a namespace of its own.

Nothing appears in the machine's own network: cables are born between namespaces, and addresses
are the same in every network, since no two can see each other. Namespaces have names, and would
outlive a process that is killed; so a janitor, a shell in a session of its own, waits for the end
of a pipe that only this process holds, and then removes them. That is the only way they go.

Needs root and iproute2's `ip` and `tc`.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dualray.errors import ResourceError

_INTERFACE = "eth0"
_QUEUE = "100ms"
"""How long a packet may wait for its turn before it is dropped. Between two hosts none was."""
_MIN_BURST_BYTES = 80_000
"""What may pass at once after a pause. A packet of TCP has up to 64 KB before a network card would
cut it into frames; where it does not fit, tbf cuts it, which cost most of what an overlap gains:
of 2 MB at 300 Mbit/s 0.2 were hidden instead of 0.9, on two cores of an AMD EPYC."""
_BURST_S = 0.25e-3  # the timer that wakes tbf may be as late, at rates where that is more
_JANITOR = """trap '' INT TERM HUP
while read -r _; do :; done
for namespace; do ip netns delete "$namespace" 2>/dev/null; done"""


@dataclass(frozen=True, kw_only=True)
class Host:
    """Where a process runs: a network with one address of its own."""

    namespace: str
    """Empty for the machine itself."""
    address: str
    interface: str
    """The one that `address` belongs to."""

    def command(self, arguments: Sequence[str]) -> list[str]:
        """`arguments` as run on this host. `ip` becomes them: same process, same open files."""
        if not self.namespace:
            return list(arguments)
        return ["ip", "netns", "exec", self.namespace, *arguments]


LOOPBACK = Host(namespace="", address="127.0.0.1", interface="lo")
"""The machine itself: no network but its own memory."""


@dataclass(frozen=True, kw_only=True)
class _Port:
    """One end of a cable; what leaves through it is held to the rate."""

    namespace: str
    interface: str


class EmulatedNetwork:
    """Hosts that are up, and the rate of their links."""

    def __init__(self, hosts: tuple[Host, ...], ports: tuple[_Port, ...]) -> None:
        self.hosts = hosts
        self._ports = ports

    def spread(self, world_size: int) -> tuple[Host, ...]:
        """The host of each rank; as evenly as it goes, neighbouring ranks together."""
        num_hosts = len(self.hosts)
        return tuple(self.hosts[rank * num_hosts // world_size] for rank in range(world_size))

    def set_rate(self, rate_bits_per_s: float | None) -> None:
        """Hold every link to this rate in either direction; None frees it.

        What waits in a link is lost and sent again by TCP. Raises ResourceError.
        """
        for port in self._ports:
            change = ["tc", "-n", port.namespace, "qdisc", "replace", "dev", port.interface, "root"]
            _run([*change, *_discipline(rate_bits_per_s)])

    def rates_bits_per_s(self) -> list[float | None]:
        """What the kernel holds either end of each link to; None where it is free."""
        return [_rate(port) for port in self._ports]

    def sent_bytes(self, host: Host) -> int:
        """Bytes that have left `host` since it came up, headers included."""
        show = ["ip", "-n", host.namespace, "-statistics", "-json", "link", "show", host.interface]
        return json.loads(_run(show))[0]["stats64"]["tx"]["bytes"]


@contextmanager
def emulated_hosts(
    num_hosts: int, *, rate_bits_per_s: float | None = None
) -> Iterator[EmulatedNetwork]:
    """A network of `num_hosts`, at least two, for as long as the context lasts.

    The hosts go with this process, however it ends; so end what runs on them first. Raises
    ResourceError where `can_emulate_hosts` has a reason why not.
    """
    assert num_hosts >= 2, "a link has two ends"
    prefix = f"dualray-{os.getpid()}-{secrets.token_hex(3)}"
    names = [f"{prefix}-{index}" for index in range(num_hosts)]
    switch = f"{prefix}-switch"
    with _janitor([*names, switch]):
        for name in names:
            _run(["ip", "netns", "add", name])
        ports = _cable(names) if num_hosts == 2 else _switch(names, switch)
        hosts = tuple(_boot(name, index) for index, name in enumerate(names))
        network = EmulatedNetwork(hosts, ports)
        network.set_rate(rate_bits_per_s)
        yield network


def can_emulate_hosts() -> str:
    """Empty where `emulated_hosts` works, else the reason why not. Tries it out, in 0.1 s."""
    try:
        with emulated_hosts(2, rate_bits_per_s=1e9):
            return ""
    except ResourceError as error:
        return error.sentence


@contextmanager
def _janitor(namespaces: list[str]) -> Iterator[None]:
    if os.geteuid() != 0:
        raise _unable(f"this is user {os.geteuid()} and emulated hosts need root")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise _unable(f"`{tool}` is not on the PATH and emulated hosts need it")
    janitor = subprocess.Popen(
        ["sh", "-c", _JANITOR, "janitor", *namespaces],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl-C of the terminal is not for it
    )
    with janitor:  # closes its pipe, then waits for it
        yield


def _cable(names: list[str]) -> tuple[_Port, ...]:
    first, second = names
    _add_cable(_Port(namespace=first, interface=_INTERFACE), second)
    return tuple(_Port(namespace=name, interface=_INTERFACE) for name in names)


def _switch(names: list[str], switch: str) -> tuple[_Port, ...]:
    _run(["ip", "netns", "add", switch])
    _run(["ip", "-n", switch, "link", "add", "bridge", "up", "type", "bridge"])
    ports = []
    for index, name in enumerate(names):
        port = _Port(namespace=switch, interface=f"port{index}")
        _add_cable(port, name)
        _run(["ip", "-n", switch, "link", "set", port.interface, "up", "master", "bridge"])
        ports += [port, _Port(namespace=name, interface=_INTERFACE)]
    return tuple(ports)


def _add_cable(port: _Port, name: str) -> None:
    link = ["ip", "-n", port.namespace, "link", "add", port.interface]
    _run([*link, "type", "veth", "peer", "name", _INTERFACE, "netns", name])


def _boot(name: str, index: int) -> Host:
    address = f"10.0.0.{index + 1}"
    _run(["ip", "-n", name, "address", "add", f"{address}/24", "dev", _INTERFACE])
    for interface in ("lo", _INTERFACE):
        _run(["ip", "-n", name, "link", "set", interface, "up"])
    return Host(namespace=name, address=address, interface=_INTERFACE)


def _discipline(rate_bits_per_s: float | None) -> list[str]:
    if rate_bits_per_s is None:
        return ["noqueue"]
    burst_bytes = max(_MIN_BURST_BYTES, round(_BURST_S * rate_bits_per_s / 8))
    rate = f"{round(rate_bits_per_s)}bit"
    return ["tbf", "rate", rate, "burst", f"{burst_bytes}", "latency", _QUEUE]


def _rate(port: _Port) -> float | None:
    show = ["tc", "-n", port.namespace, "-json", "qdisc", "show", "dev", port.interface, "root"]
    found: dict[str, Any] = json.loads(_run(show))[0]
    return found["options"]["rate"] * 8.0 if found["kind"] == "tbf" else None


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        said = " ".join(done.stderr.split()).rstrip(".")
        raise _unable(f"`{' '.join(command)}` failed ({said})")
    return done.stdout


def _unable(sentence: str) -> ResourceError:
    return ResourceError(
        sentence,
        hint="be root, install iproute2, and use a kernel that has veth, bridge and sch_tbf",
    )
