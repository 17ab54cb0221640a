"""`dualray generate` against a served tiny model."""

import json
import socket

import pytest
import typer
from support.certificates import Authority
from support.serving import serving
from typer.testing import CliRunner

from dualray.errors import ConfigError, RequestError, RunError
from dualray.inference.serve_config import ServeConfig
from dualray.platform.client import Client
from dualray.platform.commands.generate import generate_command


def invoke(*arguments, **options):
    app = typer.Typer()
    app.command()(generate_command)
    return CliRunner().invoke(app, list(arguments), **options)


@pytest.fixture(scope="module")
def target():
    with serving() as served:
        yield served.target


def test_the_completion_streams_and_figures_follow(target):
    arguments = ("ab", "--target", target, "--max-tokens", "5", "--seed", "1", "--ignore-eos")
    found = json.loads(invoke(*arguments, "--json").stdout)
    assert (found["prompt"], found["finish_reason"], found["model"]) == ("ab", "length", "tiny")
    assert (found["num_input_tokens"], found["num_output_tokens"]) == (2, 5)
    assert (found["training_step"], found["weight_digest"]) == (7, "abc123")
    assert 0 < found["first_token_s"] <= found["total_s"]
    result = invoke(*arguments)
    assert result.exit_code == 0
    assert result.stdout == "ab" + found["text"] + "\n"
    assert result.stderr.startswith("5 tokens (length), first text after ")
    assert result.stderr.endswith(" tokens/s; tiny after step 7\n")


def test_the_prompt_may_come_from_standard_input(target):
    result = invoke("-", "--target", target, "--max-tokens", "1", "--json", input="xyz")
    assert json.loads(result.stdout)["prompt"] == "xyz"


def test_pieces_come_one_by_one(target):
    with Client(target) as client:
        generation = client.generate("ab", {"max_tokens": 8, "seed": 2, "ignore_eos": True})
        pieces = list(generation)
    assert len(pieces) > 1
    assert generation.summary.text == "".join(pieces)


def test_a_stop_string_ends_the_completion(target):
    sampling = {"max_tokens": 20, "seed": 2, "ignore_eos": True}
    with Client(target) as client:
        whole = client.generate("ab", sampling)
        text = "".join(whole)
        stop = text[3:5]
        stopped = client.generate("ab", {**sampling, "stop": [stop]})
        assert "".join(stopped) == text.split(stop)[0]
    assert stopped.summary.finish_reason == "stop"


def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{free.getsockname()[1]}"
        error = invoke("ab", "--target", target).exception
    assert isinstance(error, RunError)
    assert error.exit_code == 2
    assert str(error) == (
        f"--target is {target} and no server answers there; start one with dualray serve, or "
        "take the target from dualray status."
    )


@pytest.mark.parametrize("target", ["localhost", ":50051", "host:port", "host:99999"])
def test_what_is_no_target(target):
    error = invoke("ab", "--target", target).exception
    assert isinstance(error, ConfigError)
    assert str(error) == (
        f"--target is {target} and must be HOST:PORT; try --target 127.0.0.1:50051."
    )


def test_the_servers_sentence_reaches_the_terminal(target):
    error = invoke("ab", "--target", target, "--top-p", "3").exception
    assert isinstance(error, RequestError)
    assert str(error) == (
        "sampling_parameters.top_p is 3.0 and must be above 0 and at most 1; correct top_p."
    )


def test_a_server_that_stops_serving_is_named():
    with serving() as served:
        served.call(served.engine.drain())
        error = invoke("ab", "--target", served.target).exception
    assert isinstance(error, RunError)
    assert str(error) == (
        "model tiny does not serve now, it is training; watch the health service and try again."
    )


def test_time_runs_out():
    with serving() as served:
        served.hold()
        error = invoke("ab", "--target", served.target, "--timeout", "0.2").exception
        served.hold(False)
    assert isinstance(error, RunError)
    assert str(error) == (
        f"{served.target} did not finish in time; allow more with --timeout or ask for less."
    )


