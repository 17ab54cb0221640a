"""The unmodified openai client, through the unmodified smg gateway, to a served tiny model."""

import asyncio
import contextlib
import json
import urllib.request

import grpc
import pytest
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc as pb_grpc
from support.serving import LIMITS, serving

from dualray.actors.engine import EngineState
from dualray.data.tokenizer import train_bpe
from dualray.inference.plan import Owner

pytest.importorskip("smg", reason="there is no wheel of smg for this platform")

import openai
from support.gateway import gateway, until

OWNER = Owner(0, 0, 0)
FREE = {OWNER: LIMITS.num_blocks}
TEXT = "the cat sat on the mat, and the dog ate the mat of the cat; user assistant yes no 0123\n"
TOKENIZER = train_bpe([TEXT * 20], 290)
PROMPT = "the cat"
TALK = [{"role": "user", "content": "the dog?"}]
ASKED = "user: the dog?\nassistant:"
"""TALK as our own template makes it a prompt."""


class Front:
    """`served` behind a gateway, and a client of the gateway's."""

    def __init__(self, served, client, log):
        self.served, self.client, self.log = served, client, log

    def complete(self, **options):
        return self.client.completions.create(
            model="tiny", prompt=PROMPT, **{"max_tokens": 8, "temperature": 0} | options
        )

    def chat(self, **options):
        return self.client.chat.completions.create(
            model="tiny", messages=TALK, **{"max_tokens": 8, "temperature": 0} | options
        )

    def whole(self, prompt=PROMPT, **sampling) -> pb.GenerateComplete:
        """What the server itself answers."""
        params = pb.SamplingParams(**{"max_tokens": 8, "temperature": 0} | sampling)
        request = pb.GenerateRequest(text=prompt, sampling_params=params)
        with grpc.insecure_channel(self.served.target) as channel:
            (response,) = pb_grpc.VllmEngineStub(channel).Generate(request)
        return response.complete

    def ids(self, prompt=PROMPT, **sampling) -> list[int]:
        return list(self.whole(prompt, **sampling).output_ids)

    def text(self, prompt=PROMPT, **sampling) -> str:
        """Their text; bytes at its end that make no whole character are no text to a gateway."""
        return TOKENIZER.decode(self.ids(prompt, **sampling)).rstrip("\ufffd")


@pytest.fixture(scope="module")
def front(tmp_path_factory):
    log = tmp_path_factory.mktemp("smg") / "log"
    with serving(tokenizer=TOKENIZER) as served, gateway(served.target, log) as client:
        yield Front(served, client, log)


@pytest.fixture(autouse=True)
def leaves_nothing_behind(front):
    yield
    front.served.fault = None
    front.served.hold(False)
    front.served.until(lambda: front.served.engine.scheduler.num_running == 0)
    assert front.served.engine.scheduler.free_blocks() == FREE


def test_completions(front):
    answer = front.complete()
    (choice,) = answer.choices
    assert choice.text == front.text()
    assert choice.finish_reason == "length"
    assert answer.usage.prompt_tokens == len(TOKENIZER.encode(PROMPT))
    assert answer.usage.completion_tokens == 8


def test_chat_goes_through_the_template(front):
    answer = front.chat(logprobs=True, top_logprobs=2)
    (choice,) = answer.choices
    whole = front.whole(ASKED, logprobs=2)
    assert choice.message.content == front.text(ASKED)
    assert answer.usage.prompt_tokens == len(TOKENIZER.encode(ASKED))
    # The gateway leaves those out whose text it does.
    entries = choice.logprobs.content
    assert len(entries) >= 3
    values = zip(whole.output_ids, whole.output_logprobs.token_logprobs)
    for entry, (token, value) in zip(entries, values):
        assert entry.token == TOKENIZER.decode([token])
        assert entry.logprob == pytest.approx(value, rel=1e-6)  # decimals of an fp32
        # Greedy: the token is the likeliest of those that are shown beside it.
        assert entry.logprob == entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob


@pytest.mark.parametrize("seed", [1, 2])
def test_streams_say_what_the_whole_says(front, seed):
    options = {"temperature": 1, "seed": seed, "stream_options": {"include_usage": True}}
    whole = front.text(temperature=1, seed=seed)
    parts = list(front.complete(stream=True, **options))
    assert "".join(part.choices[0].text for part in parts if part.choices) == whole
    assert [p.choices[0].finish_reason for p in parts if p.choices][-1] == "length"
    assert parts[-1].usage.completion_tokens == 8
    parts = list(front.chat(stream=True, **options))
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == front.text(ASKED, temperature=1, seed=seed)
    assert parts[-1].usage.completion_tokens == 8


def test_stop_strings_across_tokens(front):
    whole = front.text(max_tokens=12)
    pieces = [TOKENIZER.decode([token]) for token in front.ids(max_tokens=12)]
    border = len("".join(pieces[:6]))
    stop = whole[border - 1 : border + 1]
    expected = whole[: whole.index(stop)]
    answer = front.complete(max_tokens=12, stop=[stop, "never"])
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected, "stop")
    assert answer.usage.completion_tokens < 12
    parts = list(front.complete(max_tokens=12, stop=stop, stream=True))
    assert "".join(part.choices[0].text for part in parts) == expected
    assert parts[-1].choices[0].finish_reason == "stop"
    stop = front.text(ASKED)[2:4]
    answer = front.chat(stop=[stop])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].matched_stop == stop


