"""Prometheus' scrapes of the engine's metrics, over HTTP or HTTPS.

It answers from threads of its own, so that no step waits for a slow scraper. With the server's
certificate it speaks TLS only, and with a client CA it answers nobody without a certificate, like
the gRPC port. It asks for no token: it tells how much is asked, and nothing of what.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from dualray.actors.tls_files import check_certificates, check_pair
from dualray.actors.watched_files import WatchedFiles, read_named
from dualray.errors import ConfigError, ResourceError
from dualray.inference.serve_config import ServeConfig

_SILENCE_LIMIT_S = 30.0
"""A connection on which nothing comes for so long is closed: its thread would stay for ever."""
_log = logging.getLogger(__name__)


class MetricsServer:
    """Serves a registry. Of `config` the certificate, its key and the client CA count.

    Raises:
        ConfigError: one of these files cannot be used.
    """

    def __init__(self, registry: CollectorRegistry, config: ServeConfig | None = None) -> None:
        config = config or ServeConfig()
        self._registry = registry
        self._tls: _TlsContext | None = None
        if config.tls_cert is not None and config.tls_key is not None:
            self._tls = _TlsContext(config.tls_cert, config.tls_key, config.tls_client_ca)
        self._serving: tuple[WSGIServer, threading.Thread] | None = None

    async def start(self, host: str, port: int) -> str:
        """Listens and returns HOST:PORT, with the port found when `port` is 0.

        Raises:
            ResourceError: the port is taken or the host is not this machine's.
        """
        try:
            # In a thread because it looks the host's name up.
            server = await asyncio.to_thread(self._listen, host, port)
        except OSError as error:
            raise ResourceError(
                f"serve.metrics_port is {port} and {host}:{port} cannot be listened on, it is "
                "taken by another process or not this machine's",
                hint="choose another serve.metrics_port, or 0 for a free one",
            ) from error
        thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
        thread.start()
        self._serving = server, thread
        return f"[{host}]:{server.server_port}" if ":" in host else f"{host}:{server.server_port}"

    @property
    def scheme(self) -> str:
        """`http` or `https`."""
        return "http" if self._tls is None else "https"

    async def stop(self) -> None:
        """Closes the port; nothing happens if it is not open."""
        if self._serving is not None:
            server, thread = self._serving
            self._serving = None
            await asyncio.to_thread(server.shutdown)
            await asyncio.to_thread(thread.join)
            server.server_close()

    def _listen(self, host: str, port: int) -> WSGIServer:
        [(family, *_, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        wrap = None if self._tls is None else self._tls.wrap

        class Server(_ThreadedServer):
            address_family = family
            wrap_connection = staticmethod(wrap) if wrap is not None else None

        app = make_wsgi_app(self._registry)
        return make_server(str(address[0]), port, app, Server, _QuietHandler)


class _ThreadedServer(ThreadingMixIn, WSGIServer):
    """A thread for each connection. TLS shakes hands there: where connections are accepted, a
    silent one would keep the others out."""

    daemon_threads = True
    wrap_connection: Callable[[socket.socket], socket.socket] | None = None

    def finish_request(self, request: Any, client_address: Any) -> None:
        request.settimeout(_SILENCE_LIMIT_S)
        try:
            if self.wrap_connection is None:
                super().finish_request(request, client_address)
                return
            with self.wrap_connection(request) as wrapped:
                super().finish_request(wrapped, client_address)
        except OSError as error:  # strangers and those who go away are no news
            _log.debug("a scrape from %s failed: %s", client_address, error)


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """A line for each scrape would drown the engine's log."""


class _TlsContext:
    """The present certificates as an ssl context; made anew when their files change."""

    def __init__(self, cert: str, key: str, client_ca: str | None) -> None:
        self._cert, self._key = Path(cert), Path(key)
        self._client_ca = None if client_ca is None else Path(client_ca)
        paths = [self._cert, self._key, *([] if self._client_ca is None else [self._client_ca])]
        self._files = WatchedFiles(paths)
        self._files.changed()
        self._reading = threading.Lock()
        self._context = self._read()

    def wrap(self, connection: socket.socket) -> socket.socket:
        """Shakes hands. Raises OSError if that fails."""
        with self._reading:
            if self._files.changed():
                try:
                    self._context = self._read()
                except ConfigError as error:
                    _log.warning("the metrics' certificates stay as they were: %s", error)
            context = self._context
        return context.wrap_socket(connection, server_side=True)

    def _read(self) -> ssl.SSLContext:
        check_pair(self._cert, self._key, "serve.tls_cert", "serve.tls_key")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._cert, self._key, password="")
        if self._client_ca is not None:
            pem = read_named(self._client_ca, "serve.tls_client_ca")
            check_certificates(pem, self._client_ca, "serve.tls_client_ca")
            context.load_verify_locations(cadata=pem.decode("ascii"))
            context.verify_mode = ssl.CERT_REQUIRED
        return context
