"""A `GenerateRequest` in our words.

Its fields go by name to `SamplingParams.parse`, so that what the engine learns to do needs no
line here. A message lists what was set: of its numbers without presence that is what is not 0,
and 0 stands for the default (top_p 0 for 1.0, n 0 for 1), as in vLLM's own service.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smg_grpc_proto import vllm_engine_pb2 as pb

from dualray.actors.refusals import NotOfferedError
from dualray.errors import RequestError
from dualray.inference.request import SamplingParams

_CONSTRAINTS: Mapping[str, str] = {
    "json_schema": "json",
    "regex": "regex",
    "grammar": "grammar",
    "structural_tag": "structural_tag",
    "json_object": "json_object",
    "choice": "choice",
}
"""Fields of the oneof `constraint`, and vLLM's keys of `structured_outputs`."""

_NO_EFFECT = (
    # How whoever makes the text of our ids is to treat special tokens.
    "skip_special_tokens",
    "spaces_between_special_tokens",
    # A constraint holds from the first token in any case: no reasoning parser runs here.
    "grammar_from_first_token",
)
"""Sampling parameters under which the same ids come, whatever they say."""

_READ = ("request_id", "tokenized", "text", "sampling_params", "stream", "data_parallel_rank")


@dataclass(frozen=True, kw_only=True)
class GenerateCall:
    """A request message, understood."""

    request_id: str
    """The caller's; "" is a request that nobody can abort by name."""
    prompt: str | Sequence[int]
    params: SamplingParams
    stream: bool
    """Send tokens as they are made; otherwise only the whole."""


def read_request(message: pb.GenerateRequest, max_context: int) -> GenerateCall:
    """Reads and checks a message; without max_tokens a completion may fill the context.

    Raises:
        NotOfferedError: a field asks for what this server does not do.
        RequestError: a field is wrong.
    """
    for field, _ in message.ListFields():
        if field.name not in _READ:
            raise NotOfferedError(
                f"{field.name} is set and this server does not offer it",
                hint=f"leave {field.name} out",
                field=field.name,
            )
    if message.data_parallel_rank != 0:
        raise RequestError(
            f"data_parallel_rank is {message.data_parallel_rank} and this server has rank 0 only",
            hint="leave data_parallel_rank out",
            field="data_parallel_rank",
        )
    prompt = message.WhichOneof("input")
    if prompt is None:
        raise RequestError(
            "input is missing and every request needs a prompt",
            hint="set tokenized or text",
            field="input",
        )
    return GenerateCall(
        request_id=message.request_id,
        prompt=message.text if prompt == "text" else tuple(message.tokenized.input_ids),
        params=_params(message.sampling_params, max_context),
        stream=message.stream,
    )


def _params(message: pb.SamplingParams, max_context: int) -> SamplingParams:
    values: dict[str, Any] = {"max_tokens": max_context}
    for field, value in message.ListFields():
        if field.name in _CONSTRAINTS:
            given = list(value.choices) if field.name == "choice" else value
            values["structured_outputs"] = {_CONSTRAINTS[field.name]: given}
        elif field.name == "logit_bias":
            values[field.name] = dict(value)
        elif field.name in ("stop", "stop_token_ids"):
            values[field.name] = list(value)
        elif field.name not in _NO_EFFECT:
            values[field.name] = value
    return SamplingParams.parse(values)
