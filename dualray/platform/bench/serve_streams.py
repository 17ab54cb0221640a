"""Many streams held open at once, each of which knows what it must be told.

Every other request is a prompt whose completion was computed alone before. Those between favour
a token of the stream's own so much that nothing else can come: whatever reaches another stream
shows, however near a tie two tokens of the model are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dualray.data.tokenizer import Tokenizer
from dualray.platform.bench.serve_client import Answer, Load, send_from_elsewhere
from dualray.platform.bench.serve_gang import Server
from dualray.platform.bench.serve_requests import BenchRequest, arriving_requests

_BEGINNING = 8
"""Characters of a known completion that must come; behind them a near-tie may go another way."""


def hold_streams(
    server: Server,
    tokenizer: Tokenizer,
    text: str,
    *,
    num_streams: int,
    hold_s: float,
    known_prompts: int,
    longest: int,
) -> dict[str, Any]:
    """Streams that ask for `hold_s` seconds, and what became of them."""
    lengths = (max(1, longest // 4), longest)
    known = arriving_requests(
        tokenizer,
        text,
        count=known_prompts,
        prompt_tokens=lengths,
        new_tokens=lengths,
        per_s=1.0,
        seed=3,
    )
    expected = {r.name: server.direct([replace(r, arrives_s=0.0)])[0].text for r in known}
    streams = []
    for number, token in enumerate(_own_tokens(tokenizer, num_streams)):
        one = known[number % len(known)]
        echo = replace(one, name=f"e{number}", forced_id=token)
        expected[echo.name] = tokenizer.decode([token] * echo.max_tokens)
        streams.append((one, echo))
    load = Load(target=server.target, streams=tuple(streams), hold_s=hold_s)
    answers = send_from_elsewhere(load, timeout_s=120 + 10 * hold_s)
    return {"part": "streams", "streams": num_streams, **judge(streams, expected, answers, hold_s)}


def judge(
    streams: Sequence[Sequence[BenchRequest]],
    expected: dict[str, str],
    answers: Sequence[Sequence[Answer]],
    hold_s: float,
) -> dict[str, Any]:
    """What was lost, what was mixed up, and how many completions are as they were alone.

    Lost: a request without an answer, with an error, or with other than its number of tokens.
    Mixed up: an echo that is not its own, or a known completion that begins otherwise.
    """
    lost = mixed = same = known = tokens = 0
    held_s = []
    for requests, given in zip(streams, answers, strict=True):
        held_s.append(given[-1].last_s if given else 0.0)
        lost += not given
        for number, answer in enumerate(given):
            request = requests[number % len(requests)]
            text = expected[request.name]
            tokens += answer.num_tokens
            if answer.error or answer.num_tokens != request.max_tokens:
                lost += 1
            elif request.forced_id is not None:
                mixed += answer.text != text
            else:
                known += 1
                same += answer.text == text
                mixed += answer.text[:_BEGINNING] != text[:_BEGINNING]
    return {
        "held_s": min(held_s),
        "requests": sum(map(len, answers)),
        "tokens": tokens,
        "tokens_per_s": tokens / max(*held_s, hold_s),
        "lost": lost,
        "mixed_up": mixed,
        "known_completions": known,
        "same_completions": same,
    }


def _own_tokens(tokenizer: Tokenizer, count: int) -> list[int]:
    """Different tokens that are whole visible characters."""
    found = [
        token
        for token in range(tokenizer.vocab_size)
        if (piece := tokenizer.decode([token])).isascii() and piece.isprintable() and piece.strip()
    ]
    assert len(found) >= count, f"{len(found)} tokens for {count} streams"
    return found[:count]
