"""What one call may ask for, all of its completions together.

Each completion is within the limits of `SamplingParams`; n of them need n times the memory, and
n times the work on the engine's loop before the first step.
"""

from __future__ import annotations

from dualray.errors import RequestError
from dualray.inference.parameter_values import require
from dualray.inference.request import SamplingParams

MAX_LOGPROBS_HELD = 1 << 22
"""Most log-probabilities that a call's tokens may bring, alternatives included: they are kept until
their reader takes them, in about 100 bytes each. A completion of DeepSeek-V3's whole context with
20 alternatives has 3.4 million."""

MAX_IDS_READ = 1 << 20
"""Most ids of `stop_token_ids` and `allowed_token_ids`, times n."""

MAX_BAD_CHARACTERS = 1 << 17
"""Most characters of `bad_words`, times n: they are made tokens for each completion."""


def check_call(params: SamplingParams, max_context: int, max_waiting: int) -> None:
    """Refuses a call that can never be accepted, or whose completions together are too much.

    Raises:
        RequestError: naming the parameter to lower.
    """
    n = params.n
    require(n <= max_waiting, "n", n, f"must be at most serve.max_waiting, which is {max_waiting}")
    length = min(params.max_tokens, max_context)
    each = 1 + (params.logprobs or 0)
    if n * length * each > MAX_LOGPROBS_HELD:
        raise RequestError(
            f"sampling_parameters.n x max_tokens x (logprobs + 1) is {n} x {length} x {each} and "
            f"must be at most {MAX_LOGPROBS_HELD}",
            hint="lower n, max_tokens or logprobs",
            field="n",
        )
    num_ids = len(params.stop_token_ids) + len(params.allowed_token_ids)
    if n * num_ids > MAX_IDS_READ:
        raise RequestError(
            f"sampling_parameters.n x (stop_token_ids + allowed_token_ids) is {n} x {num_ids} and "
            f"must be at most {MAX_IDS_READ}",
            hint="lower n or send fewer ids",
            field="n",
        )
    num_characters = sum(map(len, params.bad_words))
    if n * num_characters > MAX_BAD_CHARACTERS:
        raise RequestError(
            f"sampling_parameters.n x characters of bad_words is {n} x {num_characters} and must "
            f"be at most {MAX_BAD_CHARACTERS}",
            hint="lower n or send fewer words",
            field="n",
        )
