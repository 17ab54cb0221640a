# ruff: noqa: N802 (the methods bear the protocol's names)
"""`vllm.grpc.engine.VllmEngine` over an engine: what gateways made for vLLM speak.

They make the ids and the text themselves, ask for the tokenizer to do so, and take the server
for a vLLM engine: with one of them in front, clients of its HTTP interfaces need no change. They
probe `HealthCheck`, so that training, between two times of serving, looks like a worker that
drains and comes back.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, NoReturn

from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc as pb_grpc
from smg_grpc_proto.generated import common_pb2 as common

import dualray
from dualray.actors.admission import admit
from dualray.actors.completion import Completion
from dualray.actors.engine import Engine, EngineState
from dualray.actors.merged_completions import cancel_all, merged
from dualray.actors.refusals import (
    Context,
    NotOfferedError,
    NoTokenizerError,
    refuse,
    set_trailer,
)
from dualray.actors.request_watch import RequestWatch, Watched
from dualray.actors.vllm_answers import GenerateAnswers
from dualray.actors.vllm_requests import read_request
from dualray.actors.vllm_tokenizer import archive, chunks
from dualray.errors import RequestError

VLLM_SERVICE = "vllm.grpc.engine.VllmEngine"
SERVER_TYPE = "vllm-grpc"
"""What the protocol calls servers of its kind."""
NO_REPOSITORY = "worker:"
"""Before a tokenizer's name. Gateways look for it on the Hugging Face hub before they ask us, and
no name there has a colon: a run called gpt2 must not be given GPT-2's tokenizer."""


@dataclass(kw_only=True)
class _Running:
    """A request that a caller has named."""

    completions: Sequence[Completion] = ()
    aborted: asyncio.Event = field(default_factory=asyncio.Event)

    def abort(self) -> None:
        self.aborted.set()
        for completion in self.completions:
            completion.abort()


