"""`dualray checkpoint`: which checkpoints a run has, and whether their bytes are still right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dualray.errors import CheckpointError

app = typer.Typer(help="List and verify checkpoints.", no_args_is_help=True)

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


def _checkpoints(name: str) -> list[Path]:
    """All checkpoints of the run that is meant, or else the folder itself."""
    # Reading checkpoints imports torch, 1.6 s that no other command should pay.
    from dualray.checkpoint.store import checkpoints_of, steps

    path = Path(name)
    if not path.exists() and (Path("runs") / name).is_dir():
        path = Path("runs") / name
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
