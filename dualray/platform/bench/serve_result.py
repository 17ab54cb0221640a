"""What the serving benchmark's rows say, in words, and against their goals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Rows = Sequence[dict[str, Any]]


def part(rows: Rows, name: str) -> dict[str, Any]:
    """The one row of that part."""
    (found,) = (row for row in rows if row["part"] == name)
    return found


def goals(rows: Rows) -> list[dict[str, Any]]:
    """Each goal with its value and whether it is met."""
    mix, streams = part(rows, "mix"), part(rows, "streams")
    first_s = mix["dualray"]["first_token_p95_s"]
    single_s = mix["hugging_face"]["single_request_s"]
    overhead_ms = part(rows, "overhead")["beyond_slowest_ms"]
    ratio, mix_ratio = part(rows, "batch")["ratio"], mix["ratio"]
    grpc = part(rows, "grpc")["overhead"]
    damage = streams["lost"] + streams["mixed_up"]
    found = [
        ("batch at least 2.5x Hugging Face's tokens a second", ratio, ratio >= 2.5),
        ("mix at least 5x Hugging Face's tokens a second", mix_ratio, mix_ratio >= 5),
        (
            "p95 of the first token under load within Hugging Face's time of one request (of it)",
            first_s / single_s,
            first_s <= single_s,
        ),
        ("gRPC costs less than 5 % of the tokens a second", grpc, grpc < 0.05),
        (f"of {streams['streams']} streams nothing lost or mixed up", damage, damage == 0),
        ("a step on four workers costs less than 1.5 ms besides", overhead_ms, overhead_ms < 1.5),
    ]
    return [{"words": words, "value": value, "met": bool(met)} for words, value, met in found]


def speeds(rows: Rows) -> list[tuple[str, ...]]:
    """Cells of the table: what, dualray, Hugging Face, ratio, four workers."""
    four = part(rows, "four workers")
    batch, mix = part(rows, "batch"), part(rows, "mix")
    theirs = mix["hugging_face"]
    best = max(theirs["one_by_one_tokens_per_s"], theirs["static_batches_tokens_per_s"])
    return [
        (
            f"{batch['requests']} requests at once",
            f"{batch['dualray']['tokens_per_s']:.0f}",
            f"{batch['hugging_face']['tokens_per_s']:.0f}",
            f"{batch['ratio']:.1f}x",
            f"{four['batch']['tokens_per_s']:.0f}",
        ),
        (
            f"{mix['requests']} over {mix['arrive_within_s']:.0f} s",
            f"{mix['dualray']['tokens_per_s']:.0f}",
            f"{best:.0f} ({theirs['faster']})",
            f"{mix['ratio']:.1f}x",
            f"{four['mix']['tokens_per_s']:.0f}",
        ),
    ]


def sentences(rows: Rows) -> list[str]:
    """The other parts, a line each."""
    batch, mix, grpc = part(rows, "batch"), part(rows, "mix"), part(rows, "grpc")
    streams, over = part(rows, "streams"), part(rows, "overhead")
    ours, theirs = mix["dualray"], mix["hugging_face"]
    found = [
        f"same completions: {batch['same_completions']} of {batch['completions']} in the batch, "
        f"{mix['same_completions']} of {mix['completions']} in the mix",
        f"first token in the mix: median {ours['first_token_p50_s']:.3f} s, p95 "
        f"{ours['first_token_p95_s']:.3f} s; Hugging Face shows a whole request after "
        f"{theirs['single_request_s']:.3f} s, alone",
        f"gRPC: {grpc['over_grpc']['tokens_per_s']:.0f} tokens/s over it, "
        f"{grpc['direct']['tokens_per_s']:.0f} asked of the engine itself "
        f"({grpc['overhead']:+.1%} time; {grpc['every_token_overhead']:+.1%} where every token has "
        "a message)",
        f"{streams['streams']} streams for {streams['held_s']:.0f} s: {streams['requests']} "
        f"requests, {streams['tokens']} tokens, lost {streams['lost']}, mixed up "
        f"{streams['mixed_up']}; {streams['same_completions']} of "
        f"{streams['known_completions']} completions as alone",
        f"a step on four workers: {over['step_ms']:.1f} ms, {over['beyond_slowest_ms']:.2f} beyond "
        f"the slowest worker; {over['until_last_began_ms']:.2f} until all had begun, "
        f"{over['after_last_end_ms']:.2f} after the last had ended; {over['between_ms']:.2f} "
        "between steps",
    ]
    idle = [_idle(row) for row in rows if row["part"] == "idle"]
    return [*found, *idle]


def _idle(row: dict[str, Any]) -> str:
    if "one_group" not in row:
        batch, mix = row["batch"], row["mix"]
        return (
            f"idle, {row['num_ranks']} pipeline x 2 expert ranks: none but for uneven work, "
            f"{batch['idle_with_own_cores']:.0%} (batch) and {mix['idle_with_own_cores']:.0%} "
            f"(mix) by processor time; {batch['cores_busy']:.0%} of the cores computed"
        )
    one, chosen = row["one_group"], row["chosen"]
    return (
        f"idle, {row['num_ranks']} pipeline ranks, {row['case']} ({row['how']}): one group "
        f"{one['idle']:.0%}, {one['step_ms']:.1f} ms a step; {chosen['groups']} groups "
        f"{chosen['idle']:.0%}, {chosen['step_ms']:.1f} ms"
    )
