"""`dualray bench`: side-by-side benchmarks against a peer, in one run on this machine."""

from __future__ import annotations

import typer

from dualray.platform.commands.bench_attention import attention
from dualray.platform.commands.bench_balance import balance
from dualray.platform.commands.bench_context import context
from dualray.platform.commands.bench_experts import experts
from dualray.platform.commands.bench_model import model
from dualray.platform.commands.bench_overlap import overlap
from dualray.platform.commands.bench_rebalance import rebalance
from dualray.platform.commands.bench_schedule import schedule
from dualray.platform.commands.bench_serve import serve
from dualray.platform.commands.bench_speculation import speculation

app = typer.Typer(help="Side-by-side benchmarks.", no_args_is_help=True)
app.command("model")(model)
app.command("experts")(experts)
app.command("attention")(attention)
app.command("balance")(balance)
app.command("rebalance")(rebalance)
app.command("context")(context)
app.command("schedule")(schedule)
app.command("overlap")(overlap)
app.command("serve")(serve)
app.command("speculation")(speculation)
