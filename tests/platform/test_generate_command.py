"""`dualray generate` against a served tiny model."""

import json
import socket

import pytest
import typer
from support.serving import serving
from typer.testing import CliRunner

from dualray.errors import ConfigError, RequestError, RunError
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
