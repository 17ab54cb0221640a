"""Rules for the settings of the `serve` section that say who may call the admin service.

It switches the run for everybody, and so is never open to all who may ask for text, nor to all who
reach the machine.
"""

from __future__ import annotations

import ipaddress

from dualray.errors import ConfigError


def check_admin(
    *,
    admin_port: int | None,
    admin_host: str,
    admin_tokens_file: str | None,
    tokens_file: str | None,
    tls_client_ca: str | None,
) -> None:
    """Raises ConfigError for settings that break a rule."""
    if admin_port is None:
        if admin_tokens_file is not None:
            raise ConfigError(
                f"serve.admin_tokens_file is {admin_tokens_file} and serve.admin_port is not "
                "given, so that there is no admin service to ask for its tokens",
                hint="set serve.admin_port too, or neither",
            )
        return
    if tokens_file is not None and admin_tokens_file is None:
        raise ConfigError(
            f"serve.tokens_file is {tokens_file} and serve.admin_tokens_file is not given, but "
            "who may ask for text may not switch the run",
            hint="set serve.admin_tokens_file to a file with other tokens, or leave out "
            "serve.admin_port",
        )
    if tokens_file is not None and tokens_file == admin_tokens_file:
        raise ConfigError(
            f"serve.tokens_file and serve.admin_tokens_file are both {tokens_file} and must "
            "differ, since who may ask for text may not switch the run",
            hint="write the admin service's tokens into a file of their own",
        )
    if admin_tokens_file is None and tls_client_ca is None and not _is_loopback(admin_host):
        raise ConfigError(
            f"serve.admin_host is {admin_host} and neither serve.admin_tokens_file nor "
            "serve.tls_client_ca is given, so that whoever reaches it could switch the run",
            hint="set serve.admin_tokens_file, or leave serve.admin_host out for 127.0.0.1",
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
