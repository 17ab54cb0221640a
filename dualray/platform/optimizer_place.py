"""Where the optimizer state of a run is while it does not train, and how it comes back."""

from __future__ import annotations

from dualray.actors.gang import Gang
from dualray.checkpoint.manifest import DamagedError
from dualray.checkpoint.store import verify
from dualray.parallel.state_place import StateBytes, StatePlace
from dualray.platform.training import Training


class OptimizerPlace:
    """Puts optimizer state where `serve.optimizer` says, once between two stretches of training."""

    def __init__(self, wanted: StatePlace, gang: Gang, training: Training) -> None:
        self._wanted, self._gang, self._training = wanted, gang, training
        self.place: StatePlace | None = None
        """Where it is while it is away; None in training and until workers first serve."""
        self.sizes: list[StateBytes] = []
        """By worker, while it is away."""

    @property
    def is_dropped(self) -> bool:
        return self.place is StatePlace.DROP

    def put_away(self) -> None:
        """Nothing happens if it is away already. What is to be dropped is committed before."""
        if self.place is not None:
            return
        if self._wanted is StatePlace.DROP:
            self._training.commit()
        self.sizes = self._gang.call("put_state_away", str(self._wanted))
        self.place = self._wanted

    def bring_back(self) -> StatePlace:
        """Let the workers hold what the last step left; says where it was."""
        place = self.place or StatePlace.KEEP
        if self.place is not None:
            self._gang.call("bring_state_back")
        if self.is_dropped:
            checkpoint = self._training.last_checkpoint
            self._gang.call("restore", str(checkpoint), self._training.steps_done)
        self.place, self.sizes = None, []
        return place

    def can_come_back(self) -> bool:
        """Unless it was dropped, and the checkpoint of that very step is not whole any more."""
        if not self.is_dropped:
            return True
        checkpoint = self._training.last_checkpoint
        if checkpoint is None or not self._training.is_committed:
            return False
        try:
            verify(checkpoint)
        except DamagedError:
            return False
        return True
