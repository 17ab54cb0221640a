"""A client of a served run: `dualray generate` and the demo speak through it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc

from dualray.errors import RequestError, RunError
from dualray.platform.access import Access, unreachable
from dualray.proto import inference_pb2 as pb
from dualray.proto import inference_pb2_grpc as pb_grpc

CONNECT_TIMEOUT_S = 10.0
"""How long the first look at a server may take."""
_FIRST_TOKEN_LIMIT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A finished completion. Times in seconds, seen from the client."""

    text: str
    finish_reason: str
    num_input_tokens: int
    num_output_tokens: int
    first_token_s: float
    """From sending the request to the first text."""
    total_s: float
    tokens_per_s: float
    """Tokens after the first text, per second after it; over all of it if it came in one piece."""
    model: str
    training_step: int
    weight_digest: str


class Generation:
    """Iterate for the text as it comes; `summary` is there afterwards."""

    def __init__(self, call: Any, target: str) -> None:
        self._call = call
        self._target = target
        self.summary: Summary | None = None

    def __iter__(self) -> Iterator[str]:
        """Yields pieces of text, none empty.

        Raises:
            RequestError: the server refused the request.
            RunError: the server cannot be reached or has failed.
        """
        started = time.perf_counter()
        first_s: float | None = None
        counts: list[int] = []
        pieces: list[str] = []
        try:
            for message in self._call:
                if message.error_message:
                    raise _refused(message.error_message)
                values = _outputs(message.infer_response)
                counts.append(values["num_output_tokens"])
                first_s = first_s or time.perf_counter() - started
                if values["text_output"]:
                    pieces.append(values["text_output"])
                    yield values["text_output"]
                if message.infer_response.parameters["triton_final_response"].bool_param:
                    total_s = time.perf_counter() - started
                    self.summary = _summary(
                        message.infer_response, "".join(pieces), counts, first_s, total_s
                    )
                    return
        except grpc.RpcError as error:
            raise explain(error, self._target) from error
        finally:
            self._call.cancel()
        raise RunError(
            f"{self._target} ended the stream before the completion was complete",
            hint="see the run's log and try again",
        )


class Client:
    """Speaks to one server, as `access` says. Use as a context manager."""

    def __init__(self, target: str, access: Access | None = None) -> None:
        access = access or Access()
        self.target = target
        self._channel = access.channel(target)
        self._metadata = access.metadata
        self._stub = pb_grpc.GRPCInferenceServiceStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._channel.close()

    def model_name(self) -> str:
        """The model that this server has. Raises RunError if nobody answers."""
        try:
            index = self._stub.RepositoryIndex(
                pb.RepositoryIndexRequest(), timeout=CONNECT_TIMEOUT_S, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise explain(error, self.target) from error
        if not index.models:
            raise RunError(f"{self.target} serves no model", hint="ask for another --target")
        return index.models[0].name

    def generate(
        self,
        prompt: str,
        sampling: Mapping[str, Any],
        *,
        model: str | None = None,
        timeout_s: float | None = None,
    ) -> Generation:
        """Starts a streamed completion; `sampling` are vLLM's sampling parameters, n being 1."""
        assert sampling.get("n", 1) == 1, "a Generation is one completion"
        request = pb.ModelInferRequest(model_name=model or self.model_name())
        _add(request, "text_input", prompt)
        _add(request, "sampling_parameters", json.dumps(dict(sampling)))
        for flag in (
            "stream",
            "return_finish_reason",
            "return_num_input_tokens",
            "return_num_output_tokens",
        ):
            _add(request, flag, True)
        call = self._stub.ModelStreamInfer(
            iter([request]), timeout=timeout_s, metadata=self._metadata
        )
        return Generation(call, self.target)


def first_token_at(target: str, run_name: str, token: str | None = None) -> float:
    """Ask for one token as any client would; when it came, in seconds of the epoch."""
    with Client(target, Access(token=token)) as client:
        sampling = {"max_tokens": 1, "ignore_eos": True, "temperature": 0}
        for _ in client.generate("\n", sampling, model=run_name, timeout_s=_FIRST_TOKEN_LIMIT_S):
            pass
    return time.time()


def explain(error: grpc.RpcError, target: str) -> RequestError | RunError:
    """A sentence for a failed call."""
    assert isinstance(error, grpc.Call)
    code, details = error.code(), error.details() or ""
    trailer = {key for key, _ in error.trailing_metadata() or ()}
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return RunError(
            f"{target} did not finish in time", hint="allow more with --timeout or ask for less"
        )
    if "dualray-model" in trailer and details:
        return _refused(f"{code.name}: {details}")
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return RunError(
            f"{target} refused the call, {details.partition('; ')[0]}",
            hint="give a token that is valid now with --token-file",
        )
    if code is grpc.StatusCode.UNAVAILABLE:
        return unreachable(details, target)
    return RunError(
        f"{target} answered {code.name}: {details or 'no reason given'}",
        hint="check that --target is a dualray server",
    )


def _refused(message: str) -> RequestError | RunError:
    """The server's own sentence and hint, without its status code."""
    code, _, text = message.partition(": ")
    sentence, _, hint = text.rstrip(".").rpartition("; ")
    kind = RequestError if code in ("INVALID_ARGUMENT", "NOT_FOUND") else RunError
    return kind(sentence or text, hint=hint if sentence else "see the server's log")


def _add(request: pb.ModelInferRequest, name: str, value: str | bool) -> None:
    if isinstance(value, bool):
        contents = pb.InferTensorContents(bool_contents=[value])
    else:
        contents = pb.InferTensorContents(bytes_contents=[value.encode()])
    datatype = "BOOL" if isinstance(value, bool) else "BYTES"
    request.inputs.add(name=name, datatype=datatype, shape=[1], contents=contents)


def _outputs(response: pb.ModelInferResponse) -> dict[str, Any]:
    """Output name to value; we sent typed contents, so typed contents come back."""
    values: dict[str, Any] = {}
    for tensor in response.outputs:
        if tensor.datatype == "BYTES":
            values[tensor.name] = tensor.contents.bytes_contents[0].decode()
        else:
            values[tensor.name] = tensor.contents.uint_contents[0]
    return values


def _summary(
    last: pb.ModelInferResponse, text: str, counts: list[int], first_s: float, total_s: float
) -> Summary:
    values = _outputs(last)
    later = sum(counts[1:])
    rate = later / (total_s - first_s) if later else sum(counts) / total_s
    return Summary(
        text=text,
        finish_reason=values["finish_reason"],
        num_input_tokens=values["num_input_tokens"],
        num_output_tokens=sum(counts),
        first_token_s=first_s,
        total_s=total_s,
        tokens_per_s=rate,
        model=last.model_name,
        training_step=last.parameters["training_step"].int64_param,
        weight_digest=last.parameters["weight_digest"].string_param,
    )
