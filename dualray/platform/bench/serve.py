"""Serving beside Hugging Face's `generate`: same weights, same requests, both greedy.

What answers is the whole service: a Ray with engine and worker, asked over gRPC by a process of
its own. Both sides have as many torch threads, and neither computes while the other is timed.
Weights are random: what is generated is no text that means anything, and costs as much.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from dualray.data.tokenizer import Tokenizer
from dualray.errors import RunError
from dualray.model.config import ModelConfig
from dualray.parallel.layout import Layout
from dualray.platform.bench.serve_client import Answer, Load, send_from_elsewhere
from dualray.platform.bench.serve_gang import SEED, Deployment, Server, served
from dualray.platform.bench.serve_hugging_face import HuggingFaceGenerator
from dualray.platform.bench.serve_idle import idle_shares
from dualray.platform.bench.serve_requests import (
    BenchRequest,
    arriving_requests,
    equal_requests,
    num_tokens,
)
from dualray.platform.bench.serve_steps import busy_shares, step_overhead
from dualray.platform.bench.serve_streams import hold_streams
from dualray.platform.bench.serve_workload import Workload

Say = Callable[[str], None]


def compare_serving(
    load: Workload, model: ModelConfig, tokenizer: Tokenizer, text: str, *, on_part: Say
) -> list[dict[str, Any]]:
    """One row a part. Prompts are passages of `text`.

    Raises RunError where the two sides begin their completions differently.
    """
    batch = equal_requests(
        tokenizer,
        text,
        count=load.requests,
        prompt_tokens=load.prompt_tokens,
        new_tokens=load.new_tokens,
        seed=1,
    )
    mix = arriving_requests(
        tokenizer,
        text,
        count=load.mix_requests,
        prompt_tokens=load.mix_prompt_tokens,
        new_tokens=load.mix_new_tokens,
        per_s=load.mix_per_s,
        seed=2,
    )
    torch.set_num_threads(load.threads)
    peer = HuggingFaceGenerator(model, SEED)
    context = model.max_position_embeddings

    def deployment(layout: Layout, threads: int) -> Deployment:
        return Deployment(
            model=model,
            tokenizer=tokenizer,
            layout=layout,
            threads=threads,
            max_batch=load.max_batch,
            max_context=context,
            stream_interval_s=load.stream_interval_s,
        )

    rows = []
    on_part("one worker: starting")
    with served(deployment(Layout(), load.threads)) as server:
        rows += [*_batch(load, batch, peer, server, on_part)]
        rows.append(_mix(load, mix, batch[0], peer, server, tokenizer, on_part))
        on_part(f"{load.streams} streams for {load.hold_s:g} s")
        rows.append(
            hold_streams(
                server,
                tokenizer,
                text,
                num_streams=load.streams,
                hold_s=load.hold_s,
                known_prompts=load.known_prompts,
                longest=min(64, context // 4),
            )
        )
    on_part("four workers: starting")
    with served(deployment(Layout(pipeline=2, experts=2), 1)) as server:
        rows += _four_workers(load, batch, mix, server, on_part)
    on_part("stages of a deep pipeline")
    rows += idle_shares(model, load.idle, repeats=load.idle_repeats)
    return rows


def over_grpc(server: Server, requests: Sequence[BenchRequest]) -> list[Answer]:
    """Each request in a stream of its own, sent when it arrives by a process of its own.

    Raises RunError if one of them failed.
    """
    streams = tuple((request,) for request in requests)
    answers = [
        answer
        for stream in send_from_elsewhere(Load(target=server.target, streams=streams, hold_s=0))
        for answer in stream
    ]
    errors = [answer.error for answer in answers if answer.error]
    if errors or len(answers) < len(requests):
        why = errors[0] if errors else "a stream ended without an answer"
        raise RunError(
            f"of {len(requests)} requests {len(answers) - len(errors)} were answered ({why})",
            hint="see the log of Ray in /tmp/ray/session_latest/logs",
        )
    return answers


def seconds_of(answers: Sequence[Answer]) -> float:
    """From the first request to the last token."""
    return max(answer.last_s for answer in answers) - min(answer.sent_s for answer in answers)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all are not above."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * round(share * 100) // 100) - 1)]


def _batch(
    load: Workload,
    batch: list[BenchRequest],
    peer: HuggingFaceGenerator,
    server: Server,
    on_part: Say,
) -> list[dict[str, Any]]:
    """The batch on three sides in turn: Hugging Face's, over gRPC, and asked of the engine."""
    on_part("Hugging Face's experts")
    experts = peer.choose_experts(batch)
    server.direct(batch)
    theirs: list[float] = []
    remote: list[float] = []
    by_token: list[float] = []
    direct: list[float] = []
    for number in range(load.rounds):
        on_part(f"the batch, round {number + 1} of {load.rounds}")
        generated = peer.at_once(batch)
        theirs.append(generated.seconds)
        answers = over_grpc(server, batch)
        remote.append(seconds_of(answers))
        asked = server.direct(batch)
        direct.append(seconds_of(asked))
        server.set_stream_interval(0.0)
        by_token.append(seconds_of(over_grpc(server, batch)))
        server.set_stream_interval(load.stream_interval_s)
    tokens = num_tokens(batch)
    agreement = _agreement(batch, {a.name: a.ids for a in asked}, generated.ids)
    texts = {answer.name: answer.text for answer in asked}
    same = sum(answer.text == texts[answer.name] for answer in answers)
    overheads = [over / inside - 1 for over, inside in zip(remote, direct)]
    each_token = [over / inside - 1 for over, inside in zip(by_token, direct)]
    return [
        {
            "part": "batch",
            "requests": len(batch),
            "tokens": tokens,
            "dualray": {"median_s": statistics.median(remote), **_rate(tokens, remote)},
            "hugging_face": {
                "median_s": statistics.median(theirs),
                **_rate(tokens, theirs),
                "experts": experts,
            },
            "ratio": statistics.median(t / r for t, r in zip(theirs, remote)),
            "rounds": load.rounds,
            **agreement,
        },
        {
            "part": "grpc",
            "tokens": tokens,
            "direct": _rate(tokens, direct),
            "over_grpc": _rate(tokens, remote),
            "overhead": statistics.median(overheads),
            "overhead_min": min(overheads),
            "overhead_max": max(overheads),
            "every_token_overhead": statistics.median(each_token),
            "same_texts": same,
        },
    ]


