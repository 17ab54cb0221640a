"""Hostile messages to every method: refusals, never our own failure, and no block is lost.

`make fuzz` sends 100,000; here it is as many as a test may take. The last line says how many were
sent, what they were answered with and how many blocks stayed taken.
"""

import os
import sys
from collections import Counter

import grpc
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from support.admin import Admin, Run
from support.fuzz_bases import methods
from support.hostile import hostile
from support.serving import serving

from dualray.actors.admin_service import ADMIN_SERVICE
from dualray.actors.grpc_server import SERVICE
from dualray.actors.vllm_service import VLLM_SERVICE
from dualray.inference.serve_config import ServeConfig
from dualray.proto import admin_pb2
from dualray.proto import inference_pb2 as pb

MESSAGES = int(os.environ.get("FUZZ_MESSAGES", "2000"))
PER_EXAMPLE = 20
EXPECTED = {
    "OK",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "UNIMPLEMENTED",
    "RESOURCE_EXHAUSTED",
    "DEADLINE_EXCEEDED",
    "CANCELLED",
    "FAILED_PRECONDITION",  # modes that the run cannot be in
    "UNAVAILABLE",  # while it is paused
}

METHODS = methods()
BIDIRECTIONAL = {f"/{SERVICE}/ModelStreamInfer"}
ANSWERED_BY_STREAMS = {
    f"/{VLLM_SERVICE}/{name}" for name in ("Generate", "GetTokenizer", "SubscribeKvEvents")
}

# Most messages go where most can go wrong.
DEEP = [m for m in METHODS if m.endswith(("/ModelInfer", "/ModelStreamInfer", "/Generate"))]
ADMIN = [m for m in METHODS if m.startswith(f"/{ADMIN_SERVICE}/")]
calls = st.sampled_from([*METHODS, *ADMIN * 2, *DEEP * 15]).flatmap(
    lambda method: st.tuples(
        st.just(method), hostile(METHODS[method]), st.sampled_from([None] * 7 + ["cancel"])
    )
)


def start(channel: grpc.Channel, method: str, data: bytes, timeout_s: float):
    if method in ANSWERED_BY_STREAMS:
        return channel.unary_stream(method)(data, timeout=timeout_s)
    if method in BIDIRECTIONAL:
        return channel.stream_stream(method)(iter([data]), timeout=timeout_s)
    return channel.unary_unary(method).future(data, timeout=timeout_s)


def outcome(method: str, call) -> str:
    """The call's code; the code inside a stream's error message where it has one."""
    try:
        if method not in BIDIRECTIONAL | ANSWERED_BY_STREAMS:
            call.result()
            return "OK"
        found = "OK"
        for data in call:
            if method in ANSWERED_BY_STREAMS:
                continue
            message = pb.ModelStreamInferResponse.FromString(data).error_message
            if message:
                found = message.partition(":")[0]
        return found
    except grpc.RpcError as error:
        return error.code().name
    except grpc.FutureCancelledError:
        return "CANCELLED"


def test_hostile_messages_are_refused_and_leave_no_block_behind(capsys):
    codes: Counter[str] = Counter()
    # Preemption, drafts and shared blocks take part.
    with serving(draft_tokens=3, num_blocks=24) as served:
        beside = Admin(served, ServeConfig(), Run())
        scheduler = served.engine.scheduler
        free = scheduler.free_blocks()
        with (
            grpc.insecure_channel(served.target) as channel,
            grpc.insecure_channel(beside.target) as admin,
        ):
            resume = admin.unary_unary(f"/{ADMIN_SERVICE}/ResumeGeneration")
            nothing = admin_pb2.ResumeGenerationRequest().SerializeToString()

            @settings(
                max_examples=max(1, MESSAGES // PER_EXAMPLE),
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(st.lists(calls, min_size=PER_EXAMPLE, max_size=PER_EXAMPLE))
            def send(batch):
                running = []
                for method, data, how in batch:
                    to = admin if method.startswith(f"/{ADMIN_SERVICE}/") else channel
                    running.append((method, data, start(to, method, data, 60.0), how))
                for *_, call, how in running:
                    if how == "cancel":
                        call.cancel()
                # The admin's first: what they have paused must go on before the others end.
                running.sort(key=lambda each: not each[0].startswith(f"/{ADMIN_SERVICE}/"))
                for method, data, call, _ in running:
                    if not method.startswith(f"/{ADMIN_SERVICE}/"):
                        resume(nothing, timeout=60.0)
                    code = outcome(method, call)
                    codes[code] += 1
                    assert code in EXPECTED, f"{method} answered {code} to {data!r}"

            send()
            resume(nothing, timeout=60.0)
        served.until(lambda: not scheduler.num_running)
        scheduler.check_pool()
        leaked = sum(free.values()) - sum(scheduler.free_blocks().values())
        assert scheduler.num_waiting == 0
        num_preempted = scheduler.counts.num_preemptions
        beside.close()
    sent = sum(codes.values())
    with capsys.disabled():
        seen = ", ".join(f"{code} {count}" for code, count in codes.most_common())
        sys.stdout.write(
            f"\nfuzz: messages tried {sent}, codes seen {seen}, requests preempted "
            f"{num_preempted}, blocks leaked {leaked}\n"
        )
    assert leaked == 0
    assert sent >= MESSAGES
    assert {"OK", "INVALID_ARGUMENT", "NOT_FOUND"} <= set(codes)
    assert num_preempted
