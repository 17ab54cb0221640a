"""Structured output through the engine and over the wire."""

import asyncio
import json
import re
from dataclasses import replace

import grpc
import pytest
from support.chains import chained_rules, chained_schemas, optional_words
from support.holding import held
from support.serving import LIMITS, serving

from dualray.actors import grammar_compiler
from dualray.actors.engine_state import EngineState
from dualray.actors.grammar_compiler import MAX_WAITING, GrammarCompiler
from dualray.actors.refusals import status_of
from dualray.data.tokenizer import ByteTokenizer
from dualray.errors import RequestError
from dualray.inference.plan import Owner
from dualray.inference.request import QueueFullError, SamplingParams
from dualray.proto import inference_pb2 as pb
from dualray.proto import inference_pb2_grpc as pb_grpc


def call(wanted, stream=False, **sampling) -> pb.ModelInferRequest:
    values = {"max_tokens": 50, "structured_outputs": wanted} | sampling
    request = pb.ModelInferRequest(model_name="tiny")
    for name, value in {"text_input": "Say: ", "sampling_parameters": json.dumps(values)}.items():
        tensor = request.inputs.add(name=name, datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(value.encode())
    flags = {"stream": stream, "exclude_input_in_output": True, "return_finish_reason": True}
    for name, value in flags.items():
        tensor = request.inputs.add(name=name, datatype="BOOL", shape=[1])
        tensor.contents.bool_contents.append(value)
    return request


def texts(response: pb.ModelInferResponse, name="text_output") -> list[str]:
    (tensor,) = [t for t in response.outputs if t.name == name]
    return [item.decode() for item in tensor.contents.bytes_contents]


@pytest.fixture(scope="module")
def served():
    with serving() as served:
        yield served
        served.until(lambda: served.engine.scheduler.num_running == 0)
        assert served.engine.scheduler.free_blocks() == {Owner(0, 0, 0): LIMITS.num_blocks}


@pytest.fixture(scope="module")
def stub(served):
    with grpc.insecure_channel(served.target) as channel:
        yield pb_grpc.GRPCInferenceServiceStub(channel)


def test_an_answer_is_what_was_asked_for(stub):
    response = stub.ModelInfer(call({"regex": "[a-f]{4}-\u20ac[0-9]{2}"}, seed=1))
    assert re.fullmatch("[a-f]{4}-\u20ac[0-9]{2}", texts(response)[0])
    assert texts(response, "finish_reason") == ["stop"]


def test_n_completions_have_grammars_of_their_own(stub):
    several = texts(stub.ModelInfer(call({"regex": "[a-z]{6}"}, n=4, seed=5)))
    assert len(set(several)) == 4
    assert all(re.fullmatch("[a-z]{6}", text) for text in several)
    singles = [texts(stub.ModelInfer(call({"regex": "[a-z]{6}"}, seed=5 + i)))[0] for i in range(4)]
    assert several == singles


def test_a_stream_never_shows_what_could_not_become_valid(stub):
    schema = {"type": "array", "items": {"enum": ["\u20ac", "\U0001f600"]}, "maxItems": 3}
    wanted = {"json": schema, "disable_any_whitespace": True}
    shown = ""
    valid = {json.dumps(v, ensure_ascii=False, separators=(",", ":")) for v in all_of(3)}
    for message in stub.ModelStreamInfer(iter([call(wanted, stream=True, seed=2)])):
        assert not message.error_message
        shown += texts(message.infer_response)[0]
        assert any(text.startswith(shown) for text in valid)
    assert shown in valid


def all_of(most: int) -> list[list[str]]:
    found: list[list[str]] = [[]]
    for _ in range(most):
        found += [[*values, item] for values in found for item in ("\u20ac", "\U0001f600")]
    return found


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ({"regex": "(a"}, "structured_outputs.regex cannot be used: "),
        ({"json": {"type": "nope"}}, "structured_outputs.json cannot be used: Invalid type: nope"),
        ({"regex": "(a{1000}){1000}"}, "structured_outputs.regex cannot be used: "),
        ({"regex": "a", "json": {}}, "structured_outputs has json and regex and must have"),
    ],
)
def test_what_cannot_be_used_is_an_invalid_argument(served, stub, wanted, sentence):
    num_plans = len(served.plans)
    with pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(call(wanted))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert sentence in raised.value.details()
    assert len(served.plans) == num_plans  # nothing was queued


def test_a_grammar_that_costs_too_much_on_its_way_ends_its_own_request(served, stub):
    properties = {f"p{i}": {"type": "string"} for i in range(2000)}
    inner = {"type": "object", "properties": properties}
    schema = {"type": "array", "prefixItems": [{"type": "boolean"}, inner], "minItems": 2}
    free = stub.ModelInfer.future(call({"regex": "[a-z]{30}"}))
    with pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(call({"json": schema, "disable_any_whitespace": True}))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "the completion cannot go on in its grammar: " in raised.value.details()
    assert re.fullmatch("[a-z]{30}", texts(free.result())[0])


def test_steps_go_on_while_a_grammar_is_compiled(served, stub, monkeypatch):
    with held(served.engine.grammars._grammars, "compile", monkeypatch) as begun:
        answer = stub.ModelInfer.future(call({"choice": ["yes"]}))
        assert begun.wait(60)
        request = call(None)
        assert texts(stub.ModelInfer(request), "finish_reason")[0] in ("stop", "length")
        assert not answer.done()
    assert texts(answer.result()) == ["yes"]


