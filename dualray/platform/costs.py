"""What each kind of step costs each stage, measured: the numbers that schedules are chosen by.

A step's spans say how long every action took on every worker. Of one worker the median counts,
so that a hiccup does not; of the workers at one pipeline rank the slowest, since the others
wait for it in every exchange; and a stage that two ranks hold, as under DualPipe, is their mean.

No schedule has every kind of step. What was not seen is filled in:

- I and W of a stage that only has full backwards share its B as they share I + W in the stages
  that have both, and evenly if none has.
- Where B, I and W were all seen, I and W are scaled together so that, with B = I + W, the stage
  has as much work as was measured.
- A pair saves a stage what the pairs that it takes part in saved on average. If it is in none, it
  saves what the other stages save on average, and nothing if nobody pairs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from statistics import fmean, median

from dualray.schedule.actions import Action, Kind, Overlap, Schedule, Step
from dualray.schedule.exchanges import Exchanges
from dualray.schedule.simulate import Costs

StepTime = tuple[str, float]
"""(text of a step, as its span is named; its duration): `F0.3`, `W`, `F0.3&B1.2`."""

StepSpan = tuple[str, float, float]
"""(text of a step, its start, its end), on a clock that all workers share."""

_Solo = tuple[int, Kind]
"""(stage, kind)."""
_Pair = tuple[int, int]
"""(stage of the forward, stage of the backward)."""


def measured_costs(
    times: Sequence[Sequence[Sequence[StepTime]]], schedule: Schedule
) -> tuple[Costs, ...]:
    """The costs of every stage of `schedule`, in the unit of `times`.

    `times[rank]` has a list for each worker at that pipeline rank: its steps in the order in
    which it did them, over one walk of `schedule` or several.
    """
    solos: defaultdict[_Solo, list[float]] = defaultdict(list)
    pairs: defaultdict[_Pair, list[float]] = defaultdict(list)
    counts: Counter[_Solo] = Counter()
    for rank, workers in enumerate(times):
        stages = schedule.stage_of[rank]
        steps = schedule.steps[rank]
        slowest: defaultdict[_Solo | _Pair, float] = defaultdict(float)
        for worker in workers:
            durations: defaultdict[_Solo | _Pair, list[float]] = defaultdict(list)
            done = _matched([text for text, _ in worker], steps)
            for (_, step), (_, duration) in zip(done, worker):
                durations[_key(step, stages)].append(duration)
            for key, values in durations.items():
                slowest[key] = max(slowest[key], median(values))
        for step in steps:
            if isinstance(step, Action):
                counts[stages[step.direction], step.kind] += 1
        for key, duration in slowest.items():
            if isinstance(key[1], Kind):
                solos[key[0], key[1]].append(duration)
            else:
                pairs[key[0], key[1]].append(duration)
    alone = {key: fmean(values) for key, values in solos.items()}
    share = _input_share(alone)
    costs = [_without_pairs(stage, alone, counts, share) for stage in range(schedule.num_stages)]
    return _with_pairs(costs, {key: fmean(values) for key, values in pairs.items()})


def measured_exchange(walks: Sequence[Sequence[Sequence[StepSpan]]], schedule: Schedule) -> float:
    """How long a message between pipeline ranks takes, as far as somebody waited for it.

    `walks[rank]` has a list for each worker at that pipeline rank, with one walk of `schedule`;
    workers at the same place of their lists send to each other. 0 where nobody waited. Clocks of
    two nodes that differ cancel where both ways are waited for: what the one seems to take
    longer, the other seems to take less.
    """
    exchanges = Exchanges(schedule)
    made_at = {
        message: (rank, index)
        for rank, makes in enumerate(exchanges.makes)
        for index, made in enumerate(makes)
        for message in made
    }
    delays: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
    for workers in zip(*walks, strict=True):
        times = [_times(worker, steps) for worker, steps in zip(workers, schedule.steps)]
        for rank, takes in enumerate(exchanges.takes):
            for index, taken in enumerate(takes):
                makers = [made_at[message] for message in taken]
                # What a pair sends leaves somewhere in its middle, so its end tells nothing.
                if not makers or any(
                    maker == rank or isinstance(schedule.steps[maker][at], Overlap)
                    for maker, at in makers
                ):
                    continue
                sent, source = max((times[maker][at][1], maker) for maker, at in makers)
                if index == 0 or times[rank][index - 1][1] < sent:
                    delays[source, rank].append(times[rank][index][0] - sent)
    return max(0.0, fmean(map(median, delays.values()))) if delays else 0.0


def _times(walk: Sequence[StepSpan], steps: Sequence[Step]) -> list[tuple[float, float]]:
    """When each step of one walk started and ended, a pair's halves together."""
    times: dict[int, tuple[float, float]] = {}
    for (index, _), (_, start, end) in zip(_matched([text for text, _, _ in walk], steps), walk):
        times[index] = (times[index][0] if index in times else start, end)
    return [times[index] for index in range(len(steps))]


