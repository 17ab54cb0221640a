"""Which Ray the run uses, and how this process comes into it.

Two ways in. `connect` starts an embedded Ray on this machine, or joins the one at
`cluster.address`. `attach` joins a live run's Ray from another process (status, stop, mode).

Ray's ports listen on every interface and whoever reaches them runs code, so an embedded Ray asks
for a token: a fresh one, in the environment of its processes only. Left to itself Ray would write
`~/.ray/auth_token`, from when on every `ray start` on the machine expects tokens while the nodes
that join it send none. Where RAY_AUTH_MODE is set already, that stands.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
from dataclasses import dataclass

import grpc
import ray
from ray import _raylet
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import get_ray_address_from_environment
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from dualray.actors.ray_processes import apart_from_signals, await_end, family, keep_sigterm
from dualray.errors import ConfigError, ResourceError, RunError

NAMESPACE = "dualray"
"""The Ray namespace of every named actor."""

_OBJECT_STORE_BYTES = 256 << 20
_PROBE_LIMIT_S = 5.0
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Without it Ray hides the GPUs of actors that ask for none and warns on every start.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where the workers run and what each of them asks for."""

    address: str | None = None
    """`HOST:PORT` of a running cluster's head, or `auto` for the one this machine is part of;
    none starts an embedded Ray on this machine."""
    cpus_per_worker: float = 1.0
    """CPUs each worker asks for; an embedded Ray counts them without pinning."""
    gpus_per_worker: float = 0.0
    """GPUs each worker asks for; 0 computes on the CPU."""
    wait_for_resources_s: float = 600.0
    """Seconds to wait for the nodes that an autoscaler brings."""

    def __post_init__(self) -> None:
        for field in ("cpus_per_worker", "gpus_per_worker", "wait_for_resources_s"):
            value = getattr(self, field)
            if not 0 <= value < math.inf:
                raise ConfigError(
                    f"cluster.{field} is {value} and must be 0 or more",
                    hint=f"set cluster.{field} to a number from 0 upwards",
                )
        if self.cpus_per_worker == 0 and self.gpus_per_worker == 0:
            raise ConfigError(
                "cluster.cpus_per_worker and cluster.gpus_per_worker are both 0 and a worker "
                "must ask for something",
                hint="set cluster.cpus_per_worker to 1",
            )
        if self.address is not None:
            _check_address(self.address)


@dataclass(frozen=True, kw_only=True)
class Connection:
    """This process's place in a Ray; `close` leaves it, and ends it where it is embedded."""

    address: str
    """`HOST:PORT` of the head, for other processes."""
    embedded: bool
    """True where `connect` started this Ray; it ends with this process."""
    auth_token: str | None
    """What other processes give to `attach`; a secret: keep it in files of mode 0600 only."""
    pids: tuple[int, ...] = ()
    """Ray's processes that `connect` started here; all others descend from them."""

    def close(self) -> None:
        """Leave Ray; an embedded one has ended when this returns, with every actor in it."""
        members = family(self.pids)
        ray.shutdown()
        await_end(members)
        if self.auth_token is not None:
            _set_auth(mode=None, token=None)

    def kill(self) -> None:
        """End an embedded Ray whose head has crashed: nobody is left to end it in order."""
        await_end(family(self.pids), limit_s=0)


def connect(cluster: ClusterConfig, num_workers: int) -> Connection:
    """Start an embedded Ray with room for `num_workers`, or join the one at `cluster.address`.

    Raises RunError, within seconds, where nothing answers at the address.
    """
    os.environ.update({k: v for k, v in _ENVIRONMENT.items() if k not in os.environ})
    if cluster.address is not None:
        return _join(cluster.address, auth_token=None)
    token = None
    if "RAY_AUTH_MODE" not in os.environ:
        token = secrets.token_hex(32)
        _set_auth(mode="token", token=token)
    # Two more than the workers ask for: the controller and the engine.
    num_cpus = math.ceil(num_workers * cluster.cpus_per_worker) + 2
    pids: list[int] = []
    try:
        with apart_from_signals() as pids, keep_sigterm():
            ray.init(
                address="local",
                num_cpus=num_cpus,
                namespace=NAMESPACE,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=_OBJECT_STORE_BYTES,
            )
    except BaseException as error:
        await_end(family(pids), limit_s=0)
        if token is not None:
            _set_auth(mode=None, token=None)
        if not isinstance(error, Exception):
            raise
        raise ResourceError(
            f"Ray does not start on this machine ({_first_line(error)})",
            hint="look into /tmp/ray/session_latest/logs, or set cluster.address to a running "
            "cluster",
        ) from error
    return Connection(
        address=ray.get_runtime_context().gcs_address,
        embedded=True,
        auth_token=token,
        pids=tuple(pids),
    )


