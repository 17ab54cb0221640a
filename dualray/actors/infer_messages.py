"""Between the inference protocol's messages and our words.

A request's fields come as tensors of one element, as raw bytes or as typed contents; what it
may set besides is JSON in `sampling_parameters`, or the message's own parameters, where
clients that know no floats write numbers as strings.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dualray.actors.completion import Delta, Weights
from dualray.errors import RequestError
from dualray.inference.plan import Sampled
from dualray.inference.request import SamplingParams
from dualray.proto import inference_pb2 as pb

INPUTS: Mapping[str, str] = {
    "text_input": "BYTES",
    "stream": "BOOL",
    "sampling_parameters": "BYTES",
    "exclude_input_in_output": "BOOL",
    "return_finish_reason": "BOOL",
    "return_cumulative_logprob": "BOOL",
    "return_logprobs": "BOOL",
    "return_num_input_tokens": "BOOL",
    "return_num_output_tokens": "BOOL",
}
"""Input tensors of one element and their wire types; all but text_input are optional."""

OUTPUTS: Mapping[str, str] = {
    "text_output": "BYTES",
    "finish_reason": "BYTES",
    "cumulative_logprob": "FP32",
    "logprobs": "BYTES",
    "prompt_logprobs": "BYTES",
    "num_input_tokens": "UINT32",
    "num_output_tokens": "UINT32",
}
"""Output tensors and their wire types; a request gets text_output and those it asks for.

One element for each of the request's n completions, but for num_input_tokens and
prompt_logprobs. The sampling parameter of that name asks for the latter, and only the message
with the first text has it.
"""

FINAL = "triton_final_response"
EMPTY_FINAL = "triton_enable_empty_final_response"
TIMEOUT = "timeout"
_NOTHING = Delta(text="", tokens=())


def output_dim(name: str) -> int:
    """Elements of an output, -1 for as many as the request's n."""
    return 1 if name in ("num_input_tokens", "prompt_logprobs") else -1


@dataclass(frozen=True, kw_only=True)
class InferCall:
    """A request message, understood."""

    message_id: str
    prompt: str
    params: SamplingParams
    stream: bool
    """Answer piece by piece."""
    prepend_prompt: bool
    outputs: tuple[str, ...]
    timeout_s: float | None
    empty_final: bool
    """End with a message that has no outputs, instead of marking the last one that has."""
    raw: bool
    """The request used raw contents; the answer does too."""


def parse_call(message: pb.ModelInferRequest, *, one_answer: bool) -> InferCall:
    """Reads and checks a request message; `one_answer` refuses streaming.

    Raises:
        RequestError: naming the field.
    """
    tensors = _tensors(message)
    if "text_input" not in tensors:
        raise _wrong("text_input", "missing", "every request needs one")
    stream = tensors.get("stream", False)
    if stream and one_answer:
        raise _wrong("stream", "true", "ModelInfer gives one answer; use ModelStreamInfer")
    exclude = tensors.get("exclude_input_in_output", stream)
    if stream and not exclude:
        raise _wrong(
            "exclude_input_in_output", "false", "a streamed answer never repeats the prompt"
        )
    parameters = {name: _parameter(value) for name, value in message.parameters.items()}
    empty_final = _flag(EMPTY_FINAL, parameters.pop(EMPTY_FINAL, False))
    timeout_s = _timeout(parameters.pop(TIMEOUT, None))
    for name in parameters:
        if name.startswith(("sequence_", "priority")):
            raise _wrong(f"parameters.{name}", parameters[name], "this server does not offer it")
    given = _json_object(tensors.get("sampling_parameters", ""))
    params = SamplingParams.parse({**parameters, **given})
    return InferCall(
        message_id=message.id,
        prompt=tensors["text_input"],
        params=params,
        stream=stream,
        prepend_prompt=not exclude,
        outputs=_wanted(message, tensors, params),
        timeout_s=timeout_s,
        empty_final=empty_final,
        raw=bool(message.raw_input_contents) or not message.inputs,
    )


