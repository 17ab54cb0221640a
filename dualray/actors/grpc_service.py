# ruff: noqa: N802 (the methods bear the protocol's names)
"""`inference.GRPCInferenceService` over an engine.

Translates between wire and `Engine` and nothing else. Failures of a unary call are status
codes; those inside a stream are `error_message`s, since other requests share the stream,
unless the caller asked for codes with Triton's `triton_grpc_error` metadata.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import dualray
from dualray.actors.admission import admit
from dualray.actors.completion import Completion
from dualray.actors.engine import Engine, EngineState
from dualray.actors.infer_messages import (
    INPUTS,
    OUTPUTS,
    Answer,
    InferCall,
    output_dim,
    parse_call,
)
from dualray.actors.merged_completions import cancel_all, merged
from dualray.actors.refusals import (
    Context,
    refusal_of,
    refuse,
    sentence_of,
    set_trailer,
    status_of,
)
from dualray.actors.request_watch import RequestWatch
from dualray.errors import RequestError
from dualray.inference.request import ModelNotFoundError
from dualray.proto import inference_pb2 as pb
from dualray.proto import inference_pb2_grpc as pb_grpc

PLATFORM = "dualray"
SERVICE = "inference.GRPCInferenceService"
MAX_STREAM_REQUESTS = 128
"""Requests of one stream that run at once. Further messages are not read: HTTP/2 holds up a client
that sends more than it lets be answered, where each would be kept in full."""

_DATA_TYPES = {
    "BYTES": pb.TYPE_STRING,
    "BOOL": pb.TYPE_BOOL,
    "FP32": pb.TYPE_FP32,
    "UINT32": pb.TYPE_UINT32,
}


class _StreamFailedError(Exception):
    """Carries a refusal out of a stream's task group."""

    def __init__(self, error: RequestError) -> None:
        super().__init__(str(error))
        self.error = error


