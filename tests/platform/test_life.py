"""A run that is switched while it lives: what its workers are told, and in which order."""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray.exceptions import RayTaskError
from support.fake_run import FakeGang, FakeRay, controller_of, install, states_of
from support.runs import losses_of, make_corpus, metrics_of

from dualray.actors.gang import WorkerLostError
from dualray.actors.mode_answer import ModeAnswer, Refusal
from dualray.checkpoint.store import find
from dualray.errors import ResourceError, RunError
from dualray.parallel.slots import ExpertPlacement
from dualray.platform.controller import Controller
from dualray.platform.folder import RunFolder

SERVED = ["put_state_away", "start_serving", "digest", "cache_bytes"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpora") / "bytes")


class Run:
    """A run of four steps that stops at `hold`ed steps until somebody has asked for a mode."""

    def __init__(self, controller: Controller, gang: FakeGang) -> None:
        self.controller, self.gang = controller, gang
        self._answers: queue.Queue[ModeAnswer | Refusal] = queue.Queue()
        self._life = threading.Thread(target=controller.run)

    def asks(self, mode: str, *, at: int) -> None:
        """Ask for the mode in the middle of step `at`, counted from 0."""

        def ask() -> None:
            self._answers.put(self.controller.switch(mode))

        def meanwhile(step: int, *_: object) -> None:
            if step == at:
                threading.Thread(target=ask).start()
                self.controller._wishes.wait(30)

        self.gang.before["step"] = meanwhile

    def start(self) -> None:
        self._life.start()

    def answered(self) -> ModeAnswer | Refusal:
        """To who asked in a step."""
        return self._answers.get(timeout=30)

    def end(self, *, stop: bool = True) -> None:
        if stop:
            self.controller.stop()
        if self._life.ident is not None:
            self._life.join(30)
        assert not self._life.is_alive()

    def until_states(self, count: int) -> None:
        """Wait until the run has been in so many."""
        while len(self.states) < count:
            seen = len(self.controller.poll(0, 0.0))
            assert self.controller.poll(seen, 30.0), "no event within 30 s"

    @property
    def states(self) -> list[str]:
        return [str(state) for state in states_of(self.controller.poll(0, 0.0))]

    @property
    def told(self) -> list[str]:
        """What the workers were told, without the looks at them."""
        return [call for call in self.gang.calls if call != "info"]


@pytest.fixture
def fakes(monkeypatch, tmp_path) -> tuple[FakeGang, FakeRay]:
    monkeypatch.chdir(tmp_path)
    return install(monkeypatch)


@pytest.fixture
def run_of(corpus, fakes) -> Iterator[Callable[..., Run]]:
    """run_of(optimizer="drop") makes a run with these settings of `serve`."""
    made: list[Run] = []

    def make(**serve) -> Run:
        made.append(Run(controller_of(corpus, {}, serve), fakes[0]))
        return made[-1]

    yield make
    for run in made:
        run.end()


def events_of(name: str) -> list[dict]:
    return [row for row in metrics_of(RunFolder.named("tiny").path) if row.get("event") == name]


@pytest.mark.parametrize("place", ["keep", "park", "drop"])
def test_it_serves_between_two_steps_and_goes_on(run_of, fakes, place: str) -> None:
    run = run_of(optimizer=place)
    run.asks("serve", at=1)
    run.start()
    served = run.answered()
    assert isinstance(served, ModeAnswer)
    assert (served.step, served.came_from, served.target) == (2, "train", "127.0.0.1:5")
    assert served.optimizer == place
    sizes = {
        "keep": served.kept_bytes, "park": served.parked_bytes, "drop": served.dropped_bytes,
    }  # fmt: skip
    assert sizes.pop(place) == (9_000, 8_000)
    assert set(sizes.values()) == {(0, 0)}
    assert served.cache_bytes == (5_000, 4_000)
    again = run.controller.switch("serve")
    assert isinstance(again, ModeAnswer)
    assert (again.switched, again.sentences) == (False, ("run tiny serves already",))
    fakes[1].is_held = True
    again = run.controller.switch("serve")
    assert isinstance(again, ModeAnswer)
    assert (again.switched, again.sentences) == (
        False,
        ("run tiny serves already, and its generation, which was paused, goes on",),
    )
    assert not fakes[1].is_held

    back = run.controller.switch("train")
    assert isinstance(back, ModeAnswer)
    assert (back.mode, back.came_from, back.optimizer) == ("train", "serve", place)
    assert back.first_step_s is not None
    assert back.step >= 3
    run.until_states(7)  # serving, behind its last step
    run.end()
    assert run.states[:6] == [
        *("training", "switching", "serving", "switching", "training", "switching"),
    ]
    assert run.states[-2:] == ["stopping", "stopped"]
    committed = ["write_checkpoint"] if place == "drop" else []
    restored = ["restore"] if place == "drop" else []
    assert run.told[: len(committed) + len(restored) + 10] == [
        *("step", "step", *committed, *SERVED, "stop_serving", "bring_state_back", *restored),
        *("step", "step"),
    ]
    assert fakes[1].drained[:3] == ["training", "training", "stopped"]
    assert list(losses_of(RunFolder.named("tiny").path)) == [1, 2, 3, 4]
    first, last = events_of("switch")
    assert (first["step"], last["step"], last["came_from"]) == (2, 4, "train")
    [trained] = events_of("back_to_training")
    assert (trained["step"], trained["optimizer"]) == (3, place)


def test_what_was_dropped_needs_its_checkpoint(run_of) -> None:
    run = run_of(optimizer="drop")
    run.asks("serve", at=1)
    run.start()
    run.answered()
    shutil.rmtree(RunFolder.named("tiny").checkpoints / "step-2")
    refused = run.controller.switch("train")
    assert isinstance(refused, Refusal)
    assert "has no committed checkpoint of that step that is whole" in refused.sentence
    # It serves on.
    again = run.controller.switch("serve")
    assert isinstance(again, ModeAnswer)
    assert not again.switched
    run.end()
    assert run.states[-1] == "stopped"


def test_stopped_while_it_serves_it_commits_what_was_kept(run_of, fakes) -> None:
    run = run_of(optimizer="park")
    run.asks("serve", at=1)
    run.start()
    run.answered()
    fakes[1].num_cut = 2
    run.end()
    assert run.told[-4:] == ["stop_serving", "bring_state_back", "write_checkpoint", "stop"]
    assert find(RunFolder.named("tiny").path).path == RunFolder.named("tiny").checkpoints / "step-2"
    assert fakes[1].drained == ["training", "stopped"]
    notes = [event.text for event in run.controller.poll(0, 0.0) if hasattr(event, "text")]
    assert "2 requests were ended after 30 s of draining" in notes


def test_a_pause_keeps_state_where_it_is(run_of, fakes) -> None:
    run = run_of(optimizer="drop", after_training=False)
    run.asks("pause", at=0)
    run.start()
    paused = run.answered()
    assert isinstance(paused, ModeAnswer)
    assert paused.sentences == ("paused after step 1",)
    assert run.told == ["step"]
    trained = run.controller.switch("train")
    assert isinstance(trained, ModeAnswer)
    assert (trained.came_from, trained.optimizer) == ("pause", "keep")
    run.end(stop=False)
    assert run.told == ["step"] * 4 + ["evaluate", "write_checkpoint", "stop"]
    assert run.states == [
        *("training", "switching", "paused", "switching", "training", "stopping", "stopped"),
    ]
    assert not fakes[1].drained  # there never was an engine


def test_after_training_it_pauses_and_serves_but_trains_no_more(run_of, fakes) -> None:
    run = run_of()
    run.start()
    run.until_states(3)
    paused = run.controller.switch("pause")
    assert isinstance(paused, ModeAnswer)
    assert paused.came_from == "serve"
    assert run.controller.status()["target"] is None
    served = run.controller.switch("serve")
    assert isinstance(served, ModeAnswer)
    assert (served.came_from, served.sentences[1][:11]) == ("pause", "first token")
    refused = run.controller.switch("train")
    assert isinstance(refused, Refusal)
    assert refused.sentence.startswith("run tiny has made all of its 4 optimizer steps")
    run.end()
    # Put away once, committed at the last step.
    assert run.told.count("put_state_away") == 1
    assert run.told.count("write_checkpoint") == 1
    assert fakes[1].drained == ["training", "paused", "stopped"]
    assert [row["came_from"] for row in events_of("paused")] == ["serve"]


@pytest.mark.parametrize("invariant", [False, True])
def test_workers_are_told_how_to_serve(run_of, fakes, invariant: bool) -> None:
    told = []
    fakes[0].before["start_serving"] = lambda limits, *how: told.append(how)
    run = run_of(batch_invariant=invariant)
    run.start()
    run.until_states(3)
    run.end()
    assert told == [(0, invariant)]


def test_a_port_that_is_taken_does_not_end_training(run_of, fakes) -> None:
    fakes[1].refused = RayTaskError(
        "start", "a remote traceback", ResourceError("serve.port is 5", hint="choose another")
    ).as_instanceof_cause()
    run = run_of(after_training=False)
    run.asks("serve", at=1)
    run.start()
    assert run.answered() == Refusal(sentence="serve.port is 5", hint="choose another")
    run.end(stop=False)
    assert run.states == ["training", "stopping", "stopped"]
    assert list(losses_of(RunFolder.named("tiny").path)) == [1, 2, 3, 4]


def test_who_asks_for_nonsense_or_too_late_is_told(run_of) -> None:
    run = run_of(after_training=False)
    refused = run.controller.switch("sleep")
    assert isinstance(refused, Refusal)
    assert refused.sentence == "MODE is sleep and must be train, serve or pause"
    run.start()
    run.end(stop=False)
    late = run.controller.switch("serve")
    assert late == Refusal(sentence="run tiny is stopping", hint="start it again")


def test_a_switch_that_fails_is_taken_back(run_of, fakes) -> None:
    """No cache, say: the run trains on as if nobody had asked."""
    error = RunError("worker 1 failed in start_serving with OutOfMemoryError", hint="have more")

    def fail(*_: object) -> None:
        run.gang.before.pop("start_serving")
        raise error

    run = run_of(after_training=False)
    run.gang.before["start_serving"] = fail
    run.asks("serve", at=1)
    run.start()
    assert run.answered() == Refusal(sentence=error.sentence, hint=error.hint)
    run.end(stop=False)
    assert list(losses_of(RunFolder.named("tiny").path)) == [1, 2, 3, 4]
    assert run.told[:7] == [
        *("step", "step", "put_state_away", "start_serving", "stop_serving", "bring_state_back"),
        "step",
    ]
    assert run.states == ["training", "switching", "training", "stopping", "stopped"]


def test_a_worker_that_is_lost_in_a_switch_ends_the_run(run_of) -> None:
    error = WorkerLostError("worker 1 died during start_serving", hint="see its log")

    def fail(*_: object) -> None:
        raise error

    run = run_of()
    run.gang.before["start_serving"] = fail
    run.asks("serve", at=1)
    run.start()
    assert run.answered() == Refusal(
        sentence="run tiny has failed", hint="see what its command says"
    )
    run.end(stop=False)
    assert run.states[-1] == "failed"


def test_training_knows_of_experts_that_moved_while_it_served(run_of, fakes) -> None:
    run = run_of()
    run.asks("serve", at=1)
    run.start()
    run.answered()
    before = run.controller.placement()
    held = {layer: ranks[::-1] for layer, ranks in before.held.items()}
    num_homes = {layer: counts[::-1] for layer, counts in before.num_homes.items()}
    fakes[1].placement = ExpertPlacement(held=held, num_homes=num_homes)
    assert isinstance(run.controller.switch("train"), ModeAnswer)
    assert run.controller.placement() == fakes[1].placement != before
    assert run.controller._training is not None
    assert run.controller._training.experts.placement == fakes[1].placement
