"""Who may call the admin service."""

from __future__ import annotations

import pytest

from dualray.errors import ConfigError
from dualray.inference.serve_config import ServeConfig

OPEN = (
    "and neither serve.admin_tokens_file nor serve.tls_client_ca is given, so that whoever reaches "
    "it could switch the run; set serve.admin_tokens_file, or leave serve.admin_host out for "
    "127.0.0.1."
)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"admin_port": 0, "tokens_file": "tokens"},
            "serve.tokens_file is tokens and serve.admin_tokens_file is not given, but who may ask "
            "for text may not switch the run; set serve.admin_tokens_file to a file with other "
            "tokens, or leave out serve.admin_port.",
        ),
        (
            {"admin_port": 0, "tokens_file": "tokens", "admin_tokens_file": "tokens"},
            "serve.tokens_file and serve.admin_tokens_file are both tokens and must differ, since "
            "who may ask for text may not switch the run; write the admin service's tokens into a "
            "file of their own.",
        ),
        (
            {"admin_tokens_file": "admin"},
            "serve.admin_tokens_file is admin and serve.admin_port is not given, so that there is "
            "no admin service to ask for its tokens; set serve.admin_port too, or neither.",
        ),
        ({"admin_port": 0, "admin_host": "0.0.0.0"}, f"serve.admin_host is 0.0.0.0 {OPEN}"),
        ({"admin_port": 0, "admin_host": "::"}, f"serve.admin_host is :: {OPEN}"),
        (
            {"admin_port": 0, "admin_host": "head", "tls_cert": "cert", "tls_key": "key"},
            f"serve.admin_host is head {OPEN}",
        ),
    ],
)
def test_what_would_let_anybody_switch_the_run_is_a_sentence(values: dict, sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ServeConfig(**values)
    assert str(raised.value) == sentence


@pytest.mark.parametrize(
    "values",
    [
        {"admin_port": 0},
        {"admin_port": 0, "admin_host": "127.0.0.2"},
        {"admin_port": 0, "admin_host": "::1"},
        {"admin_port": 0, "admin_host": "localhost", "admin_tokens_file": "admin"},
        {"admin_port": 0, "admin_host": "0.0.0.0", "admin_tokens_file": "admin"},
        {"admin_port": 0, "tokens_file": "tokens", "admin_tokens_file": "admin"},
        {
            "admin_port": 0, "admin_host": "0.0.0.0", "tls_cert": "cert", "tls_key": "key",
            "tls_client_ca": "ca",
        },
        {"tokens_file": "tokens", "admin_host": "0.0.0.0"},
    ],
)  # fmt: skip
def test_who_is_told_apart_or_on_this_machine_may(values: dict) -> None:
    ServeConfig(**values)
