"""What must hold of the settings that say which records a server keeps of its requests."""

from __future__ import annotations

from urllib.parse import urlsplit

from dualray.errors import ConfigError


def check_records(
    *, access_log: str | None, access_log_prompts: bool, otlp_endpoint: str | None
) -> None:
    """Raises ConfigError. Whether a file can be written shows where serving starts."""
    if access_log == "":
        raise ConfigError(
            "serve.access_log is empty and must name a file",
            hint="give a path, - for standard output, or leave it out for no log",
        )
    if access_log_prompts and access_log is None:
        raise ConfigError(
            "serve.access_log_prompts is true and serve.access_log is not given, so that there is "
            "nothing to write prompts to",
            hint="set serve.access_log too, or leave serve.access_log_prompts out",
        )
    if otlp_endpoint is not None and not _is_endpoint(otlp_endpoint):
        raise ConfigError(
            f"serve.otlp_endpoint is {otlp_endpoint} and must be http://HOST:PORT or "
            "https://HOST:PORT",
            hint="give the address where a collector takes OTLP over gRPC, such as "
            "http://127.0.0.1:4317",
        )


def _is_endpoint(text: str) -> bool:
    try:
        url = urlsplit(text)
        port = url.port
    except ValueError:
        return False
    bare = url._replace(scheme="", netloc="").geturl() in ("", "/")
    return url.scheme in ("http", "https") and bool(url.hostname) and bool(port) and bare
