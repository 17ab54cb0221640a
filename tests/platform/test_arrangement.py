"""How workers start after a decision, and what they are told when a phase does not fit it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from support.models import tiny_config

from dualray.parallel.layout import Layout
from dualray.parallel.phases import Phase
from dualray.parallel.train_config import TrainConfig
from dualray.platform.arrangement import Arrangement
from dualray.platform.scheduler import SchedulerConfig
from dualray.platform.scheduling.choice import Choice, remember, start_of

MODEL = tiny_config(num_hidden_layers=16, num_nextn_predict_layers=1)


def phase(**changes) -> Phase:
    values = {"steps": 9, "seq_len": 32, "micro_batches": 16, "lr": 1e-3} | changes
    number = values.pop("number", 0)
    return Phase(
        number=number,
        first_step=0,
        tokens_before=0,
        model=MODEL,
        train=TrainConfig(**values),
    )


def test_a_checkpoint_s_choice_is_taken_as_far_as_it_fits() -> None:
    layout = Layout(pipeline=4, experts=2, schedule="auto")
    choice = Choice(schedule="dualpipev", layers=(2,) * 8, micro_batch_size=2, micro_batches=8)
    remembered = remember(choice, phase=0, decided=True)
    start = start_of(layout, phase(), remembered)
    assert (start.choice, start.decided) == (choice, True)
    assert (start.layout.schedule, start.layout.layers) == ("dualpipev", (2,) * 8)
    # Another phase is measured anew, with its own micro-batches if it has other sequences.
    later = start_of(layout, phase(number=1, micro_batches=24), remembered)
    assert (later.choice.schedule, later.choice.micro_batches) == ("dualpipev", 24)
    assert not later.decided
    # A pinned cut, nothing remembered, or a named schedule.
    for other in (
        start_of(replace(layout, layers=(5, 4, 4, 3)), phase(), remembered),
        start_of(layout, phase(), None),
    ):
        assert other.choice.schedule == "dualpipe"
        assert not other.decided
    named = Layout(pipeline=4, experts=2, schedule="zb1p")
    assert start_of(named, phase(), remembered).choice.schedule == "zb1p"


class Gang:
    """Notes what workers are told."""

    infos = ()

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def call(self, method: str, *args) -> None:
        self.told.append((method, args[1].schedule if method == "enter_phase" else ""))

    def rebuild(self, layout: Layout, phase: Phase) -> None:
        self.told.append(("rebuild", layout.schedule))


def test_a_phase_that_a_decision_does_not_fit_goes_back_to_the_beginning(tmp_path) -> None:
    run = SimpleNamespace(
        layout=Layout(pipeline=3, experts=2, schedule="auto"),
        scheduler=SchedulerConfig(memory_bytes=1e12),
    )
    cut = (3, 3, 3, 3, 2, 2)
    choice = Choice(schedule="dualpipev", layers=cut, micro_batch_size=2, micro_batches=8)
    start = start_of(run.layout, phase(), remember(choice, phase=0, decided=True))
    gang = Gang()
    arranged = Arrangement(run, gang, phase(), start)
    arranged.enter(phase(number=1, micro_batches=24), 9, lambda: tmp_path)
    assert gang.told == [("enter_phase", "dualpipev")]
    # DualPipeV wants six of them.
    arranged.enter(phase(number=2, micro_batches=4), 18, lambda: tmp_path)
    assert gang.told[1:] == [("rebuild", "1f1b"), ("restore", "")]
    assert arranged.schedule.kind == "1f1b"
    assert len(arranged.choice.layers) == 3