def _rate(tokens: int, seconds: Sequence[float]) -> dict[str, float]:
    return {"tokens_per_s": tokens / statistics.median(seconds)}


def _agreement(
    requests: Sequence[BenchRequest],
    ours: dict[str, tuple[int, ...]],
    theirs: dict[str, tuple[int, ...]],
) -> dict[str, int]:
    """How many completions agree in full. Later tokens may differ where two are near-ties."""
    for request in requests:
        name = request.name
        if ours[name][0] != theirs[name][0] or len(ours[name]) != len(theirs[name]):
            raise RunError(
                f"request {name} begins with token {ours[name][0]} of {len(ours[name])} here and "
                f"with {theirs[name][0]} of {len(theirs[name])} in Hugging Face's model of the "
                "same weights",
                hint="find which of the two computes something else before comparing their speed",
            )
    same = sum(ours[request.name] == theirs[request.name] for request in requests)
    return {"completions": len(requests), "same_completions": same}


def _mix(
    load: Workload,
    mix: list[BenchRequest],
    single: BenchRequest,
    peer: HuggingFaceGenerator,
    server: Server,
    tokenizer: Tokenizer,
    on_part: Say,
) -> dict[str, Any]:
    """Requests that come over time, against two ways of doing without a server."""
    on_part("the mix, over gRPC")
    answers = over_grpc(server, mix)
    first_s = [answer.first_token_s for answer in answers]
    on_part("the mix, Hugging Face one by one")
    experts = peer.choose_experts([single])
    alone_s = statistics.median(peer.at_once([single]).seconds for _ in range(load.rounds))
    in_turn = peer.as_they_come(mix, max_batch=1)
    on_part("the mix, Hugging Face in static batches")
    batch_experts = peer.choose_experts(mix[: load.hugging_face_batch])
    batches = peer.as_they_come(mix, max_batch=load.hugging_face_batch)
    texts = {name: tokenizer.decode(ids) for name, ids in in_turn.ids.items()}
    tokens, own_s = num_tokens(mix), seconds_of(answers)
    best_s = min(in_turn.seconds, batches.seconds)
    return {
        "part": "mix",
        "requests": len(mix),
        "tokens": tokens,
        "arrive_within_s": mix[-1].arrives_s,
        "dualray": {
            "tokens_per_s": tokens / own_s,
            "first_token_p50_s": percentile(first_s, 0.5),
            "first_token_p95_s": percentile(first_s, 0.95),
        },
        "hugging_face": {
            "one_by_one_tokens_per_s": tokens / in_turn.seconds,
            "static_batches_tokens_per_s": tokens / batches.seconds,
            "faster": "one by one" if in_turn.seconds == best_s else "static batches",
            "single_request_s": alone_s,
            "experts": experts,
            "batch_experts": batch_experts,
        },
        "ratio": best_s / own_s,
        "completions": len(mix),
        "same_completions": sum(texts[answer.name] == answer.text for answer in answers),
    }


def _four_workers(
    load: Workload,
    batch: list[BenchRequest],
    mix: list[BenchRequest],
    server: Server,
    on_part: Say,
) -> list[dict[str, Any]]:
    """The same requests over four workers of one thread, and what their steps cost besides."""
    server.direct(batch)
    seconds = []
    server.take_steps()
    for number in range(load.rounds):
        on_part(f"four workers: the batch, round {number + 1} of {load.rounds}")
        seconds.append(seconds_of(over_grpc(server, batch)))
    engine, workers = server.take_steps()
    on_part("four workers: the mix")
    answers = over_grpc(server, mix)
    mix_engine, mix_workers = server.take_steps()
    cores = len(os.sched_getaffinity(0))
    return [
        {
            "part": "four workers",
            "layout": "2 pipeline x 2 expert ranks, dualpipe",
            "batch": _rate(num_tokens(batch), seconds),
            "mix": {
                "tokens_per_s": num_tokens(mix) / seconds_of(answers),
                "first_token_p95_s": percentile([a.first_token_s for a in answers], 0.95),
            },
        },
        {"part": "overhead", "messages_per_step_and_worker": 1, **step_overhead(engine, workers)},
        {
            "part": "idle",
            "case": "batch and mix",
            "how": "measured by processor time",
            "num_ranks": 2,
            "batch": busy_shares(engine, workers, cores=cores),
            "mix": busy_shares(mix_engine, mix_workers, cores=cores),
        },
    ]


def config_dict(load: Workload, model: ModelConfig) -> dict[str, Any]:
    """What a record says of the workload."""
    return asdict(load) | {"model": asdict(model)}
