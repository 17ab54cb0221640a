"""`dualray mode`: lets a living run train, serve or pause."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer


def mode(
    run: Annotated[str, typer.Argument(help="Name or folder of a run.")],
    mode: Annotated[str, typer.Argument(metavar="MODE", help="train, serve or pause.")],
    timeout_s: Annotated[
        float, typer.Option("--timeout", help="Seconds to wait for the switch.")
    ] = 600.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Switch a run between training and serving, or pause it; waits until it has switched."""
    from dualray.platform.folder import RunFolder
    from dualray.platform.live import switch
    from dualray.platform.modes import mode_of

    wanted = mode_of(mode)
    answer = switch(RunFolder.find(run), wanted, timeout_s)
    if as_json:
        typer.echo(json.dumps(asdict(answer), indent=1))
        return
    for sentence in answer.sentences:
        typer.echo(sentence)
