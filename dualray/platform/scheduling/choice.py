"""What the scheduler decides, and what it takes as given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from dualray.errors import ConfigError
from dualray.model.config import ModelConfig
from dualray.parallel.held import split_layers
from dualray.parallel.layout import Layout
from dualray.parallel.phases import Phase
from dualray.schedule.make import make_schedule


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is decided: all of it changes what workers do when, and nothing what they compute."""

    schedule: str
    layers: tuple[int, ...]
    """Layers of each stage."""
    micro_batch_size: int
    """Sequences of a micro-batch."""
    micro_batches: int
    """Micro-batches a step of each (replica, expert rank)."""


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What no decision changes."""

    model: ModelConfig
    layout: Layout
    """Pipeline, expert ranks and replicas."""
    seq_len: int
    dtype: str
    """`train.dtype`."""
    recompute: bool
    """`train.recompute`."""
    memory_bytes: float
    """What a worker may fill; infinite if nobody says."""


def choice_of(layout: Layout, phase: Phase) -> Choice:
    """What the workers of a concrete layout do in a phase."""
    train = phase.train
    schedule = make_schedule(layout.schedule, layout.pipeline, train.micro_batches)
    layers = split_layers(phase.model.num_hidden_layers, schedule.num_stages, layout.layers)
    return Choice(
        schedule=layout.schedule,
        layers=tuple(map(len, layers)),
        micro_batch_size=train.micro_batch_size,
        micro_batches=train.micro_batches,
    )


def layout_with(layout: Layout, choice: Choice) -> Layout:
    return replace(layout, schedule=choice.schedule, layers=choice.layers)


def phase_with(phase: Phase, choice: Choice) -> Phase:
    """The same steps on the same sequences, in the choice's micro-batches."""
    train = replace(
        phase.train,
        micro_batch_size=choice.micro_batch_size,
        micro_batches=choice.micro_batches,
    )
    return replace(phase, train=train)


@dataclass(frozen=True, kw_only=True)
class Start:
    """How workers start."""

    layout: Layout
    """A concrete one."""
    choice: Choice
    decided: bool
    """Whether the scheduler has decided so, and need not measure at once."""


def remember(choice: Choice, *, phase: int, decided: bool) -> dict[str, Any]:
    """Plain data for a checkpoint; `start_of` takes it back. `phase` is the phase's number."""
    return asdict(choice) | {"phase": phase, "decided": decided}


def start_of(layout: Layout, phase: Phase, remembered: Mapping[str, Any] | None) -> Start:
    """How a run of this layout starts in `phase`.

    A layout that leaves the schedule open goes on with what a checkpoint remembers, as far as it
    fits the layout and the phase. Another phase is measured anew, as in a run that was not stopped.
    """
    own = choice_of(layout.concrete, phase)
    start = Start(layout=layout.concrete, choice=own, decided=False)
    if remembered is None or not layout.is_open:
        return start
    values = dict(remembered) | {"layers": tuple(remembered["layers"])}
    decided = values.pop("decided") and values["phase"] == phase.number
    del values["phase"]
    choice = Choice(**values)
    if layout.layers and layout.layers != choice.layers:
        return start
    if choice.micro_batches * choice.micro_batch_size != own.micro_batches * own.micro_batch_size:
        choice = replace(
            choice, micro_batch_size=own.micro_batch_size, micro_batches=own.micro_batches
        )
    try:
        found = choice_of(layout_with(layout, choice), phase_with(phase, choice))
    except ConfigError:
        return start
    return Start(layout=layout_with(layout, found), choice=found, decided=decided)
