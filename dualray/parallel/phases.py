"""A run's phases: stretches of steps with one model configuration and one training recipe.

The first phase is section `train`; section `extend` adds phases at longer sequences, as
DeepSeek-V3 was extended from 4K to 32K and then to 128K tokens (arXiv 2412.19437, section
4.3): YaRN at its final factor from the first of them on, a small constant learning rate.
Weights, optimizer moments and router biases go on from phase to phase; positions, sequence
length, batch and learning rate change. Phases are plain data, computed from the run file
alone, so that a step's phase is known wherever its number is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dualray.errors import ConfigError
from dualray.model.config import ModelConfig, YarnConfig
from dualray.parallel.layout import Layout
from dualray.parallel.train_config import TrainConfig
from dualray.schedule.make import make_schedule


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One entry of `extend.phases`: fields of section `train` that the phase changes."""

    steps: int
    """Optimizer steps of the phase."""
    seq_len: int
    """Tokens per sequence; not below the phase before, at most what YaRN reaches."""
    lr: float
    """Learning rate (V3 used 7.3e-6, the one its training had ended with)."""
    min_lr: float | None = None
    """Learning rate at the end of a cosine; None keeps `lr` constant, as V3 did."""
    warmup_steps: int = 0
    """Steps of linear warm-up at the phase's beginning."""
    micro_batch_size: int | None = None
    """Sequences per micro-batch; None takes train.micro_batch_size."""
    micro_batches: int | None = None
    """Micro-batches per step and (replica, expert rank); None takes train.micro_batches."""
    gamma: float | None = None
    """Step of the router biases (V3: 0 at the end of its training); None takes train.gamma."""