def _matched(texts: Sequence[str], steps: Sequence[Step]) -> Iterator[tuple[int, Step]]:
    """What each text stands for, when a rank has walked `steps` once or several times.

    Yields the number of the step, and the step itself or a half of it: a pair that ran as its
    halves, one after the other, is found here, and the W's are told apart.
    """
    done = 0
    while done < len(texts):
        for index, step in enumerate(steps):
            halves: tuple[Step, ...] = (step,)
            if isinstance(step, Overlap) and texts[done : done + 1] != [str(step)]:
                halves = (step.forward, step.backward)
            for half in halves:
                found = texts[done] if done < len(texts) else "nothing"
                assert found == str(half), f"{found} was done where the schedule has {half}"
                done += 1
                yield index, half


def _key(step: Step, stages: tuple[int, ...]) -> _Solo | _Pair:
    if isinstance(step, Overlap):
        return stages[step.forward.direction], stages[step.backward.direction]
    return stages[step.direction], step.kind


def _input_share(alone: dict[_Solo, float]) -> float:
    """I's part of I + W over the stages that were seen to do both; half without any."""
    split = [stage for stage, kind in alone if kind is Kind.WEIGHT_GRAD]
    inputs = sum(alone[stage, Kind.INPUT_GRAD] for stage in split)
    weights = sum(alone[stage, Kind.WEIGHT_GRAD] for stage in split)
    return inputs / (inputs + weights) if split else 0.5


def _without_pairs(
    stage: int, alone: dict[_Solo, float], counts: Counter[_Solo], input_share: float
) -> Costs:
    """A stage's costs before it is known what pairs save it."""
    forward = alone[stage, Kind.FORWARD]
    whole = alone.get((stage, Kind.BACKWARD))
    if (stage, Kind.INPUT_GRAD) not in alone:
        assert whole is not None, f"stage {stage} has no backward of its own"
        input_grad, weight_grad = whole * input_share, whole * (1.0 - input_share)
    else:
        input_grad, weight_grad = alone[stage, Kind.INPUT_GRAD], alone[stage, Kind.WEIGHT_GRAD]
        if whole is not None:
            num_whole, num_split = counts[stage, Kind.BACKWARD], counts[stage, Kind.INPUT_GRAD]
            parts = input_grad + weight_grad
            measured = num_whole * whole + num_split * parts
            scale = measured / ((num_whole + num_split) * parts)
            input_grad, weight_grad = scale * input_grad, scale * weight_grad
    return Costs(
        forward=forward,
        input_grad=input_grad,
        weight_grad=weight_grad,
        overlapped=forward + input_grad + weight_grad,
    )


def _with_pairs(costs: Sequence[Costs], pairs: dict[_Pair, float]) -> tuple[Costs, ...]:
    savings: defaultdict[int, list[float]] = defaultdict(list)
    for (forward, backward), duration in pairs.items():
        saving = costs[forward].forward + costs[backward].backward - duration
        for stage in {forward, backward}:
            savings[stage].append(saving)
    everywhere = fmean(fmean(values) for values in savings.values()) if savings else 0.0
    result = []
    for stage, cost in enumerate(costs):
        saving = fmean(savings[stage]) if stage in savings else everywhere
        # The longer half is never hidden, whatever the clock says of so few pairs.
        saving = min(saving, cost.forward, cost.backward)
        result.append(
            Costs(
                forward=cost.forward,
                input_grad=cost.input_grad,
                weight_grad=cost.weight_grad,
                overlapped=cost.forward + cost.backward - saving,
            )
        )
    return tuple(result)
