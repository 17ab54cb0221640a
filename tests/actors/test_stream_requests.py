"""A stream of many requests whose client does not read: the server takes no more than it may."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import grpc
from support.questions import question
from support.serving import LIMITS, WEIGHTS

from dualray.actors.grpc_service import MAX_STREAM_REQUESTS, InferenceService
from dualray.proto import inference_pb2 as pb
from dualray.proto import inference_pb2_grpc as pb_grpc

NUM_MESSAGES = MAX_STREAM_REQUESTS + 40


def test_further_requests_of_a_stream_begin_when_others_have_ended(served):
    served.call(served.engine.drain())
    served.call(served.engine.serve(WEIGHTS, limits=replace(LIMITS, max_waiting=1000)))
    scheduler = served.engine.scheduler
    served.hold()
    with grpc.insecure_channel(served.target) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        messages = [question(b"ab", str(i), max_tokens=1) for i in range(NUM_MESSAGES)]
        answers = stub.ModelStreamInfer(iter(messages))
        served.until(lambda: scheduler.num_running + scheduler.num_waiting == MAX_STREAM_REQUESTS)
        for _ in range(20):  # more than the connection's further messages take to arrive
            assert stub.ServerLive(pb.ServerLiveRequest()).live
        assert scheduler.num_running + scheduler.num_waiting == MAX_STREAM_REQUESTS
        served.hold(False)
        ids = [answer.infer_response.id for answer in answers]
    assert sorted(ids, key=int) == [str(i) for i in range(NUM_MESSAGES)]


def test_refused_requests_that_nobody_reads_count_too(served):
    """Each is held until its refusal is written."""
    num_read, reads = 0, asyncio.Semaphore(0)

    async def messages():
        nonlocal num_read
        for _ in range(NUM_MESSAGES):
            num_read += 1
            yield pb.ModelInferRequest(model_name="nobody")

    class NobodyReads:
        """What gRPC gives a method, at the end of a connection whose windows are full."""

        def invocation_metadata(self):
            return ()

        def set_trailing_metadata(self, metadata):
            pass

        async def write(self, response):
            assert response.error_message.startswith("NOT_FOUND: ")
            await reads.acquire()

    async def settle():
        for _ in range(10 * NUM_MESSAGES):  # all that can happen has happened: nothing waits for
            await asyncio.sleep(0)  # anything outside of this loop

    async def stream():
        service = InferenceService(SimpleNamespace(**engine))
        running = asyncio.create_task(service.ModelStreamInfer(messages(), NobodyReads()))
        await settle()
        assert num_read == MAX_STREAM_REQUESTS
        reads.release()
        await settle()
        assert num_read == MAX_STREAM_REQUESTS + 1
        for _ in range(NUM_MESSAGES):
            reads.release()
        await running
        assert num_read == NUM_MESSAGES

    names = ("model_name", "weights", "state", "states")
    engine = {name: getattr(served.engine, name) for name in names}
    asyncio.run(stream())
