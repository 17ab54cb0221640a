"""`dualray data`: real corpora to begin with, and token shards from any text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from dualray.data.fetch import fetch as fetch_corpus
from dualray.data.manifest import DataManifest
from dualray.data.shards import build as build_shards

app = typer.Typer(
    no_args_is_help=True, help="Fetch text and turn it into token shards.", add_completion=False
)


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="shakespeare or python-stdlib.")],
    out: Annotated[Path, typer.Option(help="New folder for the text files.")],
) -> None:
    """Fetch a small real corpus as plain text."""
    fetched = fetch_corpus(name, out)
    _say(f"{name}: {fetched.num_files} files, {fetched.num_bytes:,} bytes of text in {out}")
    _say(f"next: dualray data build {out} --tokenizer bpe:4096 --out {out}-tokens")


@app.command()
def build(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SRC...",
            help="Files or folders: text, .jsonl with a `text` field, .gz or .zst of these, "
            "parquet, arrow.",
        ),
    ],
    tokenizer: Annotated[
        str, typer.Option(help="bytes, bpe:N (trained on this text) or a tokenizer.json.")
    ],
    out: Annotated[Path, typer.Option(help="New folder for the shards.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Turn text into token shards with a held-out split."""
    start = time.perf_counter()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("reading", total=None)
        manifest = build_shards(
            sources,
            tokenizer,
            out,
            progress=lambda what, done, total: bar.update(
                task, description=what, completed=done, total=total
            ),
        )
    if as_json:
        typer.echo(manifest.to_json(), nl=False)
        return
    Console().print(_table(manifest))
    _say(
        f"{out}: tokenizer {manifest.tokenizer} with {manifest.vocab_size:,} tokens, "
        f"data {manifest.data_sha256[:12]}, {time.perf_counter() - start:.1f} s"
    )
    _say(f"next: dualray train RUN.yaml --set data.path={out}")


def _table(manifest: DataManifest) -> Table:
    table = Table("split", "documents", "bytes", "tokens", "bytes per token", "shards")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, split in manifest.splits.items():
        table.add_row(
            name,
            f"{split.num_documents:,}",
            f"{split.num_bytes:,}",
            f"{split.num_tokens:,}",
            f"{split.num_bytes / split.num_tokens:.2f}",
            str(len(split.shards)),
        )
    return table


def _say(line: str) -> None:
    # Unwrapped and without markup: paths in it are to be copied, and may hold brackets.
    Console().print(line, markup=False, highlight=False, soft_wrap=True)