@pytest.fixture(scope="module")
def ca(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"), "ca")


def security(ca, *, mutual: bool = False, tokens=None) -> ServeConfig:
    server = ca.issue("server")
    return ServeConfig(
        tls_cert=str(server.cert),
        tls_key=str(server.key),
        tls_client_ca=str(ca.cert) if mutual else None,
        tokens_file=None if tokens is None else str(tokens),
    )


def test_a_secured_server_takes_certificate_and_token(ca, tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text("# mine\nnot-a-secret\n")
    shown = ca.issue("client")
    trusting = ("--ca", str(ca.cert), "--cert", str(shown.cert), "--key", str(shown.key))
    with serving(security=security(ca, mutual=True, tokens=tokens)) as served:
        arguments = ("ab", "--target", served.target, "--max-tokens", "3", "--json", *trusting)
        result = invoke(*arguments, "--token-file", str(tokens))
        assert json.loads(result.stdout)["model"] == "tiny"
        assert str(invoke(*arguments).exception) == (
            f"{served.target} refused the call, the call carries no bearer token; give a token "
            "that is valid now with --token-file."
        )
        other = tmp_path / "other"
        other.write_text("guessed-token\n")
        error = invoke(*arguments, "--token-file", str(other)).exception
    assert isinstance(error, RunError)
    assert str(error) == (
        f"{served.target} refused the call, the call's bearer token is not one of the server's; "
        "give a token that is valid now with --token-file."
    )


def test_what_keeps_tls_from_coming_about_is_named(ca, target, tmp_path):
    stranger = Authority(tmp_path, "stranger")
    with serving(security=security(ca, mutual=True)) as served:
        arguments = ("ab", "--target", served.target)
        closed = (
            f"--target is {served.target} and the server there ends the connection at once; give "
            "--ca if it speaks TLS, and --cert and --key if it wants a certificate that its own "
            "authority signed and that has not expired."
        )
        for more in ((), ("--ca", str(ca.cert))):
            error = invoke(*arguments, *more).exception
            assert isinstance(error, RunError)
            assert str(error) == closed
        assert str(invoke(*arguments, "--ca", str(stranger.cert)).exception) == (
            f"--target is {served.target} and its certificate is not accepted (unable to get local "
            "issuer certificate); give the authority that signed it with --ca, or see to the "
            "certificate."
        )
    assert str(invoke("ab", "--target", target, "--ca", str(ca.cert)).exception) == (
        f"--target is {target} and the server there speaks no TLS; leave --ca, --cert and --key "
        "out."
    )


def test_access_that_cannot_be_used_is_a_sentence(ca, target, tmp_path):
    arguments = ("ab", "--target", target)
    pair, none = ca.issue("mine"), tmp_path / "none"

    def refused(*more) -> str:
        error = invoke(*arguments, *map(str, more)).exception
        assert isinstance(error, ConfigError)
        return str(error)

    assert refused("--cert", pair.cert) == (
        f"--cert is {pair.cert} and --key is not given, but a client's certificate needs both; "
        "give --key too, or neither."
    )
    assert refused("--key", pair.key) == (
        f"--key is {pair.key} and --cert is not given, but a client's certificate needs both; "
        "give --cert too, or neither."
    )
    assert refused("--cert", pair.cert, "--key", ca.issue("yours").key).startswith(
        f"--cert is {pair.cert} and --key is "
    )
    missing = "cannot be read (No such file or directory); check the path and its permissions."
    assert refused("--ca", none) == f"--ca is {none} and {missing}"
    assert refused("--token-file", none) == f"--token-file is {none} and {missing}"
    none.write_text("# nothing\n")
    assert refused("--token-file", none) == (
        f"--token-file is {none} and holds no token; write one token a line into it."
    )
    assert refused("--ca", none).startswith(f"--ca is {none} and holds no PEM certificate (")
