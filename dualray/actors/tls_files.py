"""The server's certificate, key and client CA, from files that may be replaced while it runs."""

from __future__ import annotations

import logging
import ssl
import threading
from pathlib import Path
from typing import Any

import grpc

from dualray.actors.watched_files import WatchedFiles, read_named
from dualray.errors import ConfigError

_log = logging.getLogger(__name__)


class TlsFiles:
    """PEM files behind a gRPC server's credentials; looked at again at every handshake."""

    def __init__(self, cert: str, key: str, client_ca: str | None) -> None:
        """Raises ConfigError if a file cannot be read, or certificate and key do not belong
        together: gRPC itself would start and then fail every handshake."""
        self._cert, self._key = Path(cert), Path(key)
        self._client_ca = None if client_ca is None else Path(client_ca)
        paths = [self._cert, self._key]
        if self._client_ca is not None:
            paths.append(self._client_ca)
        self._files = WatchedFiles(paths)
        self._files.changed()
        self._reading = threading.Lock()
        self._first = self._configuration()

    def credentials(self) -> grpc.ServerCredentials:
        """With a client CA, a client must present a certificate that it signed."""
        return grpc.dynamic_ssl_server_credentials(
            self._first,
            self._newer,
            require_client_authentication=self._client_ca is not None,
        )

    def _newer(self) -> Any:
        """What a handshake asks, on a thread of gRPC's: None leaves things as they are.

        Certificate and key are two files, so that between their replacements they do not
        belong together; until they do, the former pair serves.
        """
        with self._reading:
            if not self._files.changed():
                return None
            try:
                return self._configuration()
            except ConfigError as error:
                _log.warning("certificates stay as they were: %s", error)
                return None

    def _configuration(self) -> Any:
        """A grpc.ServerCertificateConfiguration."""
        cert = read_named(self._cert, "serve.tls_cert")
        key = read_named(self._key, "serve.tls_key")
        check_pair(self._cert, self._key, "serve.tls_cert", "serve.tls_key")
        client_ca = None
        if self._client_ca is not None:
            client_ca = read_named(self._client_ca, "serve.tls_client_ca")
            check_certificates(client_ca, self._client_ca, "serve.tls_client_ca")
        return grpc.ssl_server_certificate_configuration([(key, cert)], client_ca)


def check_pair(cert: Path, key: Path, cert_field: str, key_field: str) -> None:
    """Raises ConfigError if they are no PEM certificate and its unencrypted key."""
    try:
        # The password keeps OpenSSL from asking for one at the terminal.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key, password="")
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"{cert_field} is {cert} and {key_field} is {key}, and they are no PEM certificate "
            f"with its unencrypted key ({_reason(error)})",
            hint="give the certificate, its chain below it, and the key that belongs to it",
        ) from None


def check_certificates(pem: bytes, path: Path, field: str) -> None:
    """Raises ConfigError unless these are PEM certificates, at least one."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=pem.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"{field} is {path} and holds no PEM certificate ({_reason(error)})",
            hint="give the certificates of the authorities to trust",
        ) from None


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None)
    return str(reason or type(error).__name__).lower().replace("_", " ")
