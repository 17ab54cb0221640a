"""One layer's experts on devices, improved step by step: the local search behind placements.

The layer is as slow as its slowest device. Each step looks only at that device and takes the
better of two changes, if one helps: two slots of its node swap their experts, or a slot gives
up an expert that has further copies and takes a copy of another. Experts never leave their
node, so that a placement by groups stays one. Bounded, and without randomness.

Shape suffixes: E experts, D devices, S physical slots (device by device), C candidates.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dualray.parallel.placement import Floats, Ints

FREE = -1
"""In a slot that holds no expert yet."""

RELIEVED_EXPERTS = 2
"""Heaviest experts of the slowest device that a further copy is considered for."""
TAKEN_EXPERTS = 4
"""Lightest experts that the slowest device might take instead of a copy it holds."""
LEAST_STEP = 1e-9
"""Relative; below it a change is rounding, and the search might not end."""


class Arrangement:
    """Which expert is in which slot of one layer; load per device follows.

    An expert's load is split evenly over its copies. Times are load over speed, in whatever
    unit: only their ratios matter here.
    """

    def __init__(
        self, expert_S: Ints, load_E: Floats, device_S: Ints, speed_D: Floats, node_D: Ints
    ) -> None:
        self.expert_S = expert_S.copy()
        self.load_E, self.device_S, self.speed_D, self.node_D = load_E, device_S, speed_D, node_D
        self._count()
        # Experts never leave their nodes, so this holds for good.
        self.of_node_EN = np.stack(
            [
                (self.count_ED[:, node_D == node] > 0).any(axis=1)
                for node in range(node_D.max() + 1)
            ],
            axis=1,
        )

    @property
    def times(self) -> Floats:
        return self.load_D / self.speed_D

    def fill(self) -> None:
        """Give every free slot a copy: of the expert with most load a copy that may have one."""
        while (free_S := self.expert_S == FREE).any():
            room_D = np.bincount(self.device_S[free_S], minlength=len(self.speed_D)) > 0
            # Experts stay on their nodes; a device takes no second copy.
            at_home_ED = self.of_node_EN[:, self.node_D]
            fits_ED = room_D & at_home_ED & (self.count_ED == 0)
            wanted_E = np.where(fits_ED.any(axis=1), self.load_E / self.copies_E, -1.0)
            expert = int(wanted_E.argmax())
            assert wanted_E[expert] >= 0, "more slots than distinct experts"
            share = self.load_E[expert] / (self.copies_E[expert] + 1)
            after_D = np.where(fits_ED[expert], (self.load_D + share) / self.speed_D, np.inf)
            slot = np.flatnonzero(free_S & (self.device_S == after_D.argmin()))[0]
            self.expert_S[slot] = expert
            self._count()

    def separate(self) -> None:
        """Part two copies of one expert on one device, by the change that costs least.

        A device must have no more slots than its node has experts.
        """
        while len(slots := self._doubled()):
            slot = slots[0]
            swap, time, _ = self._best_swap(slots[:1])
            absent_C = np.flatnonzero(self._absent(int(self.device_S[slot])))
            copy, copy_time = self._best_copy(np.repeat(slot, len(absent_C)), absent_C)
            self._apply(swap if time <= copy_time else copy)

    def improve(self, *, good_enough: float, max_changes: int) -> None:
        """Change after change until the slowest device is within 1 + `good_enough` of its
        node's mean time, or nothing helps, or `max_changes` were made.
        """
        node_load_N = np.bincount(self.node_D, self.load_D)
        mean_N = node_load_N / np.bincount(self.node_D, self.speed_D)
        for _ in range(max_changes):
            slowest = int(self.times.argmax())
            limit = self.times[slowest] * (1 - LEAST_STEP)
            if limit <= mean_N[self.node_D[slowest]] * (1 + good_enough):
                return
            swap, swap_time, pair_time = self._best_swap(np.flatnonzero(self.device_S == slowest))
            if pair_time <= mean_N[self.node_D[slowest]] * (1 + good_enough):
                self._apply(swap)
                continue
            copy, copy_time = self._best_copy(*self._candidates(slowest))
            # While several devices are equally slow, a swap that relieves one is progress; a
            # changed copy must lower the whole layer's time, since it touches many devices.
            if copy_time < min(swap_time, limit):
                self._apply(copy)
            elif pair_time < limit:
                self._apply(swap)
            else:
                return

    def _count(self) -> None:
        used_S = self.expert_S != FREE
        expert_S, device_S = self.expert_S[used_S], self.device_S[used_S]
        num_experts, num_devices = len(self.load_E), len(self.speed_D)
        self.copies_E = np.bincount(expert_S, minlength=num_experts)
        pairs_S = expert_S * num_devices + device_S
        self.count_ED = np.bincount(pairs_S, minlength=num_experts * num_devices).reshape(
            num_experts, num_devices
        )
        self.load_D = np.bincount(
            device_S, self.load_E[expert_S] / self.copies_E[expert_S], minlength=num_devices
        )

    def _absent(self, device: int) -> np.ndarray:
        """Experts of the device's node that the device does not hold."""
        return self.of_node_EN[:, self.node_D[device]] & (self.count_ED[:, device] == 0)

    def _doubled(self) -> Ints:
        """Slots whose expert an earlier slot of the device holds too."""
        keys_S = self.expert_S * len(self.speed_D) + self.device_S
        _, first = np.unique(keys_S, return_index=True)
        return np.setdiff1d(np.arange(len(keys_S)), first)

    def _best_swap(self, mine_C: Ints) -> tuple[list[tuple[int, int]], float, float]:
        """The best swap of one of these slots, all on one device, with another of its node.

        Returns the change, the layer's time after it, and that of the slower of the two devices.
        """
        device = self.device_S[mine_C[0]]
        other_S = (self.node_D[self.device_S] == self.node_D[device]) & (self.device_S != device)
        others_C = np.flatnonzero(other_S)
        if not len(others_C):
            return [], np.inf, np.inf
        mine, theirs = self.expert_S[mine_C], self.expert_S[others_C]
        their_device = self.device_S[others_C]
        share_E = self.load_E / self.copies_E
        gained_CC = share_E[theirs] - share_E[mine][:, None]
        pair_CC = np.maximum(
            (self.load_D[device] + gained_CC) / self.speed_D[device],
            (self.load_D[their_device] - gained_CC) / self.speed_D[their_device],
        )
        doubled_CC = (self.count_ED[theirs, device] > 0) | (
            self.count_ED[mine[:, None], their_device] > 0
        )
        pair_CC[doubled_CC] = np.inf
        row, column = np.unravel_index(pair_CC.argmin(), pair_CC.shape)
        time_D = self.times
        time_D[[device, their_device[column]]] = 0.0
        pair_time = float(pair_CC[row, column])
        change = [(int(mine_C[row]), int(theirs[column])), (int(others_C[column]), int(mine[row]))]
        return change, max(pair_time, float(time_D.max())), pair_time

    def _candidates(self, slowest: int) -> tuple[Ints, Ints]:
        """(slot, expert) pairs: a slot of a copied expert, and which it might hold instead."""
        spare_S = self.copies_E[self.expert_S] > 1
        if not spare_S.any():
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        slots, experts = zip(*self._pairs(slowest, spare_S))
        return np.concatenate(slots), np.concatenate(experts)

    def _pairs(self, slowest: int, spare_S: np.ndarray) -> Iterator[tuple[Ints, Ints]]:
        elsewhere_S = spare_S & (self.device_S != slowest)
        elsewhere_S &= self.node_D[self.device_S] == self.node_D[slowest]
        slots = np.flatnonzero(elsewhere_S)
        on_it = self.expert_S[self.device_S == slowest]
        share = self.load_E[on_it] / self.copies_E[on_it]
        for expert in on_it[np.argsort(-share, kind="stable")[:RELIEVED_EXPERTS]]:
            fits = slots[self.count_ED[expert, self.device_S[slots]] == 0]
            yield fits, np.repeat(expert, len(fits))
        slots = np.flatnonzero(spare_S & (self.device_S == slowest))
        absent = np.flatnonzero(self._absent(slowest))
        share = self.load_E[absent] / (self.copies_E[absent] + 1)
        lightest = absent[np.argsort(share, kind="stable")[:TAKEN_EXPERTS]]
        yield np.repeat(slots, len(lightest)), np.tile(lightest, len(slots))

    def _best_copy(self, slot_C: Ints, taken_C: Ints) -> tuple[list[tuple[int, int]], float]:
        """The best of these changes of a slot's expert, and the layer's time after it."""
        if not len(slot_C):
            return [], np.inf
        given_C, device_C = self.expert_S[slot_C], self.device_S[slot_C]
        given, more = self.load_E[given_C], self.copies_E[given_C]
        taken, fewer = self.load_E[taken_C], self.copies_E[taken_C]
        rise_C, fall_C = given / (more - 1) - given / more, taken / fewer - taken / (fewer + 1)
        load_CD = (
            self.load_D
            + rise_C[:, None] * self.count_ED[given_C]
            - fall_C[:, None] * self.count_ED[taken_C]
        )
        load_CD[np.arange(len(slot_C)), device_C] += taken / (fewer + 1) - given / (more - 1)
        time_C = (load_CD / self.speed_D).max(axis=1)
        best = int(time_C.argmin())
        return [(int(slot_C[best]), int(taken_C[best]))], float(time_C[best])

    def _apply(self, change: list[tuple[int, int]]) -> None:
        for slot, expert in change:
            self.expert_S[slot] = expert
        self._count()
