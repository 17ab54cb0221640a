"""What vLLM's engine protocol says of server and model, its health, and who may speak it."""

import asyncio
import hashlib
import io
import json
import zipfile
from functools import partial

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc as pb_grpc
from smg_grpc_proto.generated import common_pb2 as common
from support.scrapes import scraping
from support.secured import asked, bearer, outcome
from support.serving import LIMITS, Served, serving

from dualray.actors.vllm_service import VLLM_SERVICE
from dualray.data.tokenizer import train_bpe
from dualray.inference.plan import Owner
from dualray.inference.serve_config import ServeConfig

OWNER = Owner(0, 0, 0)
CODE = grpc.StatusCode
HEALTH = health_pb2.HealthCheckResponse


@pytest.fixture(scope="module")
def shared():
    with serving() as served, grpc.insecure_channel(served.target) as channel:
        yield served, channel


def request_for(prompt="ab", **sampling) -> pb.GenerateRequest:
    params = pb.SamplingParams(**{"max_tokens": 4, "seed": 1, "ignore_eos": True} | sampling)
    return pb.GenerateRequest(text=prompt, sampling_params=params)


def answered(method, request, metadata=()) -> None:
    """Calls, and reads a stream to its end."""
    response = method(request, metadata=metadata)
    if isinstance(response, grpc.RpcContext):
        list(response)


def test_model_and_server_are_described(shared):
    _, channel = shared
    stub = pb_grpc.VllmEngineStub(channel)
    model = stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (model.model_path, model.served_model_name) == ("tiny", "tiny")
    # Gateways ask the Hugging Face hub first, which has no name with a colon.
    assert ":" in model.tokenizer_path
    assert (model.model_type, list(model.architectures)) == (
        "deepseek_v3",
        ["DeepseekV3ForCausalLM"],
    )
    assert (model.vocab_size, list(model.eos_token_ids)) == (257, [256])
    assert (model.max_context_length, model.max_req_input_len) == (64, 63)
    assert (model.is_generation, model.supports_vision) == (True, False)
    server = stub.GetServerInfo(pb.GetServerInfoRequest())
    assert (server.server_type, server.is_paused) == ("vllm-grpc", False)
    assert (server.data_parallel_size, server.block_size) == (1, LIMITS.block_size)
    assert (server.max_num_seqs, server.model_dtype) == (LIMITS.max_batch, "float32")
    assert server.uptime_seconds > 0


def test_loads_show_what_runs():
    with serving() as served, grpc.insecure_channel(served.target) as channel:
        stub = pb_grpc.VllmEngineStub(channel)
        (idle,) = stub.GetLoads(pb.GetLoadsRequest()).loads
        assert (idle.num_total_reqs, idle.token_usage) == (0, 0)
        assert idle.max_total_num_tokens == LIMITS.num_blocks * LIMITS.block_size
        served.hold()
        call = stub.Generate(request_for("a" * 9))
        served.until(lambda: served.engine.scheduler.num_running == 1)
        response = stub.GetLoads(pb.GetLoadsRequest(dp_rank=0, include=["core"]))
        assert response.dp_rank_count == len(response.loads) == 1
        load = response.loads[0]
        taken = LIMITS.num_blocks - served.engine.scheduler.free_blocks()[OWNER]
        assert taken > 0
        assert (load.num_running_reqs, load.num_waiting_reqs, load.num_total_reqs) == (1, 0, 1)
        assert load.num_used_tokens == taken * LIMITS.block_size
        assert load.token_usage == pytest.approx(taken / LIMITS.num_blocks)
        assert stub.GetServerInfo(pb.GetServerInfoRequest()).active_requests == 1
        served.hold(False)
        list(call)
        code, sentence = outcome(lambda: stub.GetLoads(pb.GetLoadsRequest(dp_rank=1)))
        assert (code, sentence) == (
            CODE.INVALID_ARGUMENT,
            "dp_rank is 1 and this server has rank 0 only; leave dp_rank out.",
        )


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("Embed", pb.EmbedRequest()),
        ("FlushCache", common.FlushCacheRequest()),
        ("StartProfile", common.StartProfileRequest()),
        ("StopProfile", common.StopProfileRequest()),
        ("SubscribeKvEvents", common.SubscribeKvEventsRequest()),
    ],
)
def test_methods_that_are_not_offered_say_so(shared, method, request_):
    _, channel = shared
    call = getattr(pb_grpc.VllmEngineStub(channel), method)
    streams = method == "SubscribeKvEvents"
    code, sentence = outcome(lambda: list(call(request_)) if streams else call(request_))
    assert code is CODE.UNIMPLEMENTED
    assert sentence.startswith(f"this server does not offer {method}; ")


