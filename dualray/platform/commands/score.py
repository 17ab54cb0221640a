"""`dualray score`: what a checkpoint makes of given tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dualray.errors import CheckpointError, ConfigError


def score(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="a step-N folder, or a run's for its newest"),
    ],
    tokens: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="a list of lists of token ids")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="text for the checkpoint's tokenizer; cut where the model's context ends",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON for programs")] = False,
) -> None:
    """Print the log-probabilities of given tokens.

    logprobs[i][j] is the natural logarithm of the probability of token j + 1 of sequence i given
    those before it; nll is the mean of its negative over all tokens scored, in nats a token.
    """
    if (tokens is None) == (text is None):
        given = (
            "neither --tokens nor --text is" if tokens is None else "both --tokens and --text are"
        )
        raise ConfigError(f"{given} given", hint="give one of the two")
    # torch takes seconds to import, which no other command should pay.
    from dualray.checkpoint.reader import Reader
    from dualray.checkpoint.store import find
    from dualray.checkpoint.whole_model import load_stage, stored_model
    from dualray.inference.scoring import score as score_sequences
    from dualray.platform.score_input import read_text, read_tokens

    found = find(checkpoint)
    for message in found.messages:
        typer.echo(f"warning: {message}", err=True)
    assert found.path is not None, "find raises when there is none"
    reader = Reader(found.path)
    model = stored_model(reader)
    if tokens is not None:
        sequences = read_tokens(tokens, model)
    else:
        assert text is not None, "one of the two is given"
        sequences = read_text(text, reader, model)
    progress = Console(stderr=True)
    with progress.status("loading the model") as status:
        stage = load_stage(reader)
        logprobs = score_sequences(
            stage,
            sequences,
            on_pack=lambda done: status.update(f"{done} of {len(sequences)} sequences scored"),
        )
    _refuse_non_finite(found.path, logprobs)
    scored = [value for sequence in logprobs for value in sequence]
    nll = -math.fsum(scored) / len(scored)
    if as_json:
        typer.echo(json.dumps({"logprobs": logprobs, "nll": nll}))
        return
    _show(logprobs)
    typer.echo(
        f"{found.path}: {nll:.4f} nats a token over {len(scored):,} tokens, "
        f"perplexity {_exp(nll):,.2f}"
    )


def _refuse_non_finite(checkpoint: Path, logprobs: list[list[float]]) -> None:
    for index, sequence in enumerate(logprobs):
        for position, value in enumerate(sequence, start=1):
            if not math.isfinite(value):
                raise CheckpointError(
                    f"checkpoint {checkpoint} gives token {position} of sequence {index} a "
                    f"log-probability of {value}, which is no finite number",
                    hint="use an earlier checkpoint, or look where its training diverged",
                )


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def _show(logprobs: list[list[float]]) -> None:
    table = Table("sequence", "tokens scored", "nats a token", "least likely", box=None)
    for column in table.columns:
        column.justify = "right"
    for index, sequence in enumerate(logprobs):
        if sequence:
            mean, least = -math.fsum(sequence) / len(sequence), min(sequence)
            figures = (f"{mean:.4f}", f"{least:.2f} at token {sequence.index(least) + 1}")
        else:
            figures = ("", "")
        table.add_row(str(index), f"{len(sequence):,}", *figures)
    Console().print(table)
