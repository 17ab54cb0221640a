"""DualPipe's published exchange, written out by hand, on what our generators make.

The twin of `blocking`, with stricter batches: what a rank has put off is issued together and
all of it awaited before each compute, and a transfer ends when both sides have issued it. The
rank program below is written from the published steps with their receives and sends, not from
ours, so it also checks the order of every compute.
"""

from collections import defaultdict

import pytest

from dualray.schedule.actions import Kind, flatten
from dualray.schedule.dualpipe import dualpipe
from dualray.schedule.dualpipev import dualpipev


class Program:
    """One rank's computes, each with the transfers that are awaited before it.

    A transfer is (kind, sender's rank, sender's direction, micro-batch), the same on both sides.
    """

    def __init__(self, schedule, rank, near, far):
        self.schedule, self.rank = schedule, rank
        self.directions = near, far
        self.pending, self.batches, self.computes = [], [], []
        self.counts = defaultdict(int)

    def _next(self, what, kind, which):
        number = self.counts[what, kind, which]
        self.counts[what, kind, which] += 1
        return number

    def _peer(self, kind, which, *, receiving):
        up = (kind == "F") == receiving
        neighbour = self.schedule.upstream if up else self.schedule.downstream
        return neighbour(self.rank, self.directions[which])

    def receive(self, *transfers):
        for kind, which in transfers:
            peer, number = (
                self._peer(kind, which, receiving=True),
                self._next("receive", kind, which),
            )
            if peer is not None and peer[0] != self.rank:
                self.pending.append((kind, *peer, number))

    def send(self, *transfers):
        for kind, which in transfers:
            peer, number = (
                self._peer(kind, which, receiving=False),
                self._next("send", kind, which),
            )
            if peer is not None and peer[0] != self.rank:
                self.pending.append((kind, self.rank, self.directions[which], number))

    def compute(self, *actions):
        self.batches.append(self.pending)
        self.pending = []
        for kind, which in actions:
            number = None if kind == "W" else self._next("compute", kind.replace("I", "B"), which)
            self.computes.append((kind, None if kind == "W" else self.directions[which], number))

    def whole(self, *actions):
        """Receive, compute, send."""
        transfers = [(kind.replace("I", "B"), which) for kind, which in actions]
        self.receive(*transfers)
        self.compute(*actions)
        self.send(*transfers)


F0, F1, B0, B1, I0, I1, W = ("F", 0), ("F", 1), ("B", 0), ("B", 1), ("I", 0), ("I", 1), ("W", 0)


def published(schedule, rank, near, far, *, r, h, chunks, turns):
    """`chunks` in each direction; 0 is the near direction and 1 the far one."""
    p = Program(schedule, rank, near, far)
    for _ in range(2 * (h - r - 1)):
        p.whole(F0)
    p.receive(F0)
    for i in range(r + 1):
        p.compute(F0)
        if turns:
            p.send(F0)
        p.receive(F0)
        p.receive(F1)
        p.compute(F1)
        if not (turns and i == r):
            p.send(F1)
        if not turns:
            p.send(F0)
    for _ in range(h - r - 1):
        p.whole(I1)
        p.receive(F1)
        p.compute(W)
        p.compute(F1)
        p.send(F1)
    for i in range(chunks - 2 * h + r + 1):
        if i == 0 and turns:
            p.compute(F0)
            p.send(F1)
            p.receive(B1)
            p.compute(B1)
            p.send(F0, B1)
        elif i == 0:
            p.receive(B1)
            p.compute(F0, B1)
            p.send(F0, B1)
        else:
            p.whole(F0, B1)
        p.whole(F1, B0)
    for _ in range(h - r - 1):
        p.whole(B1)
        p.whole(F1, B0)
    splits = False
    for i in range(r + 1):
        splits = splits or (i == (r + 1) // 2 and r % 2 == 1)
        p.whole(I1 if splits else B1)
        splits = splits or (i == (r + 1) // 2 and r % 2 == 0)
        p.whole(I0 if splits else B0)
    for _ in range(h - r - 1):
        p.compute(W)
        p.whole(I0)
    for _ in range(r + 1):
        p.compute(W)
    p.compute()
    return p


def programs_of(schedule):
    ranks = schedule.num_ranks
    for rank in range(ranks):
        if schedule.kind == "dualpipev":
            sides = {"near": 0, "far": 1, "r": rank, "h": ranks, "turns": rank == ranks - 1}
        else:
            near, r = (0, rank) if rank < ranks // 2 else (1, ranks - 1 - rank)
            sides = {"near": near, "far": 1 - near, "r": r, "h": ranks // 2}
            sides["turns"] = r == ranks // 2 - 1
        yield published(schedule, rank, **sides, chunks=schedule.micro_batches_of(0))


SCHEDULES = [
    *(dualpipe(ranks, 2 * ranks + extra) for ranks in range(2, 17, 2) for extra in (0, 2, 10)),
    *(dualpipev(ranks, 2 * ranks + extra) for ranks in range(1, 17) for extra in (0, 1, 8)),
]


@pytest.mark.parametrize(
    "schedule", SCHEDULES, ids=lambda s: f"{s.kind}-{s.num_ranks}-{s.num_micro_batches}"
)
def test_same_order_and_no_deadlock(schedule):
    programs = list(programs_of(schedule))
    for steps, program in zip(schedule.steps, programs):
        assert program.computes == [
            ("W", None, None)
            if action.kind is Kind.WEIGHT_GRAD
            else (action.kind.value, action.direction, action.micro_batch)
            for action in flatten(steps)
        ]
    issued = defaultdict(int)
    position = [-1] * len(programs)
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            at = position[rank]
            if at == len(program.batches):
                continue
            if at < 0 or all(issued[transfer] == 2 for transfer in program.batches[at]):
                position[rank] += 1
                moved = True
                if position[rank] < len(program.batches):
                    for transfer in program.batches[position[rank]]:
                        issued[transfer] += 1
    assert position == [len(program.batches) for program in programs]
    assert set(issued.values()) <= {2}