def test_the_tokenizer_comes_as_an_archive_with_its_digest():
    words = [f"{a}{b}{c} " for a in "abcdefgh" for b in "klmnop" for c in "stuvwxyz"]
    tokenizer = train_bpe([" ".join(words)], 600)
    with serving(tokenizer=tokenizer) as served, grpc.insecure_channel(served.target) as channel:
        stub = pb_grpc.VllmEngineStub(channel)
        pieces = list(stub.GetTokenizer(common.GetTokenizerRequest()))
    data = b"".join(piece.data for piece in pieces)
    assert [piece.sha256 for piece in pieces[:-1]] == [""] * (len(pieces) - 1)
    assert pieces[-1].sha256 == hashlib.sha256(data).hexdigest()
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        files = {name: opened.read(name) for name in opened.namelist()}
    assert sorted(files) == [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert hashlib.sha256(files["tokenizer.json"]).hexdigest() == tokenizer.sha256
    assert json.loads(files["config.json"])["vocab_size"] == 600


def test_a_server_without_files_refuses_the_tokenizer_and_serves():
    with serving(files=False) as served, grpc.insecure_channel(served.target) as channel:
        stub = pb_grpc.VllmEngineStub(channel)
        code, sentence = outcome(lambda: list(stub.GetTokenizer(common.GetTokenizerRequest())))
        assert (code, sentence) == (
            CODE.FAILED_PRECONDITION,
            "the server of tiny was started without the files of its tokenizer; give the gateway "
            "the tokenizer itself.",
        )
        assert stub.GetModelInfo(pb.GetModelInfoRequest()).vocab_size == 257
        (response,) = stub.Generate(request_for())
        assert response.complete.completion_tokens == 4


def test_health_follows_the_engine_through_training_serving_and_back():
    served = Served()
    try:
        with grpc.insecure_channel(served.target) as channel:
            stub = pb_grpc.VllmEngineStub(channel)
            watch = health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(service=VLLM_SERVICE), timeout=60
            )
            statuses = (response.status for response in watch)

            def health():
                response = stub.HealthCheck(pb.HealthCheckRequest())
                return response.healthy, response.message

            assert health() == (False, "no weights")
            assert next(statuses) == HEALTH.NOT_SERVING
            assert outcome(lambda: list(stub.Generate(request_for())))[0] is (
                CODE.FAILED_PRECONDITION
            )
            served.serve()
            assert health() == (True, "serving")
            assert next(statuses) == HEALTH.SERVING
            served.hold()
            running = stub.Generate(request_for(), timeout=60)
            served.until(lambda: served.engine.scheduler.num_running == 1)
            drained = served.begin(served.engine.drain())
            assert next(statuses) == HEALTH.NOT_SERVING
            assert health() == (False, "draining")
            assert stub.GetServerInfo(pb.GetServerInfoRequest()).is_paused
            assert outcome(lambda: list(stub.Generate(request_for())))[0] is CODE.UNAVAILABLE
            # What was accepted ends first.
            served.hold(False)
            assert len(list(running)) == 1
            drained.result(60)
            assert health() == (False, "training")
            served.serve()
            assert health() == (True, "serving")
            assert next(statuses) == HEALTH.SERVING
            assert len(list(stub.Generate(request_for()))) == 1
    finally:
        served.close()


def test_reflection_shows_the_service(shared):
    _, channel = shared
    asked_for = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=VLLM_SERVICE),
    ]
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    listed, file = stub.ServerReflectionInfo(iter(asked_for))
    assert VLLM_SERVICE in [service.name for service in listed.list_services_response.service]
    assert b"GenerateStreamChunk" in file.file_descriptor_response.file_descriptor_proto[0]