def test_two_completions_of_one_prompt(front):
    options = {"temperature": 1, "seed": 5}
    expected = [front.text(temperature=1, seed=seed) for seed in (5, 6)]
    assert len(set(expected)) == 2
    answer = front.complete(n=2, **options)
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage.completion_tokens == 16
    texts = ["", ""]
    for part in front.complete(n=2, stream=True, **options):
        texts[part.choices[0].index] += part.choices[0].text
    assert texts == expected
    assert len(front.chat(n=2, **options).choices) == 2


def test_grammars(front):
    answer = front.complete(max_tokens=20, extra_body={"regex": "(yes|no)"})
    assert answer.choices[0].text in ("yes", "no")
    schema = {"name": "number", "schema": {"type": "integer", "minimum": 0, "maximum": 9}}
    answer = front.chat(response_format={"type": "json_schema", "json_schema": schema})
    assert 0 <= int(answer.choices[0].message.content) <= 9


def test_anthropic_messages(front):
    body = {"model": "tiny", "messages": TALK, "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"{front.client.base_url}messages",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    assert [part["text"] for part in answer["content"]] == [front.text(ASKED)]
    assert (answer["stop_reason"], answer["usage"]["output_tokens"]) == ("max_tokens", 8)


def test_wrong_requests_are_the_clients_fault(front):
    with pytest.raises(openai.BadRequestError, match="maximum context length is 64 tokens"):
        front.client.completions.create(model="tiny", prompt="x" * 200, max_tokens=1)
    # What the gateway does not check reaches us, and our sentence the client.
    with pytest.raises(openai.BadRequestError, match="below the vocabulary size 290; correct stop"):
        front.complete(extra_body={"stop_token_ids": [9999]})
    with pytest.raises(openai.NotFoundError):
        front.client.completions.create(model="other", prompt="a", max_tokens=1)


def test_a_client_that_leaves_before_its_first_token_frees_its_blocks(front):
    """The gateway has no stream then whose end it could wait for."""
    front.served.hold()
    begun = len(front.served.plans)
    scheduler = front.served.engine.scheduler
    with pytest.raises(openai.APITimeoutError):
        front.client.with_options(timeout=0.5).chat.completions.create(
            model="tiny", messages=TALK, max_tokens=30, stream=True
        )
    front.served.until(lambda: scheduler.num_running + scheduler.num_waiting == 0)
    assert scheduler.free_blocks() == FREE
    assert len(front.served.plans) == begun


def test_a_client_that_leaves_in_mid_stream_frees_its_blocks(front):
    """The gateway notices when it hands on what comes next, and then says Abort."""
    served, scheduler = front.served, front.served.engine.scheduler
    begun = len(served.plans)
    stop_after(served, begun + 3)
    stream = front.chat(max_tokens=40, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    assert scheduler.free_blocks() != FREE
    stream.close()
    while not ended_soon(front):
        stop_after(served, len(served.plans) + 1)
        served.hold(False)
    assert scheduler.free_blocks() == FREE
    assert len(served.plans) < begun + 40


def ended_soon(front) -> bool:
    """Whether nothing runs, or nothing will within a moment."""
    scheduler = front.served.engine.scheduler

    async def ended() -> None:
        while scheduler.num_running:
            await asyncio.sleep(0.01)

    with contextlib.suppress(TimeoutError):
        front.served.call(asyncio.wait_for(ended(), 1.0))
    return scheduler.num_running == 0


def test_a_server_that_trains_drains_and_comes_back(front):
    served, expected = front.served, front.text()
    stop_after(served, len(served.plans) + 2)
    stream = front.complete(stream=True)
    parts = [next(iter(stream))]
    drained = served.begin(served.engine.drain())
    served.until(lambda: served.engine.state is EngineState.DRAINING)
    assert refused(front)
    # What was accepted goes on to its end.
    served.fault = None
    served.hold(False)
    parts += stream
    assert "".join(part.choices[0].text for part in parts) == expected
    assert parts[-1].choices[0].finish_reason == "length"
    drained.result(60)
    # By now, or soon, the gateway refuses by itself, having asked for the health.
    until(lambda: "unavailable (unhealthy" in why(front), front.log)
    served.serve()
    until(lambda: not refused(front), front.log)
    assert front.complete().choices[0].text == expected


def stop_after(served, count: int) -> None:
    """Holds the steps once `count` have been run."""

    def fault(plan, sampled):
        if len(served.plans) >= count:
            served.gate.clear()
        return sampled

    served.fault = fault


def refused(front) -> bool:
    """Whether a request is answered with 503, by the gateway or by the server."""
    return bool(why(front))


def why(front) -> str:
    """What a 503 says; "" if the request is answered."""
    try:
        front.complete(max_tokens=1)
    except openai.InternalServerError as error:
        if error.status_code == 503:
            return error.message
        raise
    return ""
