"""What a client needs for a secured server: whom to trust, and proof of who it is."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from dualray.actors.bearer_tokens import read_tokens
from dualray.actors.tls_files import check_certificates, check_pair
from dualray.actors.watched_files import read_named
from dualray.errors import ConfigError, RunError

_TLS_REASON = re.compile(r"andshake failed .*?OPENSSL_internal:(.*?)(?:: OK)?$")


@dataclass(frozen=True, kw_only=True)
class Access:
    """Nothing of it means a plain connection; one of `ca` and `cert` means TLS."""

    ca: bytes | None = None
    """PEM certificates of the authorities to trust; None trusts gRPC's own."""
    cert: bytes | None = None
    """PEM certificate of this client, with its `key`."""
    key: bytes | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    """Bearer token that goes with every call."""

    def channel(self, target: str) -> grpc.Channel:
        """Connects at the first call."""
        if self.ca is None and self.cert is None:
            return grpc.insecure_channel(target)
        credentials = grpc.ssl_channel_credentials(self.ca, self.key, self.cert)
        return grpc.secure_channel(target, credentials)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with every call."""
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)


def read_access(
    ca: Path | None, cert: Path | None, key: Path | None, token_file: Path | None
) -> Access:
    """Reads what `dualray generate` was given; of several tokens the first.

    Raises:
        ConfigError: a file cannot be used, or one of certificate and key is missing.
    """
    if (cert is None) != (key is None):
        given, missing = ("--cert", "--key") if key is None else ("--key", "--cert")
        raise ConfigError(
            f"{given} is {cert or key} and {missing} is not given, but a client's certificate "
            "needs both",
            hint=f"give {missing} too, or neither",
        )
    ca_pem = None
    if ca is not None:
        ca_pem = read_named(ca, "--ca")
        check_certificates(ca_pem, ca, "--ca")
    cert_pem = key_pem = None
    if cert is not None and key is not None:
        cert_pem, key_pem = read_named(cert, "--cert"), read_named(key, "--key")
        check_pair(cert, key, "--cert", "--key")
    token = None if token_file is None else read_tokens(token_file, "--token-file")[0]
    return Access(ca=ca_pem, cert=cert_pem, key=key_pem, token=token)


def unreachable(details: str, target: str) -> RunError:
    """Why no connection came about, from gRPC's own words for it."""
    tls = _TLS_REASON.search(details)
    if tls is not None and "WRONG_VERSION_NUMBER" in tls[1]:
        return RunError(
            f"--target is {target} and the server there speaks no TLS",
            hint="leave --ca, --cert and --key out",
        )
    if tls is not None:
        reason = tls[1].replace("CERTIFICATE_VERIFY_FAILED: ", "").replace("_", " ")
        return RunError(
            f"--target is {target} and its certificate is not accepted ({reason})",
            hint="give the authority that signed it with --ca, or see to the certificate",
        )
    if "failed to connect" in details and re.search("Socket closed|Connection reset", details):
        return RunError(
            f"--target is {target} and the server there ends the connection at once",
            hint="give --ca if it speaks TLS, and --cert and --key if it wants a certificate that "
            "its own authority signed and that has not expired",
        )
    return RunError(
        f"--target is {target} and no server answers there",
        hint="start one with dualray serve, or take the target from dualray status",
    )
