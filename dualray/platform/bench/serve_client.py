"""The serving benchmark's client: a process of its own that speaks gRPC as any client would.

It is run by `run_ranks`, so that what it costs is paid outside of the server's processes.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import grpc

from dualray.platform.bench.hosts import LOOPBACK
from dualray.platform.bench.ranks import Member, run_ranks
from dualray.platform.bench.serve_requests import BenchRequest
from dualray.proto import inference_pb2 as pb
from dualray.proto import inference_pb2_grpc as pb_grpc

MODEL = "bench"
_OPTIONS = (("grpc.use_local_subchannel_pool", 1),)
_STREAMS_PER_CHANNEL = 50
"""HTTP/2 connections share nothing; a server or a proxy may allow 100 streams in each."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came for one request. Seconds since its client began."""

    name: str
    text: str
    num_tokens: int
    sent_s: float
    first_s: float
    """When the first text or token was here."""
    last_s: float
    ids: tuple[int, ...] = ()
    """The tokens, where they are known: only text travels over gRPC."""
    error: str = ""

    @property
    def first_token_s(self) -> float:
        """From asking to the first token."""
        return self.first_s - self.sent_s


@dataclass(frozen=True, kw_only=True)
class Load:
    """Streams to hold open; each sends its requests one after the other, over and over."""

    target: str
    streams: tuple[tuple[BenchRequest, ...], ...]
    hold_s: float
    """A stream sends no more requests after so long; 0 sends each once, when it arrives."""


def send_from_elsewhere(load: Load, *, timeout_s: float = 600.0) -> list[list[Answer]]:
    """The answers of every stream, in the order of its requests, from another process."""
    (answers,) = run_ranks(_client, load, [LOOPBACK], timeout_s=timeout_s)
    return answers


def _client(member: Member, load: Load) -> list[list[Answer]]:
    return asyncio.run(send(load))


async def send(load: Load) -> list[list[Answer]]:
    """The answers of every stream, in the order of its requests."""
    count = -(-len(load.streams) // _STREAMS_PER_CHANNEL)
    channels = [grpc.aio.insecure_channel(load.target, options=_OPTIONS) for _ in range(count)]
    try:
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        stubs = [pb_grpc.GRPCInferenceServiceStub(channel) for channel in channels]
        started = time.perf_counter()
        streams = [
            _Stream(stubs[index % count], requests, load.hold_s, started)
            for index, requests in enumerate(load.streams)
        ]
        return await asyncio.gather(*(stream.run() for stream in streams))
    finally:
        await asyncio.gather(*(channel.close() for channel in channels))


class _Stream:
    """One bidirectional stream; the next request goes out when the last is answered."""

    def __init__(
        self,
        stub: pb_grpc.GRPCInferenceServiceStub,
        requests: Sequence[BenchRequest],
        hold_s: float,
        started: float,
    ) -> None:
        self._stub, self._requests = stub, requests
        self._hold_s, self._started = hold_s, started
        self._answers: list[Answer] = []
        self._answered = asyncio.Event()
        self._sent_s = 0.0

    def _now(self) -> float:
        return time.perf_counter() - self._started

    async def run(self) -> list[Answer]:
        first_s: float | None = None
        pieces: list[str] = []
        tokens = 0
        number = 0
        async for message in self._stub.ModelStreamInfer(self._outgoing()):
            response = message.infer_response
            outputs = {tensor.name: tensor.contents for tensor in response.outputs}
            if outputs:
                first_s = first_s if first_s is not None else self._now()
                pieces.append(outputs["text_output"].bytes_contents[0].decode())
                tokens += outputs["num_output_tokens"].uint_contents[0]
            if response.parameters["triton_final_response"].bool_param or message.error_message:
                name = self._request(number).name
                same = "" if response.id == name else f"answer of {response.id!r} for {name!r}"
                now = self._now()
                self._answers.append(
                    Answer(
                        name=name,
                        text="".join(pieces),
                        num_tokens=tokens,
                        sent_s=self._sent_s,
                        first_s=now if first_s is None else first_s,
                        last_s=now,
                        error=message.error_message or same,
                    )
                )
                first_s, tokens = None, 0
                pieces.clear()
                number += 1
                self._answered.set()
        return self._answers

    async def _outgoing(self) -> AsyncIterator[pb.ModelInferRequest]:
        number = 0
        while True:
            over = self._now() >= self._hold_s if self._hold_s else number == len(self._requests)
            if over:
                return
            request = self._request(number)
            if not self._hold_s:
                await asyncio.sleep(max(0.0, request.arrives_s - self._now()))
            self._answered.clear()
            self._sent_s = self._now()
            yield message_of(request)
            await self._answered.wait()
            number += 1

    def _request(self, number: int) -> BenchRequest:
        return self._requests[number % len(self._requests)]


def message_of(request: BenchRequest) -> pb.ModelInferRequest:
    """The request as it travels."""
    message = pb.ModelInferRequest(model_name=MODEL, id=request.name)
    texts = {"text_input": request.prompt, "sampling_parameters": json.dumps(request.sampling)}
    for name, text in texts.items():
        contents = pb.InferTensorContents(bytes_contents=[text.encode()])
        message.inputs.add(name=name, datatype="BYTES", shape=[1], contents=contents)
    for name in ("stream", "return_num_output_tokens"):
        contents = pb.InferTensorContents(bool_contents=[True])
        message.inputs.add(name=name, datatype="BOOL", shape=[1], contents=contents)
    return message
