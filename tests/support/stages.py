"""The whole model in stages, and what carries hidden states between them in one process."""

from __future__ import annotations

from support.models import whole_model

from dualray.model.init import logical_tensors
from dualray.model.stage import Stage


def split_stages(config, num_stages) -> list[Stage]:
    """The stages of the whole model, with its very values."""
    whole = logical_tensors(whole_model(config))
    per_stage = config.num_hidden_layers // num_stages
    stages = []
    for i in range(num_stages):
        stage = Stage(config, range(i * per_stage, (i + 1) * per_stage))
        for name, view in logical_tensors(stage).items():
            view.copy_(whole[name])
        stages.append(stage)
    return stages


class Mailbox:
    """Transport between two workers walked in turn: what was sent waits until it is fetched."""

    def __init__(self):
        self.boxes = {}

    def send(self, direction, hidden_TD):
        assert direction not in self.boxes
        self.boxes[direction] = hidden_TD

    def receive(self, direction, shape, dtype):
        hidden = self.boxes.pop(direction)
        assert (tuple(hidden.shape), hidden.dtype) == (shape, dtype)
        return hidden

    def drain(self):
        pass
