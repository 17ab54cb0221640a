"""What the serving benchmark asks, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from dualray.platform.bench.serve_idle import IdleCase


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is asked of whom."""

    preset: str = "demo"
    vocabulary: str = "bpe:2048"
    threads: int = 2
    """Torch threads of the one worker and of Hugging Face's side."""
    rounds: int = 3
    """In each of which every side runs the batch once; medians count."""
    requests: int = 16
    prompt_tokens: int = 256
    new_tokens: int = 128
    mix_requests: int = 128
    mix_prompt_tokens: tuple[int, int] = (32, 512)
    mix_new_tokens: tuple[int, int] = (16, 256)
    mix_per_s: float = 16.0
    """Mean arrivals a second: more than Hugging Face's side can do, less than ours."""
    hugging_face_batch: int = 16
    """Largest static batch."""
    stream_interval_s: float = 0.05
    """As `serve.stream_interval_s`; what gRPC costs is measured with 0 too."""
    streams: int = 200
    hold_s: float = 60.0
    known_prompts: int = 24
    """Prompts whose completions are computed alone beforehand, for the streams to be checked."""
    max_batch: int = 256
    idle: tuple[IdleCase, ...] = field(
        default=(
            IdleCase(words="256 decode", num_ranks=4, num_sequences=256, num_new=1, context=300),
            IdleCase(words="8 prompts", num_ranks=4, num_sequences=8, num_new=256, context=0),
        )
    )
    idle_repeats: int = 20


FULL = Workload()
QUICK = Workload(
    preset="tiny",
    vocabulary="bytes",
    threads=1,
    rounds=1,
    requests=2,
    prompt_tokens=12,
    new_tokens=8,
    mix_requests=3,
    mix_prompt_tokens=(4, 12),
    mix_new_tokens=(4, 8),
    hugging_face_batch=2,
    streams=6,
    hold_s=1.0,
    known_prompts=2,
    max_batch=8,
    idle=(IdleCase(words="4 decode", num_ranks=4, num_sequences=4, num_new=1, context=8),),
    idle_repeats=1,
)