class InferenceService(pb_grpc.GRPCInferenceServiceServicer):
    """`inference.GRPCInferenceService` over one engine, which is one model."""

    def __init__(self, engine: Engine, watch: RequestWatch | None = None) -> None:
        self._engine = engine
        self._watch = watch or RequestWatch(engine)

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: Context
    ) -> pb.ModelInferResponse:
        set_trailer(context, self._engine)
        try:
            with self._watch.request(f"/{SERVICE}/ModelInfer", request.id, context) as watched:
                self._check_model(request.model_name, request.model_version)
                call = parse_call(request, one_answer=True)
                completions = await self._submit(call)
                watched.completions = completions
                async with aclosing(self._answers(call, completions)) as answers:
                    return await anext(answers)
        except Exception as error:
            await refuse(context, error)

    async def ModelStreamInfer(
        self, request_iterator: AsyncIterator[pb.ModelInferRequest], context: Context
    ) -> None:
        """Starts every message's completion as it comes, up to MAX_STREAM_REQUESTS of them; their
        answers interleave."""
        set_trailer(context, self._engine)
        metadata = dict(context.invocation_metadata() or ())
        as_status = metadata.get("triton_grpc_error") == "true"
        writing, room = asyncio.Lock(), asyncio.Semaphore(MAX_STREAM_REQUESTS)

        async def write(response: pb.ModelStreamInferResponse) -> None:
            async with writing:
                await context.write(response)

        refusal: RequestError | None = None
        try:
            async with asyncio.TaskGroup() as group:
                await room.acquire()
                async for request in request_iterator:
                    task = group.create_task(self._stream(request, context, write, as_status))
                    task.add_done_callback(lambda _: room.release())
                    await room.acquire()  # before the next one is read
        except* _StreamFailedError as failed:
            first = failed.exceptions[0]
            assert isinstance(first, _StreamFailedError)
            refusal = first.error
        if refusal is not None:
            await refuse(context, refusal)

    async def _stream(
        self,
        request: pb.ModelInferRequest,
        context: Context,
        write: Callable[[pb.ModelStreamInferResponse], Awaitable[None]],
        as_status: bool,
    ) -> None:
        method = f"/{SERVICE}/ModelStreamInfer"
        try:
            with self._watch.request(method, request.id, context) as watched:
                self._check_model(request.model_name, request.model_version)
                call = parse_call(request, one_answer=False)
                completions = await self._submit(call)
                watched.completions = completions
                async with aclosing(self._answers(call, completions)) as answers:
                    async for response in answers:
                        await write(pb.ModelStreamInferResponse(infer_response=response))
        except Exception as error:
            refusal = refusal_of(error)
            if as_status:
                raise _StreamFailedError(refusal) from None
            sentence = f"{status_of(refusal).name}: {sentence_of(refusal)}"
            response = pb.ModelStreamInferResponse(error_message=sentence)
            response.infer_response.id = request.id
            response.infer_response.model_name = self._engine.model_name
            response.infer_response.parameters["triton_final_response"].bool_param = True
            await write(response)

    async def _submit(self, call: InferCall) -> list[Completion]:
        return await admit(self._engine, call.prompt, call.params, call.timeout_s)

    async def _answers(
        self, call: InferCall, completions: list[Completion]
    ) -> AsyncGenerator[pb.ModelInferResponse]:
        """Responses of a call: one per delta, or one in all when it does not stream.

        However it ends, the completions' blocks are free afterwards.
        """
        answer = Answer(
            call=call,
            model_name=self._engine.model_name,
            weights=completions[0].weights,
            num_input_tokens=len(completions[0].request.prompt_ids),
            decode=self._engine.tokenizer.decode,
        )
        try:
            if call.stream:
                async with aclosing(merged(completions)) as deltas:
                    async for index, delta in deltas:
                        yield answer.message({index: delta})
            else:
                wholes = [await completion.whole() for completion in completions]
                yield answer.message(dict(enumerate(wholes)))
            if call.empty_final:
                yield answer.final()
        finally:
            cancel_all(completions)

    async def ServerLive(self, request: Any, context: Context) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Context) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._ready())

    async def ModelReady(
        self, request: pb.ModelReadyRequest, context: Context
    ) -> pb.ModelReadyResponse:
        try:
            self._check_model(request.name, request.version)
        except ModelNotFoundError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=self._ready())

    async def ServerMetadata(self, request: Any, context: Context) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(
            name=PLATFORM,
            version=dualray.__version__,
            extensions=["model_repository", "model_configuration", "statistics", "parameters"],
        )

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        await self._need_model(request.name, request.version, context)
        tensor = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=self._engine.model_name,
            versions=[self._version()],
            platform=PLATFORM,
            inputs=[tensor(name=n, datatype=t, shape=[1]) for n, t in INPUTS.items()],
            outputs=[tensor(name=n, datatype=t, shape=[output_dim(n)]) for n, t in OUTPUTS.items()],
        )

    async def ModelConfig(
        self, request: pb.ModelConfigRequest, context: Context
    ) -> pb.ModelConfigResponse:
        await self._need_model(request.name, request.version, context)
        config = pb.ModelConfig(
            name=self._engine.model_name,
            platform=PLATFORM,
            backend=PLATFORM,
            max_batch_size=0,
            model_transaction_policy=pb.ModelTransactionPolicy(decoupled=True),
        )
        for name, datatype in INPUTS.items():
            config.input.add(
                name=name,
                data_type=_DATA_TYPES[datatype],
                dims=[1],
                optional=name != "text_input",
            )
        for name, datatype in OUTPUTS.items():
            config.output.add(name=name, data_type=_DATA_TYPES[datatype], dims=[output_dim(name)])
        return pb.ModelConfigResponse(config=config)

    async def ModelStatistics(
        self, request: pb.ModelStatisticsRequest, context: Context
    ) -> pb.ModelStatisticsResponse:
        if request.name:
            await self._need_model(request.name, request.version, context)
        stats = self._engine.stats
        duration = pb.StatisticDuration
        model = pb.ModelStatistics(
            name=self._engine.model_name,
            version=self._version(),
            last_inference=stats.last_finished_ms,
            inference_count=stats.num_succeeded,
            execution_count=stats.num_steps,
            inference_stats=pb.InferStatistics(
                success=duration(count=stats.num_succeeded, ns=stats.succeeded_ns),
                fail=duration(count=stats.num_failed, ns=stats.failed_ns),
                queue=duration(count=stats.num_started, ns=stats.queued_ns),
            ),
        )
        return pb.ModelStatisticsResponse(model_stats=[model])

    async def RepositoryIndex(
        self, request: pb.RepositoryIndexRequest, context: Context
    ) -> pb.RepositoryIndexResponse:
        ready = self._ready()
        if request.ready and not ready:
            return pb.RepositoryIndexResponse()
        model = pb.RepositoryIndexResponse.ModelIndex(
            name=self._engine.model_name,
            version=self._version(),
            state="READY" if ready else "UNAVAILABLE",
            reason="" if ready else str(self._engine.state),
        )
        return pb.RepositoryIndexResponse(models=[model])

    def _ready(self) -> bool:
        return self._engine.state is EngineState.SERVING

    def _version(self) -> str:
        return str(self._engine.weights.training_step)

    def _check_model(self, name: str, version: str) -> None:
        if name != self._engine.model_name:
            raise ModelNotFoundError(
                f"model_name is {name!r} and this server has {self._engine.model_name!r}",
                hint=f"ask for {self._engine.model_name!r}",
                field="model_name",
            )
        if version not in ("", self._version()):
            raise ModelNotFoundError(
                f"model_version is {version!r} and this server has {self._version()!r}, the "
                "training step",
                hint="leave the version out",
                field="model_version",
            )

    async def _need_model(self, name: str, version: str, context: Context) -> None:
        try:
            self._check_model(name, version)
        except ModelNotFoundError as error:
            await refuse(context, error)
