"""All layouts that a cluster and a batch admit, those that memory admits, and the fastest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from dualray.errors import ConfigError
from dualray.platform.planning.estimate import Estimate, estimate
from dualray.platform.planning.fit import Fit, make_fit, outline
from dualray.platform.planning.memory import least_bytes
from dualray.platform.planning.setting import Candidate, Setting
from dualray.platform.planning.split import balanced_split
from dualray.platform.planning.stages import make_parts
from dualray.schedule.make import KINDS, make_schedule

# Sequences of a micro-batch that are tried; more only take memory.
MICRO_BATCH_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """What a search found."""

    estimates: tuple[Estimate, ...]
    """The fastest layouts, the fastest first."""
    num_possible: int
    """Layouts that divide model, cluster and batch."""
    num_fitting: int
    """Of them, those that fit into memory."""


def rank(setting: Setting, most: int) -> Ranking:
    """The `most` fastest layouts that fit into memory; none if none fits.

    No step is shorter than its busiest rank's work, so layouts are simulated in the order of
    that bound, until none that is left can be among the fastest.
    """
    possible = list(candidates(setting))
    size = setting.cluster.hardware.memory_bytes
    fits = (planned(setting, each) for each in possible if least_bytes(setting, each) <= size)
    fitting = sorted((fit for fit in fits if fit.is_within(setting)), key=lambda f: f.shortest_s)
    found: list[Estimate] = []
    for fit in fitting:
        if len(found) == most and fit.shortest_s >= found[-1].step_s:
            break
        found = sorted([*found, estimate(setting, fit)], key=lambda each: each.step_s)[:most]
    return Ranking(estimates=tuple(found), num_possible=len(possible), num_fitting=len(fitting))


def candidates(setting: Setting) -> Iterator[Candidate]:
    """Layouts of the whole cluster whose step has exactly the setting's sequences.

    Expert ranks divide the experts, and divide a node or fill several.
    """
    model, gpus = setting.model, setting.cluster.num_gpus
    node = setting.cluster.hardware.gpus_per_node
    for pipeline in _divisors(gpus, model.num_hidden_layers):
        for experts in _divisors(gpus // pipeline, model.n_routed_experts):
            if model.n_routed_experts % experts or (node % experts and experts % node):
                continue
            replicas = gpus // pipeline // experts
            for size in MICRO_BATCH_SIZES:
                micro_batches, rest = divmod(setting.num_sequences, replicas * experts * size)
                if rest or not micro_batches:
                    continue
                for kind in KINDS:
                    uncut = Candidate(
                        pipeline=pipeline,
                        experts=experts,
                        replicas=replicas,
                        schedule=kind,
                        micro_batch_size=size,
                        micro_batches=micro_batches,
                    )
                    if exists(setting, uncut):
                        yield uncut


def exists(setting: Setting, candidate: Candidate) -> bool:
    """Whether its schedule is defined and every stage gets a layer."""
    kind, pipeline, count = candidate.schedule, candidate.pipeline, candidate.micro_batches
    # The rules ask for a number and a parity, so a short schedule tells for a long one.
    count = min(count, 2 * pipeline + count % 2)
    return _is_made(kind, pipeline, count) and (
        outline(kind, pipeline).num_stages <= setting.model.num_hidden_layers
    )


def planned(setting: Setting, candidate: Candidate) -> Fit:
    """A candidate with its figures; its layers are cut as evenly as they cost, if they are not
    cut already."""
    parts = make_parts(
        setting.model,
        candidate.batch(setting.seq_len),
        setting.precision,
        setting.cluster.hardware,
        candidate.experts,
    )
    if not candidate.layers_per_stage:
        stages = outline(candidate.schedule, candidate.pipeline)
        split = balanced_split(
            *parts.relative(setting.model),
            stages.num_stages,
            paired=stages.num_directions == 2,
        )
        candidate = replace(candidate, layers_per_stage=split)
    return make_fit(setting, candidate, parts)


@cache
def _is_made(schedule: str, pipeline: int, micro_batches: int) -> bool:
    try:
        make_schedule(schedule, pipeline, micro_batches)
    except ConfigError:
        return False
    return True


def _divisors(number: int, most: int) -> list[int]:
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]
