"""What the benchmark's rows on speculation say, in words, and against their goals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def speculation_sentences(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Of the rows on speculation among others, a line each."""
    found = []
    for row in rows:
        if row["part"] == "speculation costs":
            found.append(
                f"a step of {row['batch']} sequences: {row['one_row_ms']:.2f} ms, with two rows of "
                f"each {row['two_rows_ms']:.2f}, and a draft {row['one_draft_ms']:.2f} more"
            )
        if row["part"] == "speculation":
            places = ", ".join(f"{share:.0%}" for share in row["acceptance_by_place"])
            found.append(
                f"drafts of a model trained for {row['train_steps']} steps on {row['corpus']}, "
                f"{row['batch']} at once, temperature {row['temperature']:g}: accepted {places} "
                f"by place, {row['drafting']['tokens_per_s']:.0f} tokens/s with and "
                f"{row['plain']['tokens_per_s']:.0f} without ({row['ratio']:.2f}x)"
            )
    return found


def speculation_goals(rows: Sequence[dict[str, Any]]) -> list[tuple[str, float, bool]]:
    """(words, value, whether it is met), greedy and with one sequence at a time."""
    found = []
    for row in rows:
        if row["part"] == "speculation" and (row["batch"], row["temperature"]) == (1, 0.0):
            first, ratio = row["acceptance_by_place"][0], row["ratio"]
            found += [
                ("first drafts accepted, at least 60 %", first, first >= 0.6),
                ("at least 1.1x the tokens a second with drafts, at batch 1", ratio, ratio >= 1.1),
            ]
    return found
