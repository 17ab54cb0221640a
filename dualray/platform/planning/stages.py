"""What a micro-batch costs in each pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from dualray.model.config import ModelConfig
from dualray.platform.planning.exchange import combine_bytes, dispatch_bytes, exchange_seconds
from dualray.platform.planning.hardware import Hardware
from dualray.platform.planning.kernels import COMMUNICATION_SMS, Operation, seconds
from dualray.platform.planning.precision import Precision
from dualray.platform.planning.work import (
    EXPERT_IMBALANCE,
    Batch,
    Work,
    dense_layer,
    head,
    moe_layer,
    mtp_module,
)
from dualray.schedule.simulate import Costs


@dataclass(frozen=True, kw_only=True)
class Duration:
    """Seconds that one micro-batch's work takes."""

    forward_s: float = 0.0
    input_grad_s: float = 0.0
    weight_grad_s: float = 0.0
    shared_forward_s: float = 0.0
    """The forward on the SMs that an overlapped exchange leaves."""
    shared_backward_s: float = 0.0
    """The gradients on them."""
    exchange_s: float = 0.0
    """Dispatch and combine of a forward; those of its backward take as long."""

    def __add__(self, other: Duration) -> Duration:
        return Duration(
            forward_s=self.forward_s + other.forward_s,
            input_grad_s=self.input_grad_s + other.input_grad_s,
            weight_grad_s=self.weight_grad_s + other.weight_grad_s,
            shared_forward_s=self.shared_forward_s + other.shared_forward_s,
            shared_backward_s=self.shared_backward_s + other.shared_backward_s,
            exchange_s=self.exchange_s + other.exchange_s,
        )

    @property
    def shared_s(self) -> float:
        """All three on the SMs that an overlapped exchange leaves."""
        return self.shared_forward_s + self.shared_backward_s

    @property
    def computing_s(self) -> float:
        """All three on all SMs."""
        return self.forward_s + self.input_grad_s + self.weight_grad_s

    def costs(self, hand_over_s: float) -> Costs:
        """As the simulator takes it. An exchange is hidden in overlapped pairs only, where it
        shares the network with what is handed to the neighbours, twice in a pair."""
        in_turn = self.computing_s + 2 * self.exchange_s
        overlapped = in_turn
        if self.exchange_s:
            overlapped = min(in_turn, max(self.shared_s, 2 * self.exchange_s + 2 * hand_over_s))
        return Costs(
            forward=self.forward_s + self.exchange_s,
            input_grad=self.input_grad_s + self.exchange_s,
            weight_grad=self.weight_grad_s,
            overlapped=overlapped,
        )


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Durations of what stages are made of."""

    dense_layer: Duration
    moe_layer: Duration
    last: Duration
    """What the last stage has besides its layers: head, loss and MTP modules."""

    def stages(self, model: ModelConfig, layers_per_stage: tuple[int, ...]) -> list[Duration]:
        """One duration a stage; earlier layers are in earlier stages."""
        stages, first = [], 0
        for count in layers_per_stage:
            dense = max(0, min(count, model.first_k_dense_replace - first))
            total = sum([self.dense_layer] * dense, start=Duration())
            stages.append(sum([self.moe_layer] * (count - dense), start=total))
            first += count
        stages[-1] += self.last
        return stages

    def relative(self, model: ModelConfig) -> tuple[tuple[int, ...], int]:
        """Durations of the layers and of what the last stage has besides, in overlapped pairs and
        in hundredths of the longest layer: what balances a cut, with no finer differences."""
        unit = max(self.moe_layer.shared_s, self.dense_layer.shared_s) / 100
        kinds = (self.dense_layer, self.moe_layer)
        layers = (kinds[model.is_moe(layer)] for layer in range(model.num_hidden_layers))
        return tuple(round(each.shared_s / unit) for each in layers), round(
            self.last.shared_s / unit
        )


@cache
def make_parts(
    model: ModelConfig, batch: Batch, precision: Precision, hardware: Hardware, experts: int
) -> Parts:
    """Durations of the parts of `model` on one worker of `experts` expert ranks."""
    moe = moe_layer(model, batch, precision, experts)
    last = head(model, batch)
    for _ in range(model.num_nextn_predict_layers):
        last += mtp_module(model, batch, precision, experts)
    load = 1 + EXPERT_IMBALANCE
    one_way = [
        exchange_seconds(model, hardware, experts, load * batch.num_tokens, value_bytes)
        for value_bytes in (dispatch_bytes(precision), combine_bytes(precision))
    ]

    left = hardware.num_sms - COMMUNICATION_SMS

    def duration(work: Work) -> Duration:
        return Duration(
            forward_s=total(work.forward, hardware.num_sms),
            input_grad_s=total(work.input_grad, hardware.num_sms),
            weight_grad_s=total(work.weight_grad, hardware.num_sms),
            shared_forward_s=total(work.forward, left),
            shared_backward_s=total(work.input_grad + work.weight_grad, left),
            exchange_s=work.num_exchanges * sum(one_way),
        )

    def total(operations: tuple[Operation, ...], num_sms: int) -> float:
        return sum(seconds(each, hardware, precision, num_sms) for each in operations)

    return Parts(
        dense_layer=duration(dense_layer(model, batch, precision)),
        moe_layer=duration(moe),
        last=duration(last),
    )
