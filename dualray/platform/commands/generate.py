"""`dualray generate`: streams a completion from a served run."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dualray.errors import ConfigError, DualrayError
from dualray.platform.access import read_access
from dualray.platform.client import Client, Summary


def generate_command(
    prompt: Annotated[str, typer.Argument(help="text to continue; - reads standard input")],
    target: Annotated[str, typer.Option(metavar="HOST:PORT", help="the server")],
    max_tokens: Annotated[int, typer.Option(help="most tokens to generate")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token")] = 1.0,
    top_p: Annotated[float, typer.Option(help="probability mass to choose from")] = 1.0,
    top_k: Annotated[int, typer.Option(help="likeliest tokens to choose from; 0 for all")] = 0,
    min_p: Annotated[float, typer.Option(help="least share of the best token's probability")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="repeats a completion")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="ends at this text; may be repeated")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="go on after the end")] = False,
    timeout: Annotated[float | None, typer.Option(help="longest time in seconds")] = None,
    ca: Annotated[
        Path | None, typer.Option(metavar="PEM", help="authorities to trust; speaks TLS")
    ] = None,
    cert: Annotated[
        Path | None, typer.Option(metavar="PEM", help="this client's certificate")
    ] = None,
    key: Annotated[Path | None, typer.Option(metavar="PEM", help="the key of --cert")] = None,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="its first line is the bearer token")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON for programs")] = False,
) -> None:
    """Stream a completion of PROMPT from a served run."""
    check_target(target)
    # gRPC would print each failed handshake beside the sentence; a user's own setting counts.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    access = read_access(ca, cert, key, token_file)
    sampling = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "seed": seed,
        "stop": stop or None,
        "ignore_eos": ignore_eos,
    }
    text = sys.stdin.read() if prompt == "-" else prompt
    with Client(target, access) as client:
        generation = client.generate(text, sampling, timeout_s=timeout)
        if not as_json:
            typer.echo(text, nl=False)
        try:
            for piece in generation:
                if not as_json:
                    typer.echo(piece, nl=False)
        except DualrayError:
            if not as_json:
                typer.echo()  # the error's line must not continue the text
            raise
    assert generation.summary is not None
    if as_json:
        typer.echo(json.dumps({"prompt": text, **asdict(generation.summary)}))
        return
    # The summary is no part of the completion, so that the text can be piped on.
    typer.echo()
    typer.echo(describe(generation.summary), err=True)


def check_target(target: str) -> None:
    """Refuses what cannot be HOST:PORT; gRPC would resolve almost anything and then hang."""
    host, colon, port = target.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError(
            f"--target is {target} and must be HOST:PORT", hint="try --target 127.0.0.1:50051"
        )


def describe(summary: Summary) -> str:
    """One line of figures about a completion."""
    return (
        f"{summary.num_output_tokens} tokens ({summary.finish_reason}), first text after "
        f"{summary.first_token_s:.3f} s, {summary.tokens_per_s:.1f} tokens/s; {summary.model} "
        f"after step {summary.training_step}"
    )
