"""The attention benchmark as a page of the report: losses, cache and speed of decoding."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter

from dualray.platform.readable import count
from dualray.platform.report import html
from dualray.platform.report.style import (
    BLUE,
    GREEN,
    GREY,
    PURPLE,
    canvas,
    smooth,
    step_axis,
    to_svg,
)

COLORS = {"mha": BLUE, "gqa": GREY, "mqa": GREEN, "mla": PURPLE}
HEAD = (
    "attention",
    "parameters",
    "FFN width",
    "training loss",
    "held-out loss",
    "bits per byte",
    "cache bytes a token",
)

Row = dict[str, Any]


def cells(row: Row) -> list[str]:
    """The texts of one kind's row of the table, behind `HEAD` the speeds by context."""
    return [
        row["attention"].upper(),
        f"{row['parameters']:,}",
        f"{row['intermediate_size']:,}",
        f"{row['training']['last_loss']:.4f}",
        f"{row['heldout']['nats_per_token']:.4f}",
        f"{row['heldout']['bits_per_byte']:.4f}",
        f"{row['cache_bytes_per_token']:,}",
        *(f"{speed['tokens_per_s']:,.0f}" for speed in row["decode"]),
    ]


def head(rows: list[Row]) -> list[str]:
    """The table's titles."""
    return [*HEAD, *(f"tokens/s at {speed['context']}" for speed in rows[0]["decode"])]


def render(record: dict[str, Any]) -> str:
    """The page of one record; it refers to nothing outside itself."""
    rows, config, machine = record["results"], record["config"], record["machine"]
    steps, batch, seq_len = config["lr"]["steps"], config["batch_size"], config["seq_len"]
    base = config["base"]
    facts = [
        ("Models", f"{base['num_hidden_layers']} layers, {base['hidden_size']} wide, "
         f"{base['num_attention_heads']} heads of {base['v_head_dim']}, all FFNs dense"),
        ("Training", f"{steps} steps of {batch} x {seq_len} tokens: "
         f"{count(steps * batch * seq_len)} of {count(config['training_tokens'])} in the corpus"),
        ("Corpus", f"{config['corpus']}, {config['vocab_size']} tokens of vocabulary"),
        ("Machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"),
        ("Versions", ", ".join(f"{k} {v}" for k, v in record["versions"].items() if v)),
    ]  # fmt: skip
    return html.page(
        heading="dualray benchmark",
        name="Four attentions",
        facts=html.term_list(facts),
        sections=[
            html.section("Figures", html.table(head(rows), map(cells, rows)) + _what_is_equal()),
            html.section(
                "Learning",
                html.figure(
                    loss_figure(rows),
                    "Training loss, the mean of neighbouring steps. All kinds saw the same "
                    "batches in the same order; one run each, so differences of a few "
                    "hundredths may be chance.",
                ),
            ),
            html.section(
                "Serving",
                html.figure(
                    serving_figure(rows),
                    "What is remembered of a token in all layers, in BF16, and how fast "
                    f"{config['decode_batch']} sequences decode together in fp32.",
                ),
            ),
        ],
    )


def _what_is_equal() -> str:
    return (
        "<p>All models have the same parameters within 2 %: what an attention saves goes into "
        "the FFN. Training loss is the mean of the last steps in nats a token; held-out loss "
        "is that of the whole held-out text. Tokens a second are medians of steps that the "
        "kinds decode in turn, at the contexts named.</p>"
    )


def loss_figure(rows: list[Row]) -> str:
    """Training loss over the steps, held-out losses as points; and what lies between the kinds."""
    first = rows[0]
    with canvas(3.6) as drawing:
        left, right = drawing.subplots(1, 2, width_ratios=(3, 2))
        steps = [step for step, _ in first["training"]["curve"]]
        reference = np.array([loss for _, loss in first["training"]["curve"]])
        ends = []
        for row in rows:
            color, name = COLORS[row["attention"]], row["attention"].upper()
            losses = np.array([loss for _, loss in row["training"]["curve"]])
            heldout = row["heldout"]["nats_per_token"]
            left.plot(steps, losses, color=color, label=f"{name} {heldout:.3f}")
            left.plot(steps[-1], heldout, "o", color=color, markersize=5, clip_on=False)
            ends += [losses.min(), heldout]
            right.plot(steps, smooth((losses - reference).tolist(), len(steps) // 10), color=color)
        # The first steps fall from far above; the interesting part is the rest.
        left.set_ylim(min(ends) - 0.1, max(reference[len(steps) // 10], min(ends) + 0.5))
        left.set_title("nats per token")
        left.legend(title="held-out loss (points)", loc="upper right")
        right.set_title(f"minus that of {first['attention'].upper()}, smoothed")
        for axes in (left, right):
            step_axis(axes, steps)
        return to_svg(drawing, "attention-loss", "Training loss of four attentions")


def serving_figure(rows: list[Row]) -> str:
    """Bars: cache bytes a token, then tokens a second at each context."""
    names = [row["attention"].upper() for row in rows]
    colors = [COLORS[row["attention"]] for row in rows]
    contexts = [speed["context"] for speed in rows[0]["decode"]]
    with canvas(2.8) as drawing:
        panels = drawing.subplots(1, 1 + len(contexts))
        bars = [("cache bytes a token", [row["cache_bytes_per_token"] for row in rows])]
        bars += [
            (f"tokens/s at {context}", [row["decode"][index]["tokens_per_s"] for row in rows])
            for index, context in enumerate(contexts)
        ]
        for axes, (title, values) in zip(panels, bars):
            drawn = axes.bar(names, values, color=colors, width=0.65)
            axes.bar_label(drawn, [count(value) for value in values], padding=2)
            axes.set_title(title)
            axes.margins(y=0.15)
            axes.grid(visible=False, axis="x")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
        return to_svg(drawing, "attention-serving", "Cache and decoding speed of four attentions")
