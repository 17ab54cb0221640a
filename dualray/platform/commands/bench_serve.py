"""`dualray bench serve`: the service beside Hugging Face's `generate`, and what it costs."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dualray.platform.commands.bench_output import deliver

_TEXT_CHARACTERS = 1_000_000


def serve(
    quick: Annotated[
        bool, typer.Option("--quick", help="a tiny model, in a minute; says little")
    ] = False,
    record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="append the result as a JSON line")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON for programs")] = False,
) -> None:
    """Tokens a second and time to the first one, against Hugging Face's DeepseekV3.

    A batch, and requests that arrive over time; then gRPC beside direct calls, hundreds of streams
    at once, four workers, what a step costs besides computing, and how long workers idle. Some 8
    minutes on two cores.
    """
    # torch and transformers take seconds to import, which no other command should pay.
    from dualray.platform.bench import serve as bench
    from dualray.platform.bench.hugging_face import import_transformers
    from dualray.platform.bench.record import check_target, new_record
    from dualray.platform.bench.serve_result import goals
    from dualray.platform.bench.serve_workload import FULL, QUICK
    from dualray.platform.preset import load_model

    check_target(record)
    import_transformers("bench serve")
    load = QUICK if quick else FULL
    with Console(stderr=True).status("reading the standard library") as status:
        text = _text()
        tokenizer = _tokenizer(load.vocabulary, text)
        # Hugging Face's model has no MTP modules.
        model = replace(
            load_model(load.preset),
            vocab_size=tokenizer.vocab_size,
            num_nextn_predict_layers=0,
        )
        rows = bench.compare_serving(load, model, tokenizer, text, on_part=status.update)
    line = new_record("serve", bench.config_dict(load, model), rows) | {"goals": goals(rows)}
    deliver(line, record, _show, as_json=as_json)


def _text() -> str:
    """Passages of this Python's library, about as many as a tokenizer of 2048 needs."""
    from dualray.data.fetch import fetch

    with tempfile.TemporaryDirectory(prefix="dualray-") as folder:
        corpus = Path(folder) / "text"
        fetch("python-stdlib", corpus)
        files = sorted(path for path in corpus.rglob("*") if path.is_file())
        pieces: list[str] = []
        size = 0
        for path in files:
            pieces.append(path.read_text(encoding="utf-8"))
            size += len(pieces[-1])
            if size >= _TEXT_CHARACTERS:
                break
    return "".join(pieces)


def _tokenizer(vocabulary: str, text: str) -> Any:
    from dualray.data.tokenizer import load_tokenizer, parse_bpe, train_bpe

    size = parse_bpe(vocabulary)
    return load_tokenizer(vocabulary) if size is None else train_bpe([text], size)


def _show(line: dict[str, Any]) -> None:
    from dualray.platform.bench.serve_result import sentences, speeds

    machine, versions, config = line["machine"], line["versions"], line["config"]
    typer.echo(
        f"serve, {config['preset']} preset with random weights, {machine['cpu']}, "
        f"{machine['cores']} cores; one worker with {config['threads']} threads, four with one; "
        f"torch {versions['torch']}, transformers {versions['transformers']}"
    )
    table = Table("tokens a second", "dualray", "HF", "ratio", "four workers", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in speeds(line["results"]):
        table.add_row(*row)
    Console().print(table)
    for sentence in sentences(line["results"]):
        typer.echo(sentence)
    for goal in line["goals"]:
        verdict = "met" if goal["met"] else "MISSED"
        typer.echo(f"goal: {goal['words']}: {goal['value']:.4g}, {verdict}")