@dataclass(frozen=True, kw_only=True)
class ExtendConfig:
    """Section `extend` of a run file: further training at longer contexts, after train.steps."""

    rope_scaling: YarnConfig | None = None
    """YaRN of all the phases; original_max_position_embeddings is model.max_position_embeddings
    if left out. None takes model.rope_scaling."""
    phases: tuple[PhaseConfig, ...]
    """The phases in their order, sequences growing."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Steps [first_step, first_step + train.steps) of a run, counted from 0."""

    number: int
    """0 for section `train`, 1 for the first of extend.phases."""
    first_step: int
    """Optimizer steps of the run before this phase."""
    tokens_before: int
    """Tokens trained on before this phase."""
    model: ModelConfig
    train: TrainConfig
    """Section `train` with the phase's changes; `steps` are the phase's own."""

    @property
    def end_step(self) -> int:
        """Optimizer steps done when the phase is over."""
        return self.first_step + self.train.steps

    @property
    def first_sample(self) -> int:
        """Where the corpus, cut into this phase's windows, goes on behind the tokens before."""
        return -(-self.tokens_before // self.train.seq_len)

    @property
    def section(self) -> str:
        """What the phase is called in the run file."""
        return _name(self.number) if self.number else "train"

    def tokens_per_step(self, layout: Layout) -> int:
        return self.train.global_sequences(layout) * self.train.seq_len


def plan_phases(
    model: ModelConfig, train: TrainConfig, layout: Layout, extend: ExtendConfig | None
) -> tuple[Phase, ...]:
    """The phases that have steps, in order.

    Raises ConfigError naming the field of section `extend` that does not fit the others.
    """
    phases = [Phase(number=0, first_step=0, tokens_before=0, model=model, train=train)]
    if extend is not None:
        if not extend.phases:
            raise ConfigError(
                "extend.phases is empty and must have at least one phase",
                hint="give steps, seq_len and lr of one, or remove section extend",
            )
        extended = _extended(model, train, extend)
        for number, changes in enumerate(extend.phases, start=1):
            last = phases[-1]
            phases.append(
                Phase(
                    number=number,
                    first_step=last.end_step,
                    tokens_before=last.tokens_before
                    + last.train.steps * last.tokens_per_step(layout),
                    model=extended,
                    train=_train_of(train, changes, layout, last.end_step, number),
                )
            )
            _refuse_length(phases, last if last.train.steps else None)
    return tuple(phase for phase in phases if phase.train.steps)


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """The phase of step `step`, counted from 0; the last one's past the end."""
    for phase in phases:
        if step < phase.end_step:
            return phase
    return phases[-1]


def phase_behind(phases: Sequence[Phase], steps_done: int) -> Phase:
    """The phase whose step was the last of `steps_done`: that of a checkpoint's weights."""
    return phase_at(phases, max(steps_done - 1, 0))


def _extended(model: ModelConfig, train: TrainConfig, extend: ExtendConfig) -> ModelConfig:
    """The model of the phases: with YaRN, and as long as YaRN reaches."""
    yarn = model.rope_scaling if extend.rope_scaling is None else extend.rope_scaling
    if yarn is None:
        raise ConfigError(
            "extend.rope_scaling is missing and the model has none",
            hint="set extend.rope_scaling.factor to how many times longer the context becomes",
        )
    if model.rope_scaling is not None and yarn != model.rope_scaling:
        raise ConfigError(
            "extend.rope_scaling differs from model.rope_scaling, and a model is extended once",
            hint="leave extend.rope_scaling out to train on with the model's",
        )
    original, context = yarn.original_max_position_embeddings, reach(yarn)
    if original > model.max_position_embeddings:
        raise ConfigError(
            f"extend.rope_scaling.original_max_position_embeddings {original} exceeds "
            f"model.max_position_embeddings {model.max_position_embeddings}",
            hint="set it to the context that the model was trained with",
        )
    if model.rope_scaling is None and train.steps and train.seq_len > original:
        raise ConfigError(
            f"extend.rope_scaling.original_max_position_embeddings {original} is below "
            f"train.seq_len {train.seq_len}",
            hint="set it to the context that the model was trained with",
        )
    if context < model.max_position_embeddings:
        raise ConfigError(
            f"extend.rope_scaling reaches {original} x {yarn.factor:g} = {context} tokens and "
            f"model.max_position_embeddings is {model.max_position_embeddings} already",
            hint="raise extend.rope_scaling.factor",
        )
    return replace(model, rope_scaling=yarn, max_position_embeddings=context)


def reach(yarn: YarnConfig) -> int:
    """Tokens of context that YaRN's factor gives."""
    return round(yarn.original_max_position_embeddings * yarn.factor)


def _train_of(
    train: TrainConfig, changes: PhaseConfig, layout: Layout, first_step: int, number: int
) -> TrainConfig:
    """Section `train` with a phase's changes; sentences name the phase's fields."""
    if changes.steps < 1:
        raise ConfigError(
            f"{_name(number)}.steps is {changes.steps} and must be at least 1",
            hint="remove the phase, or set its steps to 1 or more",
        )
    given: dict[str, Any] = {"min_lr": changes.lr}
    given |= {field: value for field, value in vars(changes).items() if value is not None}
    _refuse_gamma(train, changes, first_step, number)
    try:
        changed = replace(train, **given)
        make_schedule(layout.schedule, layout.pipeline, changed.micro_batches)
    except ConfigError as error:
        raise ConfigError(
            error.sentence.replace("train.", f"{_name(number)}."),
            hint=error.hint.replace("train.", f"{_name(number)}."),
        ) from None
    return changed


def _refuse_gamma(train: TrainConfig, changes: PhaseConfig, first_step: int, number: int) -> None:
    """A phase may not give a gamma that moves nothing."""
    if not changes.gamma:
        return
    if not train.moves_biases:
        raise ConfigError(
            f"{_name(number)}.gamma is {changes.gamma} and train.balance {train.balance} moves no "
            "biases",
            hint=f"remove {_name(number)}.gamma, or set train.balance to bias",
        )
    if train.gamma_steps is not None and train.gamma_steps <= first_step:
        raise ConfigError(
            f"{_name(number)}.gamma is {changes.gamma} and biases are frozen after "
            f"train.gamma_steps = {train.gamma_steps}, before the phase's step {first_step + 1}",
            hint=f"remove {_name(number)}.gamma, or raise train.gamma_steps",
        )


def _refuse_length(phases: Sequence[Phase], before: Phase | None) -> None:
    phase = phases[-1]
    length, context = phase.train.seq_len, phase.model.max_position_embeddings
    if length > context:
        raise ConfigError(
            f"{_name(phase.number)}.seq_len {length} exceeds the {context} tokens that "
            "rope_scaling reaches",
            hint="shorten the sequences or raise extend.rope_scaling.factor",
        )
    if before is not None and length < before.train.seq_len:
        raise ConfigError(
            f"{_name(phase.number)}.seq_len {length} is below the {before.train.seq_len} of the "
            "phase before it",
            hint="order the phases from short sequences to long ones",
        )


def _name(number: int) -> str:
    return f"extend.phases.{number - 1}"