def attach(address: str, auth_token: str | None = None) -> Connection:
    """Join the Ray at `address` (`HOST:PORT`) from another process than the one that started it.

    `auth_token` is its `Connection.auth_token`. Raises RunError where nothing answers.
    """
    os.environ.update({k: v for k, v in _ENVIRONMENT.items() if k not in os.environ})
    _check_address(address)
    return _join(address, auth_token)


def answers(address: str) -> bool:
    """Whether a Ray head is alive at `address`; takes seconds at most."""
    try:
        _probe(address)
    except RunError:
        return False
    return True


def _join(address: str, auth_token: str | None) -> Connection:
    if auth_token is not None:
        _set_auth(mode="token", token=auth_token)
    try:
        _probe(_head_of(address))
        # The probe answered, so this no longer hangs: alone it would retry for minutes and then
        # end the whole process.
        with keep_sigterm():
            ray.init(
                address=address,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except RunError:
        if auth_token is not None:
            _set_auth(mode=None, token=None)
        raise
    except Exception as error:
        raise RunError(
            f"cluster.address is {address} and Ray refuses the connection ({_first_line(error)})",
            hint="use the Ray and Python versions of the cluster",
        ) from error
    return Connection(
        address=ray.get_runtime_context().gcs_address, embedded=False, auth_token=auth_token
    )


def _check_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    if address == "auto" or (host and port.isdigit() and "//" not in address):
        return
    hint = "give HOST:PORT of the head (its port is 6379 by default), or auto"
    if address.startswith("http"):
        hint = "use `dualray submit` for a dashboard address, or give HOST:6379 of the head"
    raise ConfigError(f"cluster.address is {address} and must be HOST:PORT or auto", hint=hint)


def _head_of(address: str) -> str:
    if address != "auto":
        return address
    try:
        return str(get_ray_address_from_environment("auto", None))
    except ConnectionError as error:
        raise RunError(
            "cluster.address is auto and no Ray runs on this machine",
            hint="run `ray start --head` first, or give HOST:PORT, or leave the address out",
        ) from error


def _probe(head: str) -> None:
    """One call to the head under a short limit; RunError says what is wrong with it."""
    stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub
    with contextlib.closing(init_grpc_channel(head)) as channel:
        try:
            # pyrefly: ignore [missing-attribute]  (Ray ships no stubs for its messages)
            request = gcs_service_pb2.CheckAliveRequest()
            reply = stub(channel).CheckAlive(request, timeout=_PROBE_LIMIT_S)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise RunError(
                    f"cluster.address is {head} and the cluster there refuses this process's token",
                    hint="set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's token",
                ) from error
            raise RunError(
                f"cluster.address is {head} and no Ray head answers there",
                hint="check the host, the port (6379 by default) and that the cluster is up",
            ) from error
    if reply.ray_version and reply.ray_version != ray.__version__:
        raise RunError(
            f"cluster.address is {head}, which runs Ray {reply.ray_version}, and this process has "
            f"Ray {ray.__version__}",
            hint=f"install ray=={reply.ray_version} here, or use `dualray submit`",
        )


def _set_auth(*, mode: str | None, token: str | None) -> None:
    """Put Ray's authentication into the environment and make the loaded library read it again."""
    for name, value in (("RAY_AUTH_MODE", mode), ("RAY_AUTH_TOKEN", token)):
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    # pyrefly: ignore [missing-attribute]  (compiled, without stubs)
    _raylet.Config.initialize("")
    # pyrefly: ignore [missing-attribute]
    _raylet.AuthenticationTokenLoader.instance().reset_cache()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
