"""Proof that a schedule needs no buffered sends.

The execution model is stricter than the executor's. For every channel a rank keeps exactly one
receive posted, that of the message it takes next; the step that takes the message posts the
following one. A send completes when its receive is posted and not before: nothing is stored
on the way. Before each step a rank waits for everything it has sent so far and for all the
messages that the step takes, together. So no rank is ever more than one message ahead in a
channel.

The one receive posted early is needed. With receives posted only by the steps that take them,
1F1B would still run, but each middle rank of DualPipe would wait, before its first backward,
to hand over a forward that the other one takes after its own first backward. The published
implementation posts some receives early and holds back some sends, each chosen by hand; one
receive a channel is a rule for every schedule.
"""

from __future__ import annotations

from dualray.schedule.actions import Schedule
from dualray.schedule.exchanges import Exchanges, Message, ScheduleError, in_order

_Event = tuple[str, Message]


def check_blocking(schedule: Schedule) -> None:
    """Raises ScheduleError where blocking sends deadlock; channels must agree on their order."""
    exchanges = Exchanges(schedule)
    before = _previous_in_channel(exchanges)
    needs: list[list[list[_Event]]] = []
    gives: list[list[list[_Event]]] = []
    for takes, makes in zip(exchanges.takes, exchanges.makes):
        # Earlier sends than the last step's were waited for before that step.
        sending = [[], *makes[:-1]]
        needs.append(
            [
                [("sent", message) for message in taken]
                + [("taken", before[message]) for message in sent if message in before]
                for taken, sent in zip(takes, sending)
            ]
        )
        gives.append(
            [
                [("sent", message) for message in made] + [("taken", message) for message in taken]
                for taken, made in zip(takes, makes)
            ]
        )
    try:
        for _ in in_order(schedule, needs, gives):
            pass
    except ScheduleError as deadlock:
        raise ScheduleError(f"{deadlock}, if sends block") from None


def _previous_in_channel(exchanges: Exchanges) -> dict[Message, Message]:
    """What must be taken before a message's receive is posted; none before a channel's first."""
    takers = {
        message: rank
        for rank, steps in enumerate(exchanges.takes)
        for taken in steps
        for message in taken
    }
    before: dict[Message, Message] = {}
    latest: dict[tuple[bool, int, int], Message] = {}
    for rank, steps in enumerate(exchanges.makes):
        for made in steps:
            for message in made:
                if takers[message] == rank:
                    continue
                channel = message[:3]
                if channel in latest:
                    before[message] = latest[channel]
                latest[channel] = message
    return before
