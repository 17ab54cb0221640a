"""Grammars that kill whoever compiles them, and the process that exists to be killed."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading

import pytest
from support.chains import chained_rules, chained_schemas, optional_words, optional_words_in

from dualray.actors.vllm_tokenizer import byte_level_json
from dualray.errors import RequestError
from dualray.inference import trial_process
from dualray.inference.grammar_trial import STACK_BYTES, decode, encode
from dualray.inference.grammars import Grammars
from dualray.inference.structured_outputs import StructuredOutputs, read_structured_outputs
from dualray.inference.token_masks import ids_in
from dualray.inference.trial_process import TrialProcess

EOS = 256
GOOD = StructuredOutputs(regex="[ab]+")


def wanted(values: dict) -> StructuredOutputs:
    what = read_structured_outputs("structured_outputs", values)
    assert what is not None
    return what


def new_trial() -> TrialProcess:
    return TrialProcess(byte_level_json(), EOS)


@pytest.fixture(scope="module")
def shared():
    trial = new_trial()
    yield trial
    trial.close()


@pytest.fixture
def trial():
    trial = new_trial()
    yield trial
    trial.close()


def wait_for_end(pid: int) -> None:
    """Of anybody's child."""
    handle = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        assert poll.poll(30_000), "it still runs"
    finally:
        os.close(handle)


DEADLY = {
    "rules": chained_rules(4000),
    "terminals": chained_rules(4000, "R"),
    "schemas": chained_schemas(900),
    "choices of schemas": chained_schemas(900, "anyOf"),
    "a regular expression": optional_words(2000),
    "a long one": {"regex": "a?" * 20_000},
    "a terminal": optional_words_in("terminal", 2000),
    "white space": optional_words_in("white space", 2000),
}


@pytest.mark.parametrize("name", DEADLY)
def test_what_would_kill_the_engine_is_refused(shared, name):
    what = wanted(DEADLY[name])
    with pytest.raises(RequestError) as raised:
        shared.size_bytes(what)
    reason = str(raised.value).removeprefix(
        f"sampling_parameters.structured_outputs.{what.kind} cannot be used: "
    )
    assert reason in (
        f"it is nested too deeply; correct structured_outputs.{what.kind}.",
        f"it takes more than 64 MB of memory; correct structured_outputs.{what.kind}.",
    )
    assert raised.value.field == "structured_outputs"
    assert shared.pid is None
    assert shared.size_bytes(GOOD) >= 0  # in another process


@pytest.mark.parametrize(
    "values",
    [
        chained_rules(500),
        chained_rules(500, "R"),
        chained_schemas(300),
        chained_schemas(300, "anyOf"),
        {"json": {"enum": [f"x{i:06}" for i in range(4000)]}},
    ],
)
def test_what_passes_is_compiled_on_the_same_stack(shared, values):
    what = wanted(values)
    assert 0 <= shared.size_bytes(what) < 64 << 20
    found = []

    def compile_it():
        matcher = Grammars(byte_level_json(), EOS).compile(what)
        while not matcher.is_complete and len(found) < 50:
            found.append(max(i for i in ids_in(matcher.allowed()) if i != EOS))
            assert matcher.accept(found[-1])

    before = threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=compile_it)
    thread.start()
    threading.stack_size(before)
    thread.join()
    assert found


@pytest.mark.parametrize("values", [{"regex": "(a"}, optional_words_in("pattern", 2000)])
def test_what_the_compiler_refuses_is_refused_in_its_words(shared, values):
    what = wanted(values)
    with pytest.raises(RequestError) as here:
        Grammars(byte_level_json(), EOS).compile(what)
    shared.size_bytes(GOOD)
    pid = shared.pid
    with pytest.raises(RequestError) as there:
        shared.size_bytes(what)
    assert str(there.value) == str(here.value)
    assert there.value.field == here.value.field
    assert shared.pid == pid  # it goes on


def test_every_field_arrives():
    for what in (
        StructuredOutputs(choice=("yes", "\ud800")),
        StructuredOutputs(json="{}", whitespace_pattern=" ?", disable_any_whitespace=True),
        StructuredOutputs(json_object=True),
    ):
        assert decode(encode(what)) == what


def test_it_begins_with_the_first_grammar_and_ends_when_closed(trial):
    assert trial.pid is None
    trial.size_bytes(GOOD)
    pid = trial.pid
    assert pid is not None
    trial.close()
    assert trial.pid is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(RequestError, match="the server is stopping"):
        trial.size_bytes(GOOD)


def test_nothing_open_here_is_open_there(trial):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.set_inheritable(True)
        trial.size_bytes(GOOD)
        ours = os.readlink(f"/proc/self/fd/{listening.fileno()}")
        folder = f"/proc/{trial.pid}/fd"
        theirs = [os.readlink(f"{folder}/{name}") for name in os.listdir(folder)]
    assert len(theirs) >= 3
    assert ours not in theirs


def test_it_ends_with_whoever_started_it():
    code = (
        "import sys\n"
        "from dualray.actors.vllm_tokenizer import byte_level_json\n"
        "from dualray.inference.structured_outputs import StructuredOutputs\n"
        "from dualray.inference.trial_process import TrialProcess\n"
        "trial = TrialProcess(byte_level_json(), 256)\n"
        "trial.size_bytes(StructuredOutputs(regex='a'))\n"
        "print(trial.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with starter:
        pid = int(starter.stdout.readline())
        os.kill(pid, 0)
        starter.kill()
    wait_for_end(pid)


def test_it_needs_neither_torch_nor_ray():
    code = (
        "import sys, dualray.inference.grammar_trial\n"
        "assert not {'torch', 'ray', 'grpc'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_processor_time_ends_it():
    code = (
        "from dualray.inference.grammar_trial import _limit\n_limit(None, 0.05)\nwhile True: pass"
    )
    ended = subprocess.run([sys.executable, "-c", code], check=False)
    assert ended.returncode == -signal.SIGPROF
    assert trial_process._reason(-signal.SIGPROF) == "it takes more than 1 s of a processor"


def test_one_that_does_not_answer_is_ended(trial, monkeypatch):
    trial.size_bytes(GOOD)
    os.kill(trial.pid, signal.SIGSTOP)
    monkeypatch.setattr(trial_process, "WALL_S", 0.1)
    with pytest.raises(RequestError, match="it takes more than 30 s; correct"):
        trial.size_bytes(GOOD)
    assert trial.pid is None
    monkeypatch.undo()
    trial.size_bytes(GOOD)
