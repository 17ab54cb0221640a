"""`dualray checkpoint`: which checkpoints a run has, whether their bytes are still right, and
the way from and to Hugging Face's format."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from dualray.errors import CheckpointError

app = typer.Typer(help="List, verify, import and export checkpoints.", no_args_is_help=True)

_Json = Annotated[bool, typer.Option("--json", help="print JSON for programs")]


@app.command("list")
def list_command(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="a run's name or folder", show_default=False)
    ],
    as_json: _Json = False,
) -> None:
    """List a run's checkpoints, newest first, without reading their tensors."""
    rows = [_examine(path, hashes=False) for path in _checkpoints(run)]
    _show(rows, as_json, ok="committed", then=f"check their bytes: dualray checkpoint verify {run}")


@app.command("verify")
def verify_command(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="a step-N folder, or a run to verify all of it", show_default=False
        ),
    ],
    as_json: _Json = False,
) -> None:
    """Read every byte of a checkpoint and compare it with the hashes written with it."""
    rows = [_examine(folder, hashes=True) for folder in _checkpoints(path)]
    _show(rows, as_json, ok="verified", then=f"serve it: dualray serve {rows[0]['path']}")
    if not all(row["ok"] for row in rows):
        raise typer.Exit(CheckpointError.exit_code)


@app.command("import")
def import_command(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="HF_DIR", help="folder with config.json and safetensors", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="new folder for the checkpoint", show_default=False)],
    fp8: Annotated[
        str, typer.Option(help="FP8 weights: dequantise (to bfloat16) or keep")
    ] = "dequantise",
    as_json: _Json = False,
) -> None:
    """Turn a Hugging Face DeepSeek-V3 model into a checkpoint to serve, train from or score."""
    from dualray.checkpoint.hf_files import HfFolder
    from dualray.checkpoint.hf_import import import_checkpoint
    from dualray.checkpoint.hf_plan import plan_import
    from dualray.platform.imported import imported_run, model_section

    with HfFolder(source) as folder:
        plan = plan_import(folder, fp8=fp8)
        meta = imported_run(plan, source, out)
        with _bar("importing", plan.size_bytes) as progress:
            import_checkpoint(folder, plan, out, meta, progress=progress)
    if as_json:
        summary = {"path": str(out), "num_tensors": len(plan.targets), "notes": plan.notes}
        typer.echo(json.dumps(summary | {"size_bytes": plan.size_bytes, "model": meta["model"]}))
        return
    for note in plan.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"{len(plan.targets)} tensors, {plan.size_bytes / 1e9:.2f} GB, in {out}")
    if plan.tokenizer_sha256 is not None:
        typer.echo(f"serve it: dualray serve {out}")
    typer.echo("train on from it, with this in a run file:\n")
    typer.echo(model_section(plan.model) + f"train:\n  init_from: {out}")


@app.command("export")
def export_command(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="a step-N folder, or a run's name or folder for its newest checkpoint",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="new folder for the Hugging Face model", show_default=False)
    ],
    max_shard_size: Annotated[
        str, typer.Option(help="largest safetensors file: a number with MB or GB")
    ] = "5GB",
    as_json: _Json = False,
) -> None:
    """Write a checkpoint's weights as Hugging Face safetensors, config.json and tokenizer."""
    from dualray.checkpoint.hf_export import export_checkpoint
    from dualray.checkpoint.hf_files import refuse_existing_out
    from dualray.checkpoint.reader import Reader
    from dualray.checkpoint.store import find
    from dualray.platform.imported import shard_bytes
    from dualray.platform.stored_tokenizer import stored_tokenizer

    limit = shard_bytes(max_shard_size)
    refuse_existing_out(out)
    found = find(_folder(checkpoint))
    for message in found.messages:
        typer.echo(f"warning: {message}", err=True)
    assert found.path is not None, "find raises when there is none"
    reader = Reader(found.path)
    tokenizer = stored_tokenizer(reader)
    eos_id = None if tokenizer is None else tokenizer.eos_id
    with _bar("exporting", reader.size_bytes) as progress:
        done = export_checkpoint(
            found.path, out, max_shard_bytes=limit, eos_id=eos_id, progress=progress
        )
    if as_json:
        typer.echo(json.dumps({"path": str(out), "from": str(found.path), **asdict(done)}))
        return
    typer.echo(
        f"{found.path}: {done.num_tensors} tensors, {done.size_bytes / 1e9:.2f} GB, "
        f"{done.num_files} safetensors files in {out}"
    )
    typer.echo(f'load it: transformers.AutoModelForCausalLM.from_pretrained("{out}")')


@contextmanager
def _bar(doing: str, size_bytes: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, gone at the end; yields what is told bytes done."""
    with Progress(
        TextColumn(doing),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task(doing, total=size_bytes)
        yield lambda count: bar.advance(task, count)


def _folder(name: str) -> Path:
    """A folder by its path, or a run's by its name."""
    path = Path(name)
    named = Path("runs") / name
    return named if not path.exists() and named.is_dir() else path


def _checkpoints(name: str) -> list[Path]:
    """All checkpoints of the run that is meant, or else the folder itself."""
    # Reading checkpoints imports torch, 1.6 s that no other command should pay.
    from dualray.checkpoint.store import checkpoints_of, steps

    path = _folder(name)
    if not path.is_dir():
        raise CheckpointError(
            f"{name} is neither a folder nor a run in {Path('runs').absolute()}",
            hint="name a run, its folder or a step-N folder in it",
        )
    inside = checkpoints_of(path)
    found = [folder for _, folder in steps(inside)]
    if inside != path and not found:
        raise CheckpointError(
            f"there is no checkpoint in {path}",
            hint="set train.checkpoint_every to have them written",
        )
    return found or [path]


def _examine(folder: Path, *, hashes: bool) -> dict[str, Any]:
    """One row: sound or the sentence why not."""
    from dualray.checkpoint.store import verify

    try:
        manifest = verify(folder, hashes=hashes)
    except CheckpointError as error:
        return {"path": str(folder), "ok": False, "problem": str(error)}
    return {
        "path": str(folder),
        "ok": True,
        "step": manifest.meta["step"],
        "num_tensors": len(manifest.tensors),
        "num_files": len(manifest.files),
        "size_bytes": manifest.size_bytes,
    }


def _show(rows: list[dict[str, Any]], as_json: bool, *, ok: str, then: str) -> None:
    if as_json:
        typer.echo(json.dumps({"checkpoints": rows}))
        return
    table = Table("checkpoint", "step", "tensors", "files", "MB", "state", box=None)
    for row in rows:
        name = Path(row["path"]).name
        if row["ok"]:
            counts = (row["step"], row["num_tensors"], row["num_files"])
            table.add_row(name, *map(str, counts), f"{row['size_bytes'] / 1e6:.1f}", ok)
        else:
            table.add_row(name, "", "", "", "", "damaged")
    Console().print(table)
    for row in rows:
        if not row["ok"]:
            typer.echo(f"error: {row['problem']}", err=True)
    if all(row["ok"] for row in rows):
        typer.echo(then)
