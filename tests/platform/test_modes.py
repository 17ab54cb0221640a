"""Which mode a run may be switched to, what clients are told, and how they wait for it."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from dualray.actors.mode_answer import ModeAnswer, Refusal
from dualray.errors import ConfigError, RunError
from dualray.platform.metrics import BackToTraining, Paused, Switch
from dualray.platform.mode_words import answer, sentences, size
from dualray.platform.modes import Mode, Situation, already, mode_of, must_switch
from dualray.platform.wishes import Wishes

SERVES = Situation(name="demo", mode=Mode.SERVE, trains=True, steps_done=3, end_step=9)


@pytest.mark.parametrize("asked", Mode)
@pytest.mark.parametrize("present", Mode)
def test_a_run_with_steps_left_may_do_anything(asked: Mode, present: Mode) -> None:
    now = replace(SERVES, mode=present)
    assert must_switch(asked, now) is (asked is not present)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"trains": False},
            "run demo serves a checkpoint and has neither data nor optimizer state, so it cannot "
            "train; train with `dualray train`, from the checkpoint with train.init_from or "
            "--resume.",
        ),
        (
            {"steps_done": 9},
            "run demo has made all of its 9 optimizer steps, so there is none left to train; stop "
            "it, raise train.steps and continue it with --resume.",
        ),
        (
            {"lacks_checkpoint": True},
            "run demo dropped its optimizer state after step 3 and has no committed checkpoint of "
            "that step that is whole, so training cannot go on from there; serve on, or stop it "
            "and continue it from an older checkpoint with --resume.",
        ),
    ],
)
def test_what_cannot_train_serves_and_pauses_on(changes: dict, sentence: str) -> None:
    now = replace(SERVES, **changes)
    with pytest.raises(RunError) as raised:
        must_switch(Mode.TRAIN, now)
    assert str(raised.value) == sentence
    assert must_switch(Mode.PAUSE, now)
    assert must_switch(Mode.SERVE, replace(now, mode=Mode.PAUSE))
    assert not must_switch(Mode.SERVE, now)


def test_a_replica_that_is_lost_leaves_nothing_but_serving() -> None:
    now = replace(SERVES, lost_replicas=(1,))
    for asked in (Mode.TRAIN, Mode.PAUSE):
        with pytest.raises(RunError, match="run demo has lost replica 1 and can only go on"):
            must_switch(asked, now)
    assert not must_switch(Mode.SERVE, now)


@pytest.mark.parametrize(
    ("text", "hint"), [("trian", "did you mean train?"), ("x", "write dualray mode RUN serve.")]
)
def test_there_are_three_modes(text: str, hint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        mode_of(text)
    wanted = f"MODE is {text} and must be train, serve or pause; {hint}"
    assert str(raised.value).rstrip(".") == wanted.rstrip(".")


SWITCH = Switch(
    seconds_to_first_token=1.5, switch_s=0.25, workers_before=(1, 2), workers_after=(1, 2), step=7,
    optimizer="keep", kept_bytes=(3_000_000, 1_000_000), cache_bytes=(500, 900),
)  # fmt: skip
PARKED = replace(
    SWITCH, optimizer="park", kept_bytes=(), parked_bytes=(4_000,), gradient_bytes=(2_000,),
    cache_bytes=(900,),
)  # fmt: skip


def test_a_switch_to_serving_in_words() -> None:
    assert sentences(SWITCH) == (
        "first token 1.50 s after the last optimizer step (0.25 s for the switch itself, before it "
        "held-out evaluation and checkpoint)",
        "optimizer state kept where it is: 4 MB (3 MB on the fullest worker); latent cache "
        "1.4 kB (900 B on the fullest worker)",
    )
    assert sentences(replace(SWITCH, came_from="pause", optimizer=None)) == (
        "first token 1.50 s after the pause ended",
        "latent cache 1.4 kB (900 B on the fullest worker)",
    )
    parked = "optimizer state parked in host memory"
    rest = ": 4 kB, gradient buffers of 2 kB given back; latent cache 900 B"
    assert sentences(PARKED)[1] == parked + rest
    # Nothing was gained, and nobody shall think so.
    without = f"{parked}, where it always is without a GPU{rest}"
    assert sentences(PARKED, has_device=False)[1] == without


def test_other_switches_in_words() -> None:
    back = BackToTraining(
        step=8, seconds_to_first_step=0.5, came_from="serve", optimizer="keep", drain_s=2.0,
        num_cut=3,
    )  # fmt: skip
    assert sentences(back) == (
        "training again, step 8 ended 0.50 s after the workers were free (accepted requests ended "
        "in 2.00 s, 3 did not and were ended)",
    )
    assert sentences(replace(back, came_from="pause")) == (
        "training again, step 8 ended 0.50 s after the pause ended",
    )
    assert sentences(Paused(step=8, came_from="train")) == ("paused after step 8",)


def test_programs_get_the_figures() -> None:
    said = answer(PARKED, step=7, target="h:1", has_device=True)
    assert said == ModeAnswer(
        mode="serve", switched=True, step=7, sentences=("serving at h:1", *sentences(PARKED)),
        came_from="train", target="h:1", first_token_s=1.5, optimizer="park", parked_bytes=(4_000,),
        gradient_bytes=(2_000,), cache_bytes=(900,),
    )  # fmt: skip
    paused = answer(Paused(step=8, came_from="serve", drain_s=1.0), step=8, target="h:1",
                    has_device=True)  # fmt: skip
    assert (paused.mode, paused.drain_s, paused.target) == ("pause", 1.0, None)


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1e3, "1 kB"), (999_600, "1 MB"),
                            (123.4e9, "123 GB")],
)  # fmt: skip
def test_sizes(num_bytes: float, text: str) -> None:
    assert size(num_bytes) == text


class Asking:
    """A client in a thread of its own, who waits for a mode."""

    def __init__(self, wishes: Wishes, mode: Mode) -> None:
        self.answers: list[ModeAnswer | Refusal] = []
        self._thread = threading.Thread(target=lambda: self.answers.append(wishes.ask(mode)))
        self._thread.start()

    def answer(self) -> ModeAnswer | Refusal:
        self._thread.join(30)
        [answer] = self.answers
        return answer


def test_a_client_waits_until_the_run_answers() -> None:
    wishes = Wishes("demo")
    assert wishes.mode is None
    asking = Asking(wishes, Mode.SERVE)
    wishes.wait(30)
    assert wishes.mode is Mode.SERVE
    with pytest.raises(RunError) as raised:
        wishes.ask(Mode.PAUSE)
    assert str(raised.value) == "run demo is switching to serve at present; wait and ask again."
    assert not asking.answers
    wishes.answer(already(SERVES))
    assert asking.answer().sentences == ("run demo serves already",)
    assert wishes.mode is None
    wishes.answer(already(SERVES))  # nobody waits
    asking = Asking(wishes, Mode.TRAIN)
    wishes.wait(30)
    assert wishes.mode is Mode.TRAIN
    wishes.answer(already(SERVES))
    asking.answer()


def test_the_end_of_the_run_is_told_to_who_waits_and_who_comes_later() -> None:
    wishes = Wishes("demo")
    asking = Asking(wishes, Mode.SERVE)
    wishes.wait(30)
    wishes.stop()
    assert wishes.must_stop
    stopping = Refusal(sentence="run demo is stopping", hint="start it again")
    assert asking.answer() == stopping
    wishes.close("run demo has failed", "look")
    assert wishes.ask(Mode.PAUSE) == stopping
    wishes.wait(30)  # there is always something to be done now