def test_tokens_guard_it_as_they_do_the_other_protocol(tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_text("a-token\n")
    with asked(ServeConfig(tokens_file=str(tokens))) as (served, channel):
        stub = pb_grpc.VllmEngineStub(channel)
        for method, request in (
            ("Generate", request_for()),
            ("Abort", pb.AbortRequest()),
            ("HealthCheck", pb.HealthCheckRequest()),
            ("GetTokenizer", common.GetTokenizerRequest()),
        ):
            call = partial(answered, getattr(stub, method), request)
            assert outcome(call)[0] is CODE.UNAUTHENTICATED
            assert outcome(partial(call, bearer("another")))[0] is CODE.UNAUTHENTICATED
            assert not served.plans
        for method, request in (
            ("Generate", request_for()),
            ("HealthCheck", pb.HealthCheckRequest()),
            ("GetTokenizer", common.GetTokenizerRequest()),
        ):
            call = partial(answered, getattr(stub, method), request)
            assert outcome(partial(call, bearer("a-token")))[0] is CODE.OK


def test_its_calls_and_requests_are_counted():
    with serving() as served, grpc.insecure_channel(served.target) as channel:
        stub = pb_grpc.VllmEngineStub(channel)
        list(stub.Generate(request_for()))
        outcome(lambda: list(stub.Generate(request_for(top_p=3))))
        with scraping(served) as scrape:
            calls = scrape().calls("handled")
            assert calls["server_stream", "Generate", "OK"] == 1
            assert calls["server_stream", "Generate", "InvalidArgument"] == 1
            assert scrape()("generation_tokens_total") == 4


def test_scored_prompts_come_with_the_first_chunk_and_the_whole(shared):
    _, channel = shared
    stub = pb_grpc.VllmEngineStub(channel)
    request = request_for("abc", prompt_logprobs=2, n=2)
    request.stream = True
    responses = list(stub.Generate(request))
    chunks = [r.chunk for r in responses if r.HasField("chunk")]
    (whole,) = [r.complete for r in responses if r.HasField("complete") and not r.complete.index]
    scored = whole.input_logprobs
    assert [c.HasField("input_logprobs") for c in chunks if c.index == 0] == [True, *[False] * 3]
    assert chunks[0].input_logprobs == scored
    assert list(scored.token_ids) == [97, 98, 99]
    assert [entry.HasField("value") for entry in scored.token_logprobs] == [False, True, True]
    assert [len(top.values) for top in scored.top_logprobs] == [0, 2, 2]
    # What a forced completion of the same tokens is said to have had as probabilities.
    for length in (1, 2):
        forced = request_for("abc"[:length], max_tokens=1, logprobs=0)
        forced.sampling_params.logit_bias[97 + length] = 100
        (response,) = stub.Generate(forced)
        logprobs = response.complete.output_logprobs
        assert list(logprobs.token_ids) == [97 + length]
        # fp32 sums in another order: one token behind a cache against three at once.
        assert logprobs.token_logprobs[0] == pytest.approx(
            scored.token_logprobs[length].value, abs=1e-5
        )


def test_an_abort_counts_while_the_grammar_is_compiled():
    with serving() as served, grpc.insecure_channel(served.target) as channel:
        stub = pb_grpc.VllmEngineStub(channel)
        compile_, compiling = served.engine.grammars.compile, asyncio.Event()

        async def slow(params):
            compiling.set()
            await served.gate.wait()
            return await compile_(params)

        served.engine.grammars.compile = slow
        served.hold()
        request = request_for(regex="[a-c]+")
        request.request_id = "a"
        call = stub.Generate(request, timeout=60)
        served.until(compiling.is_set)
        stub.Abort(pb.AbortRequest(request_ids=["a"]))
        served.hold(False)
        (response,) = call
        assert response.complete.finish_reason == "abort"
        assert served.engine.scheduler.free_blocks() == {OWNER: LIMITS.num_blocks}
