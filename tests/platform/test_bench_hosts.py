"""Emulated hosts hold their rate and vanish; ranks report why they failed and leave no orphan."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dualray.errors import ConfigError, ResourceError, RunError
from dualray.platform.bench.hosts import (
    LOOPBACK,
    EmulatedNetwork,
    can_emulate_hosts,
    emulated_hosts,
)
from dualray.platform.bench.ranks import Member, run_ranks

TIMEOUT_S = 100


@pytest.fixture
def can_emulate() -> None:
    if reason := can_emulate_hosts():
        pytest.skip(reason)


def namespaces() -> set[str]:
    folder = Path("/run/netns")
    return set(os.listdir(folder)) if folder.is_dir() else set()


def wait_for_end(pid: int) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with open(descriptor, "rb") as process:
        assert select.select([process], [], [], TIMEOUT_S)[0], f"process {pid} lives on"


# What the ranks run: found by name in processes of their own.


def exchange(member: Member, num_elements: int) -> dict:
    """Rank r sends r to everyone, `num_elements` float32 to each."""
    group = member.join_world()
    sent = torch.full((member.world_size * num_elements,), float(member.rank))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    sources = received.view(member.world_size, num_elements)
    assert bool((sources == sources[:, :1]).all())
    return {
        "from": sources[:, 0].tolist(),
        "threads": torch.get_num_threads(),
        "interface": os.environ["GLOO_SOCKET_IFNAME"],
    }


def fail_in_rank_1(member: Member, how: str) -> None:
    member.join_world()
    if member.rank == 1:
        sys.stdout.write("about to fail\n")
        if how == "raise":
            raise ValueError("no such luck")
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def refuse(member: Member, args: None) -> None:
    raise ConfigError("train.steps is 0 and must be at least 1", hint="give it a step")


def tell_and_wait(member: Member, folder: Path) -> None:
    (folder / str(member.rank)).write_text(str(os.getpid()))
    member.join_world()
    dist.barrier()
    if member.rank == 0:
        (folder / "all").write_text("told")
    threading.Event().wait()


@pytest.mark.hosts
@pytest.mark.multiproc
def test_what_two_hosts_exchange_crosses_the_link(can_emulate) -> None:
    per_pair = 1 << 20
    with emulated_hosts(2, rate_bits_per_s=1e9) as network:
        assert network.rates_bits_per_s() == [1e9, 1e9]
        results = run_ranks(exchange, per_pair, network.spread(2), timeout_s=TIMEOUT_S)
        sent_bytes = [network.sent_bytes(host) for host in network.hosts]
    expected = {"from": [0.0, 1.0], "threads": 1, "interface": "eth0"}
    assert results == [expected, expected]
    # Headers of 66 bytes a 1448, acknowledgements and the rendezvous come on top.
    assert all(4 * per_pair <= count < 1.2 * 4 * per_pair for count in sent_bytes)


@pytest.mark.hosts
@pytest.mark.multiproc
def test_three_hosts_meet_at_a_switch(can_emulate) -> None:
    with emulated_hosts(3, rate_bits_per_s=2e8) as network:
        assert network.rates_bits_per_s() == [2e8] * 6
        results = run_ranks(exchange, 1000, network.spread(3), timeout_s=TIMEOUT_S)
    assert [result["from"] for result in results] == [[0.0, 1.0, 2.0]] * 3


@pytest.mark.hosts
def test_the_rate_changes_while_hosts_are_up(can_emulate) -> None:
    with emulated_hosts(2) as network:
        assert network.rates_bits_per_s() == [None, None]
        for rate in (1e8, 2.5e9, None, None):
            network.set_rate(rate)
            assert network.rates_bits_per_s() == [rate, rate]


@pytest.mark.hosts
def test_two_networks_do_not_meet_and_each_goes_with_its_context(can_emulate) -> None:
    with emulated_hosts(2) as first:
        names = {host.namespace for host in first.hosts}
        with emulated_hosts(3) as second:
            others = {host.namespace for host in second.hosts}
            assert names | others <= namespaces()
            assert not names & others
        assert not others & namespaces()
        assert names <= namespaces()
    assert not names & namespaces()


@pytest.mark.hosts
def test_hosts_go_with_an_exception(can_emulate) -> None:
    refused = r"^`tc -n dualray-.* rate 1\d{30}bit .*` failed \("
    with pytest.raises(ResourceError, match=refused), emulated_hosts(2) as network:
        network.set_rate(1e30)
    assert not {host.namespace for host in network.hosts} & namespaces()


@pytest.mark.hosts
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_hosts_go_with_a_process_that_is_killed(can_emulate, number: signal.Signals) -> None:
    code = """