@pytest.mark.parametrize(
    "wanted", [chained_rules(4000), chained_schemas(900), optional_words(2000)]
)
def test_what_would_kill_the_engine_is_an_invalid_argument(served, stub, wanted):
    with pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(call(wanted))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert texts(stub.ModelInfer(call({"choice": ["yes"]}))) == ["yes"]


def test_nothing_is_compiled_for_who_is_refused_anyway(monkeypatch):
    with serving() as served, grpc.insecure_channel(served.target) as channel:
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        too_long = call({"regex": "ab"})
        too_long.inputs[0].contents.bytes_contents[0] = b"a" * 1000
        served.call(served.engine.drain(EngineState.TRAINING))
        codes = [refusal(stub, call({"regex": "ab"})).code()]
        served.serve()
        wrong = (too_long, call({"regex": "ab"}, stop_token_ids=[999]))
        codes += [refusal(stub, request).code() for request in wrong]
        assert codes == [grpc.StatusCode.UNAVAILABLE] + [grpc.StatusCode.INVALID_ARGUMENT] * 2
        assert served.engine.grammars._trial.pid is None


def refusal(stub, request) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as raised:
        stub.ModelInfer(request)
    return raised.value


def test_time_runs_while_a_grammar_is_compiled(served, stub, monkeypatch):
    request = call({"choice": ["yes", "no"]})
    request.parameters["timeout"].int64_param = 50_000  # microseconds
    with held(served.engine.grammars._trial, "size_bytes", monkeypatch):
        error = refusal(stub, request)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert error.details().startswith("the request's time ran out before its grammar was compiled")


def test_a_place_is_taken_until_its_thread_is_done(monkeypatch):
    async def scenario() -> None:
        compiler = GrammarCompiler(ByteTokenizer())
        params = SamplingParams.parse({"structured_outputs": {"regex": "a"}, "n": MAX_WAITING})
        with held(compiler._trial, "size_bytes", monkeypatch) as begun:
            first = asyncio.create_task(compiler.compile(params))
            await asyncio.to_thread(begun.wait, 60)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            with pytest.raises(QueueFullError) as raised:
                await compiler.compile(params)
            assert status_of(raised.value) is grpc.StatusCode.RESOURCE_EXHAUSTED
            (left,) = compiler._tasks
        assert await left == [None] * MAX_WAITING  # nobody wants them, so none was compiled
        await asyncio.sleep(0)
        assert len(await compiler.compile(params)) == MAX_WAITING
        await compiler.close()

    asyncio.run(scenario())


def test_matchers_of_running_completions_have_a_limit_of_memory(monkeypatch):
    async def scenario() -> None:
        compiler = GrammarCompiler(ByteTokenizer())
        monkeypatch.setattr(compiler._trial, "size_bytes", lambda what: 600 << 20)
        params = SamplingParams.parse({"structured_outputs": {"regex": "a"}})
        matchers = await compiler.compile(params)
        with pytest.raises(QueueFullError) as full:
            await compiler.compile(params)
        assert str(full.value) == (
            "the grammars of running completions take 600 MB and 600 MB more would exceed 1024 MB; "
            "try again later."
        )
        with pytest.raises(RequestError) as never:
            await compiler.compile(replace(params, n=2))
        assert str(never.value) == (
            "sampling_parameters.structured_outputs.regex cannot be used: its completions take "
            "1200 MB of 1024 MB; correct structured_outputs.regex."
        )
        matchers.clear()
        while compiler._held:  # a thread may not have let go of what it has made
            await asyncio.sleep(0)
        await compiler.compile(params)
        await compiler.close()

    asyncio.run(scenario())


def test_a_grammar_that_is_known_needs_no_other_trial(monkeypatch):
    async def scenario() -> None:
        compiler = GrammarCompiler(ByteTokenizer())
        monkeypatch.setattr(grammar_compiler, "MAX_KNOWN", 2)
        tried, size_bytes = [], compiler._trial.size_bytes
        monkeypatch.setattr(
            compiler._trial,
            "size_bytes",
            lambda what: tried.append(what.regex) or size_bytes(what),
        )
        for regex in "aabacabb":
            await compiler.compile(SamplingParams.parse({"structured_outputs": {"regex": regex}}))
        assert tried == ["a", "b", "c", "b"]
        await compiler.close()

    asyncio.run(scenario())


def test_too_many_grammars_at_once_are_refused():
    async def scenario() -> None:
        compiler = GrammarCompiler(ByteTokenizer())
        params = SamplingParams.parse({"structured_outputs": {"regex": "a"}, "n": MAX_WAITING})
        first = asyncio.create_task(compiler.compile(params))
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError) as raised:
            await compiler.compile(SamplingParams.parse({"structured_outputs": {"regex": "a"}}))
        assert str(raised.value) == (
            f"{MAX_WAITING} grammars are being compiled and 1 more would exceed {MAX_WAITING}; "
            "try again later."
        )
        assert len(await first) == MAX_WAITING
        assert len(await compiler.compile(params)) == MAX_WAITING
        await compiler.close()

    asyncio.run(scenario())