@dataclass(kw_only=True)
class Answer:
    """Builds the response messages of one call."""

    call: InferCall
    model_name: str
    weights: Weights
    num_input_tokens: int
    decode: Callable[[list[int]], str]
    _texts: dict[int, str] = field(init=False, default_factory=dict)
    """Of token ids met before: a prompt's alternatives are many and often the same."""
    _cumulative_logprobs: list[float] = field(init=False)
    _num_left: int = field(init=False)

    def __post_init__(self) -> None:
        self._num_left = self.call.params.n
        self._cumulative_logprobs = [0.0] * self._num_left

    def message(self, deltas: Mapping[int, Delta]) -> pb.ModelInferResponse:
        """What some of the n completions have gained, the others' elements being empty.

        The last one carries the final mark and the weights' stamp.
        """
        n = self.call.params.n
        prompt = self.call.prompt if self.call.prepend_prompt else ""
        every = [deltas.get(index, _NOTHING) for index in range(n)]
        for index, delta in deltas.items():
            self._cumulative_logprobs[index] += sum(token.logprob for token in delta.tokens)
            self._num_left -= delta.finish is not None
        values: dict[str, list[Any]] = {
            "text_output": [prompt + delta.text for delta in every],
            "finish_reason": [str(delta.finish) if delta.finish else "" for delta in every],
            "cumulative_logprob": self._cumulative_logprobs,
            "num_input_tokens": [self.num_input_tokens],
            "num_output_tokens": [len(delta.tokens) for delta in every],
        }
        if "logprobs" in self.call.outputs:
            values["logprobs"] = [json.dumps(list(map(self._logprobs, d.tokens))) for d in every]
        for delta in deltas.values():
            if delta.prompt is not None:
                scored = [None, *map(self._logprobs, delta.prompt)]
                values["prompt_logprobs"] = [json.dumps(scored)]
        response = self._empty()
        for name in self.call.outputs:
            if name in values:
                _put(response, name, values[name], raw=self.call.raw)
        last = self._num_left == 0
        response.parameters[FINAL].bool_param = last and not self.call.empty_final
        if last:
            self._stamp(response)
        for index, delta in deltas.items():
            if delta.matched_stop is not None:
                name = "matched_stop" if n == 1 else f"matched_stop_{index}"
                response.parameters[name].string_param = delta.matched_stop
        return response

    def final(self) -> pb.ModelInferResponse:
        """The message without outputs that ends a stream for callers who asked for it."""
        response = self._empty()
        response.parameters[FINAL].bool_param = True
        self._stamp(response)
        return response

    def _empty(self) -> pb.ModelInferResponse:
        return pb.ModelInferResponse(
            model_name=self.model_name,
            model_version=str(self.weights.training_step),
            id=self.call.message_id,
        )

    def _stamp(self, response: pb.ModelInferResponse) -> None:
        response.parameters["training_step"].int64_param = self.weights.training_step
        response.parameters["weight_digest"].string_param = self.weights.digest

    def _logprobs(self, token: Sampled) -> dict[str, Any]:
        """vLLM's shape: by token id the log-probability, rank and text of each candidate."""
        ranked = [(i, value, rank) for rank, (i, value) in enumerate(token.top, start=1)]
        ranked.append((token.token_id, token.logprob, token.rank))
        return {
            str(i): {"logprob": value, "rank": rank, "decoded_token": self._text(i)}
            for i, value, rank in ranked
        }

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self.decode([token])
        return self._texts[token]


def _tensors(message: pb.ModelInferRequest) -> dict[str, Any]:
    """Input name to str or bool."""
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise _wrong(
            "raw_input_contents", f"{len(raw)} tensors", f"inputs has {len(message.inputs)}"
        )
    values: dict[str, Any] = {}
    for index, tensor in enumerate(message.inputs):
        datatype = INPUTS.get(tensor.name)
        if datatype is None:
            raise _wrong(f"inputs.{tensor.name}", "unknown", f"known are {', '.join(INPUTS)}")
        if tensor.name in values:
            raise _wrong(tensor.name, "given twice", "one is enough")
        if tensor.datatype != datatype:
            raise _wrong(tensor.name, tensor.datatype or "untyped", f"its type is {datatype}")
        if math.prod(tensor.shape) != 1:
            raise _wrong(tensor.name, f"of shape {list(tensor.shape)}", "its shape is [1]")
        values[tensor.name] = (
            _from_raw(tensor.name, datatype, raw[index])
            if raw
            else _from_contents(tensor, datatype)
        )
    return values