import sys
from dualray.platform.bench.hosts import emulated_hosts
with emulated_hosts(2) as network:
    print(*(host.namespace for host in network.hosts), flush=True)
    sys.stdin.read()
"""
    pipe = subprocess.PIPE
    child = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe)
    with child:
        assert child.stdout is not None
        names = set(child.stdout.readline().decode().split())
        assert len(names) == 2
        assert names <= namespaces()
        child.send_signal(number)
        # The janitor holds this end too: it closes when everything is removed.
        child.communicate(timeout=TIMEOUT_S)
    assert not names & namespaces()


def test_ranks_spread_in_neighbourhoods() -> None:
    one, other = LOOPBACK, replace(LOOPBACK, address="127.0.0.2")
    network = EmulatedNetwork((one, other), ())
    assert network.spread(4) == (one, one, other, other)
    assert network.spread(3) == (one, one, other)


def test_hosts_need_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert can_emulate_hosts() == "this is user 1000 and emulated hosts need root"
    with pytest.raises(ResourceError) as refused, emulated_hosts(2):
        pass
    assert str(refused.value) == (
        "this is user 1000 and emulated hosts need root; be root, install iproute2, and use a "
        "kernel that has veth, bridge and sch_tbf."
    )


def test_hosts_need_iproute2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert can_emulate_hosts() == "`ip` is not on the PATH and emulated hosts need it"


def test_what_the_kernel_forbids_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    for tool in ("ip", "tc"):
        (tmp_path / tool).write_text("#!/bin/sh\necho Operation not permitted. >&2\nexit 1\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert re.fullmatch(
        r"`ip netns add dualray-\d+-\w+-0` failed \(Operation not permitted\)", can_emulate_hosts()
    )


@pytest.mark.multiproc
def test_a_failing_ranks_traceback_is_reported() -> None:
    with pytest.raises(RunError) as failed:
        run_ranks(fail_in_rank_1, "raise", [LOOPBACK] * 2, timeout_s=TIMEOUT_S)
    message = str(failed.value)
    assert message.startswith("Traceback (most recent call last):\n")
    assert 'raise ValueError("no such luck")\n' in message
    assert message.endswith(
        "\nrank 1 of 2 failed (ValueError: no such luck); its traceback is above."
    )


@pytest.mark.multiproc
def test_a_rank_that_dies_is_named_and_not_its_peers() -> None:
    with pytest.raises(RunError) as failed:
        run_ranks(fail_in_rank_1, "die", [LOOPBACK] * 2, timeout_s=TIMEOUT_S)
    message = str(failed.value)
    assert "about to fail\n" in message
    assert message.endswith(
        "rank 1 of 2 ended by SIGKILL before it had answered; what it printed is above."
    )


@pytest.mark.multiproc
def test_a_users_mistake_stays_one() -> None:
    with pytest.raises(ConfigError, match=r"train\.steps is 0 and must be .* 1; give it a step\."):
        run_ranks(refuse, None, [LOOPBACK], timeout_s=TIMEOUT_S)


def test_time_is_limited() -> None:
    with pytest.raises(RunError) as late:
        run_ranks(refuse, None, [LOOPBACK] * 2, timeout_s=0.01)
    assert str(late.value) == (
        "rank 0 of 2, rank 1 of 2 did not answer within 0.01 s; they may be waiting for each "
        "other, or need more time."
    )


@pytest.mark.multiproc
def test_ranks_go_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from dualray.platform.bench.hosts import LOOPBACK
from dualray.platform.bench.ranks import run_ranks
from test_bench_hosts import tell_and_wait
run_ranks(tell_and_wait, Path(sys.argv[1]), [LOOPBACK] * 2, timeout_s=100)
"""
    os.mkfifo(tmp_path / "all")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment) as parent:
        assert (tmp_path / "all").read_text() == "told"
        pids = [int((tmp_path / str(rank)).read_text()) for rank in range(2)]
        parent.kill()
    for pid in pids:
        wait_for_end(pid)
