"""Ports to listen on: whether they can be, in a sentence."""

from __future__ import annotations

import socket

from dualray.errors import ResourceError

SERVER_OPTIONS = (
    # Two servers on one port would split the requests between them unnoticed.
    ("grpc.so_reuseport", 0),
    # Clients ping idle streams; the default policy would end their connections for it.
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


def address_of(host: str, port: int) -> str:
    """HOST:PORT, with the brackets that IPv6 needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_free(host: str, port: int, section: str = "serve.") -> None:
    """Binds and lets go: gRPC's own failure prints lines of C++ log and no reason.

    `section` is what the names of the settings `host` and `port` begin with.

    Raises:
        ResourceError: the port is taken or the host is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except socket.gaierror as error:
            raise ResourceError(
                f"{section}host is {host} and no address is known for it",
                hint="use 127.0.0.1, or 0.0.0.0 for all addresses of this machine",
            ) from error
        except OSError as error:
            raise taken(host, port, section) from error


def taken(host: str, port: int, section: str = "serve.") -> ResourceError:
    return ResourceError(
        f"{section}port is {port} and {host}:{port} cannot be listened on, it is taken by another "
        "process or not this machine's",
        hint=f"choose another {section}port, or 0 for a free one",
    )
