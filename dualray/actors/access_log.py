"""The access log: a line of JSON for each request when it ends, refused ones too.

It names nobody's token, and no text of prompts or completions unless told to write prompts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from dualray.actors.line_file import LineFile
from dualray.actors.request_watch import EndedRequest

Decode = Callable[[Sequence[int]], str]

_TRACE_PARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}.*")


class AccessLog:
    """An observer of requests that writes into `path`.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, path: str, decode: Decode | None = None) -> None:
        """With `decode`, which makes text of token ids, lines have their prompts."""
        private = decode is not None
        mode = 0o600 if private else 0o640
        self._file = LineFile(path, "serve.access_log", mode=mode, private=private)
        self._decode = decode

    def __call__(self, ended: EndedRequest) -> None:
        self._file.add(lambda: json.dumps(line_of(ended, self._decode), ensure_ascii=False))

    def stop(self) -> None:
        """Writes what is left."""
        self._file.stop()


def line_of(ended: EndedRequest, decode: Decode | None = None) -> dict[str, Any]:
    """What a line says; times in seconds. A request that was refused has no tokens, no finish
    reason and no times but the whole."""
    ended_at = datetime.fromtimestamp(ended.ended_unix_ns / 1e9, UTC)
    reasons = ended.finish_reasons
    line: dict[str, Any] = {
        "time": ended_at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "request_id": ended.request_id,
        "method": ended.method,
        "peer": ended.peer,
        "model": ended.model,
        "training_step": ended.weights.training_step,
        "code": ended.code.name,
        "n": len(ended.completions),
        "prompt_tokens": ended.num_prompt_tokens,
        "cached_tokens": ended.num_cached_tokens,
        "output_tokens": ended.num_output_tokens,
        "finish_reason": reasons[0] if len(set(reasons)) == 1 else list(reasons) or None,
        "preemptions": ended.num_preemptions,
        "queue_s": _rounded(ended.seconds_since_arrival(ended.started_ns)),
        "first_token_s": _rounded(ended.seconds_since_arrival(ended.first_token_ns)),
        "total_s": _rounded(ended.seconds_since_arrival(ended.ended_ns)),
    }
    if ended.refused_field:
        line["field"] = ended.refused_field
    if trace := _TRACE_PARENT.fullmatch(ended.trace_headers.get("traceparent", "")):
        line["trace_id"] = trace[1]
    if decode is not None and ended.completions:
        line["prompt"] = decode(ended.completions[0].request.prompt_ids)
    return line


def _rounded(seconds: float | None) -> float | None:
    """To microseconds."""
    return None if seconds is None else round(seconds, 6)