def _from_raw(name: str, datatype: str, raw: bytes) -> str | bool:
    if datatype == "BOOL":
        if len(raw) != 1:
            raise _wrong(name, f"{len(raw)} bytes long", "a BOOL has one byte")
        return raw != b"\0"
    size = int.from_bytes(raw[:4], "little")
    if len(raw) < 4 or len(raw) != 4 + size:
        raise _wrong(name, f"{len(raw)} bytes long", "a string is its length in 4 bytes, then it")
    return _utf8(name, raw[4:])


def _from_contents(tensor: pb.ModelInferRequest.InferInputTensor, datatype: str) -> str | bool:
    contents = tensor.contents
    found = contents.bool_contents if datatype == "BOOL" else contents.bytes_contents
    if len(found) != 1:
        raise _wrong(tensor.name, f"{len(found)} values", "it needs exactly one")
    value = found[0]
    return _utf8(tensor.name, value) if isinstance(value, bytes) else bool(value)


def _utf8(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise _wrong(name, f"no UTF-8 at byte {error.start}", "text must be UTF-8") from None


def _json_object(text: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise _wrong(
            "sampling_parameters", f"no JSON ({error.msg} at {error.pos})", "send a JSON object"
        ) from None
    except (ValueError, RecursionError):  # a number of thousands of digits, or deep nesting
        raise _wrong(
            "sampling_parameters", "no JSON that can be read", "send a plain JSON object"
        ) from None
    if not isinstance(value, dict):
        raise _wrong("sampling_parameters", type(value).__name__, "it must be a JSON object")
    return value


def _parameter(value: pb.InferParameter) -> Any:
    kind = value.WhichOneof("parameter_choice")
    return None if kind is None else getattr(value, kind)


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise _wrong(f"parameters.{name}", value, "it must be true or false")
    return value


def _timeout(value: Any) -> float | None:
    """The protocol's `timeout` parameter, microseconds, as seconds."""
    if value is None:
        return None
    try:
        microseconds = int(value)
    except (TypeError, ValueError):
        microseconds = 0
    if microseconds < 1:
        raise _wrong(f"parameters.{TIMEOUT}", value, "it is a positive number of microseconds")
    return microseconds / 1e6


def _wanted(
    message: pb.ModelInferRequest, tensors: dict[str, Any], params: SamplingParams
) -> tuple[str, ...]:
    """Outputs asked for by a return_* input, by name or by parameter, in the order of `OUTPUTS`."""
    wanted = {"text_output"}
    for output in message.outputs:
        if output.name not in OUTPUTS:
            raise _wrong(f"outputs.{output.name}", "unknown", f"known are {', '.join(OUTPUTS)}")
        wanted.add(output.name)
    wanted |= {name for name in OUTPUTS if tensors.get(f"return_{name}")}
    if params.prompt_logprobs is not None:
        wanted.add("prompt_logprobs")
    elif "prompt_logprobs" in wanted:
        raise _wrong("outputs.prompt_logprobs", "asked for", "the sampling parameter is not set")
    if "logprobs" in wanted:
        wanted.add("cumulative_logprob")
    return tuple(name for name in OUTPUTS if name in wanted)


def _put(response: pb.ModelInferResponse, name: str, values: list[Any], *, raw: bool) -> None:
    datatype = OUTPUTS[name]
    tensor = response.outputs.add(name=name, datatype=datatype, shape=[len(values)])
    if datatype == "BYTES":
        data = [value.encode() for value in values]
        packed = b"".join(struct.pack("<I", len(item)) + item for item in data)
        contents = pb.InferTensorContents(bytes_contents=data)
    elif datatype == "UINT32":
        packed = struct.pack(f"<{len(values)}I", *values)
        contents = pb.InferTensorContents(uint_contents=values)
    else:
        packed = struct.pack(f"<{len(values)}f", *values)
        contents = pb.InferTensorContents(fp32_contents=values)
    if raw:
        response.raw_output_contents.append(packed)
    else:
        tensor.contents.CopyFrom(contents)


def _wrong(name: str, value: object, rule: str) -> RequestError:
    return RequestError(f"{name} is {value} and {rule}", hint=f"correct {name}", field=name)