class VllmService(pb_grpc.VllmEngineServicer):
    """The protocol's methods over one engine."""

    def __init__(
        self,
        engine: Engine,
        files: Mapping[str, bytes] | None = None,
        watch: RequestWatch | None = None,
    ) -> None:
        """`files` are those of `model_files`; without them GetTokenizer is refused."""
        self._engine = engine
        self._watch = watch or RequestWatch(engine)
        self._config = {} if files is None else json.loads(files["config.json"])
        self._archive = None if files is None else archive(files)
        self._running: dict[str, _Running] = {}
        self._started_s = time.monotonic()
        self._last_request_unix_s = 0.0

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        """Writes the answer's messages. However it ends, the completions' blocks are free.

        No headers go ahead of the first message: until they come a gateway may ask another server.
        """
        set_trailer(context, self._engine)
        self._last_request_unix_s = time.time()
        method = f"/{VLLM_SERVICE}/Generate"
        try:
            with self._watch.request(method, request.request_id, context) as watched:
                await self._generate(request, watched, context)
        except Exception as error:
            await refuse(context, error)

    async def _generate(
        self, request: pb.GenerateRequest, watched: Watched, context: Context
    ) -> None:
        call = read_request(request, self._engine.limits.max_context)
        self._refuse_known(call.request_id)
        running = _Running()
        if call.request_id:
            self._running[call.request_id] = running
        try:
            watched.completions = running.completions = await admit(
                self._engine, call.prompt, call.params, every_token=True, aborted=running.aborted
            )
            if running.aborted.is_set():  # while its grammar was compiled
                running.abort()
            answers = GenerateAnswers(call, running.completions)
            async with aclosing(merged(running.completions)) as deltas:
                async for index, delta in deltas:
                    for message in answers.messages(index, delta):
                        await context.write(message)
        finally:
            self._running.pop(call.request_id, None)
            cancel_all(running.completions)

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        """Ends the streams of these requests with finish `abort`; unknown ones may be over."""
        set_trailer(context, self._engine)
        for request_id in request.request_ids:
            if request_id in self._running:
                self._running[request_id].abort()
        return pb.AbortResponse()

    async def HealthCheck(self, request: Any, context: Context) -> pb.HealthCheckResponse:
        set_trailer(context, self._engine)
        return pb.HealthCheckResponse(healthy=self._serves(), message=str(self._engine.state))

    async def GetModelInfo(self, request: Any, context: Context) -> pb.GetModelInfoResponse:
        set_trailer(context, self._engine)
        engine = self._engine
        return pb.GetModelInfoResponse(
            model_path=engine.model_name,
            tokenizer_path=f"{NO_REPOSITORY}{engine.model_name}",
            served_model_name=engine.model_name,
            is_generation=True,
            max_context_length=engine.limits.max_context,
            max_req_input_len=engine.limits.max_context - 1,
            vocab_size=self._config.get("vocab_size", engine.tokenizer.vocab_size),
            model_type=self._config.get("model_type", ""),
            architectures=self._config.get("architectures", []),
            eos_token_ids=[engine.tokenizer.eos_id],
        )

    async def GetServerInfo(self, request: Any, context: Context) -> pb.GetServerInfoResponse:
        """All workers together are one rank to the caller: the engine spreads requests itself."""
        set_trailer(context, self._engine)
        limits = self._engine.limits
        return pb.GetServerInfoResponse(
            active_requests=self._engine.scheduler.num_running + self._engine.scheduler.num_waiting,
            is_paused=not self._serves(),
            last_receive_timestamp=self._last_request_unix_s,
            uptime_seconds=time.monotonic() - self._started_s,
            server_type=SERVER_TYPE,
            data_parallel_size=1,
            block_size=limits.block_size,
            model_dtype=self._config.get("torch_dtype", ""),
            max_num_seqs=limits.max_batch * self._num_owners(),
        )

    async def GetLoads(self, request: pb.GetLoadsRequest, context: Context) -> pb.GetLoadsResponse:
        set_trailer(context, self._engine)
        if request.dp_rank != 0:
            await refuse(
                context,
                RequestError(
                    f"dp_rank is {request.dp_rank} and this server has rank 0 only",
                    hint="leave dp_rank out",
                    field="dp_rank",
                ),
            )
        scheduler, limits = self._engine.scheduler, self._engine.limits
        usage, counts = scheduler.cache_usage, scheduler.counts
        num_tokens = limits.num_blocks * limits.block_size * self._num_owners()
        load = pb.SchedulerLoad(
            num_running_reqs=scheduler.num_running,
            num_waiting_reqs=scheduler.num_waiting,
            num_total_reqs=scheduler.num_running + scheduler.num_waiting,
            num_used_tokens=round(usage * num_tokens),
            max_total_num_tokens=num_tokens,
            token_usage=usage,
            utilization=usage,
            cache_hit_rate=counts.prefix_hits / max(counts.prefix_queries, 1),
            max_running_requests=limits.max_batch * self._num_owners(),
        )
        return pb.GetLoadsResponse(
            timestamp=datetime.datetime.now(datetime.UTC).isoformat(),
            version=dualray.__version__,
            dp_rank_count=1,
            loads=[load],
        )

    async def GetTokenizer(self, request: Any, context: Context) -> None:
        """Writes the files' archive in chunks; the last one carries its sha256."""
        set_trailer(context, self._engine)
        if self._archive is None:
            await refuse(
                context,
                NoTokenizerError(
                    f"the server of {self._engine.model_name} was started without the files of "
                    "its tokenizer",
                    hint="give the gateway the tokenizer itself",
                ),
            )
        for data, sha256 in chunks(self._archive):
            await context.write(common.GetTokenizerChunk(data=data, sha256=sha256))

    async def Embed(self, request: Any, context: Context) -> NoReturn:
        await self._not_offered(context, "Embed", "the model continues texts only")

    async def FlushCache(self, request: Any, context: Context) -> NoReturn:
        await self._not_offered(context, "FlushCache", "serve with serve.prefix_cache: false")

    async def StartProfile(self, request: Any, context: Context) -> NoReturn:
        await self._not_offered(context, "StartProfile", "read the metrics endpoint instead")

    async def StopProfile(self, request: Any, context: Context) -> NoReturn:
        await self._not_offered(context, "StopProfile", "read the metrics endpoint instead")

    async def SubscribeKvEvents(self, request: Any, context: Context) -> NoReturn:
        await self._not_offered(context, "SubscribeKvEvents", "poll GetLoads instead")

    async def _not_offered(self, context: Context, method: str, hint: str) -> NoReturn:
        set_trailer(context, self._engine)
        error = NotOfferedError(f"this server does not offer {method}", hint=hint, field=method)
        await refuse(context, error)

    def _refuse_known(self, request_id: str) -> None:
        if request_id in self._running:
            raise RequestError(
                f"request_id is {request_id!r} and a request of that name still runs",
                hint="give every request a name of its own",
                field="request_id",
            )

    def _serves(self) -> bool:
        return self._engine.state is EngineState.SERVING

    def _num_owners(self) -> int:
        return len(self._engine.scheduler.free_blocks())
