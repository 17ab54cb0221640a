"""The balance benchmark as a page of the report: held-out loss and MaxVio of four settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from dualray.platform.bench.balance_result import WORDS, Row
from dualray.platform.readable import count
from dualray.platform.report import html
from dualray.platform.report.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    canvas,
    smooth,
    step_axis,
    to_svg,
)

COLORS = {"none": GREY, "aux_loss": ORANGE, "bias": BLUE, "aux_loss_and_bias": GREEN}
HEAD = (
    "balance",
    "training loss",
    "held-out loss",
    "bits per byte",
    "MaxVio, batch",
    "MaxVio, held-out text",
    "MaxVio, run",
)


def cells(row: Row) -> list[str]:
    """The texts of one setting's row of the table, behind `HEAD`: means over the seeds."""
    mean = row["mean"]
    return [
        WORDS[row["balance"]],
        f"{mean['train_loss']:.4f}",
        f"{mean['heldout_loss']:.4f}",
        f"{mean['heldout_bits_per_byte']:.4f}",
        f"{mean['max_vio_batch']:.3f}",
        f"{mean['max_vio_global']:.3f}",
        f"{mean['max_vio_run']:.3f}",
    ]


def claim_cells(claim: Row) -> list[str]:
    """What was expected, the differences seed by seed, and whether it came."""
    error = claim["standard_error"]
    spread = "" if error is None else f" (standard error {error:.4f})"
    return [
        claim["claim"],
        ", ".join(f"{difference:+.4f}" for difference in claim["differences"]),
        f"{claim['mean']:+.4f}{spread}",
        claim["verdict"],
    ]


def render(record: dict[str, Any]) -> str:
    """The page of one record; it refers to nothing outside itself."""
    rows, config, machine = record["results"], record["config"], record["machine"]
    model, train = config["model"], config["train"]
    tokens = train["steps"] * train["micro_batches"] * train["micro_batch_size"] * train["seq_len"]
    facts = [
        ("Model", f"{count(config['parameters'])} parameters, {model['num_hidden_layers']} layers "
         f"of which {model['num_hidden_layers'] - model['first_k_dense_replace']} have "
         f"{model['n_routed_experts']} experts, {model['num_experts_per_tok']} a token"),
        ("Training", f"{train['steps']} steps of {train['micro_batch_size']} x {train['seq_len']} "
         f"tokens: {count(tokens)} of {count(config['training_tokens'])} in the corpus; seeds "
         + ", ".join(map(str, config["seeds"]))),
        ("Balance", f"gamma {train['gamma']:g} for {train['gamma_steps']} steps, then 0; alpha "
         f"{train['alpha']:g}; weight of the auxiliary loss {config['aux_alpha']:g}"),
        ("Corpus", f"{config['corpus']}, {config['vocab_size']} tokens of vocabulary"),
        ("Machine", f"{machine['cpu']}, {machine['cores']} cores"),
        ("Versions", ", ".join(f"{k} {v}" for k, v in record["versions"].items() if v)),
    ]  # fmt: skip
    claim_head = ("expected as published", "differences by seed", "mean", "came out")
    return html.page(
        heading="dualray benchmark",
        name="Balance without an auxiliary loss",
        facts=html.term_list(facts),
        sections=[
            html.section("Figures", html.table(HEAD, map(cells, rows)) + _what_they_are()),
            html.section(
                "Expected and found",
                html.table(claim_head, map(claim_cells, record["claims"])) + _how_it_is_judged(),
            ),
            html.section(
                "Settings",
                html.figure(settings_figure(rows), "Every point is one seed, the bar their mean."),
            ),
            html.section(
                "In training",
                html.figure(
                    curves_figure(rows),
                    "Means over the seeds and over neighbouring steps. All settings saw the same "
                    "batches in the same order, from the same weights.",
                ),
            ),
        ],
    )


def _what_they_are() -> str:
    return (
        "<p>Means over the seeds. Losses are nats a token, of the last training steps and of the "
        "held-out text. MaxVio is the fullest expert's load over the mean, minus one, averaged "
        "over the layers with experts: of single batches in the last fifth of training, of the "
        "whole held-out text, and of all training steps together (arXiv 2408.15664).</p>"
    )


def _how_it_is_judged() -> str:
    return (
        "<p>Differences are those of one seed: the same weights to begin with and the same "
        "batches. A figure is lower where the mean difference lies further below 0 than 95 % of "
        "draws of equal settings would (Student's t), and is not where the mean is not below 0. "
        "A loss is no higher where the mean is not above 0, and is higher where it lies further "
        "above 0 than 95 % of draws. All else is undecided.</p>"
    )


def settings_figure(rows: Sequence[Row]) -> str:
    """Held-out loss, MaxVio of batches and MaxVio of the held-out text, by setting."""
    with canvas(2.9) as drawing:
        panels = drawing.subplots(1, 3)
        for axes, (figure, title) in zip(
            panels,
            (
                ("heldout_loss", "held-out loss, nats per token"),
                ("max_vio_batch", "MaxVio of a batch"),
                ("max_vio_global", "MaxVio of the held-out text"),
            ),
        ):
            for place, row in enumerate(rows):
                values = [seed[figure] for seed in row["seeds"]]
                color = COLORS[row["balance"]]
                mean = row["mean"][figure]
                axes.plot([place - 0.3, place + 0.3], [mean, mean], color=color, linewidth=3)
                axes.plot([place] * len(values), values, "o", color=color, markersize=5)
            axes.set_title(title)
            axes.set_xticks(range(len(rows)), [_wrapped(row["balance"]) for row in rows])
            axes.set_xlim(-0.6, len(rows) - 0.4)
            axes.grid(visible=False, axis="x")
            if figure != "heldout_loss":
                axes.set_ylim(bottom=0)
        return to_svg(drawing, "balance-settings", "Loss and MaxVio of four ways to balance")


def _wrapped(setting: str) -> str:
    return WORDS[setting].replace(" ", "\n")


def curves_figure(rows: Sequence[Row]) -> str:
    """MaxVio of every step's batch, and training loss minus that of the auxiliary loss."""
    with canvas(3.4) as drawing:
        left, right = drawing.subplots(1, 2)
        steps = [step for step, _ in rows[0]["seeds"][0]["loss_curve"]]
        means = {row["balance"]: _mean_curve(row, "loss_curve") for row in rows}
        for row in rows:
            setting = row["balance"]
            color = COLORS[setting]
            left.plot(steps, _mean_curve(row, "max_vio_curve"), color=color, label=WORDS[setting])
            apart = means[setting] - means["aux_loss"]
            right.plot(steps, smooth(apart.tolist(), max(1, len(steps) // 10)), color=color)
        left.set_title("MaxVio of a batch")
        left.set_ylim(bottom=0)
        left.legend(loc="center right")
        right.set_title("training loss minus that with the auxiliary loss")
        _frame(right, steps)
        for axes in (left, right):
            step_axis(axes, steps)
        return to_svg(drawing, "balance-curves", "MaxVio and training loss over the steps")


def _frame(axes: Axes, steps: Sequence[int]) -> None:
    """Leave out the first steps, whose differences dwarf the others."""
    lines = [np.asarray(line.get_ydata(), dtype=float) for line in axes.lines]
    shown = np.concatenate([line[len(steps) // 5 :] for line in lines])
    room = max(1.3 * float(np.abs(shown).max()), 1e-3)
    axes.set_ylim(-room, room)


def _mean_curve(row: Row, name: str) -> np.ndarray:
    return np.mean([[value for _, value in seed[name]] for seed in row["seeds"]], axis=0)
