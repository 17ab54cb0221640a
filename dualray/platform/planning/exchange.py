"""How far a token's experts lie apart, and what sending it to them takes.

Expert ranks fill a node before they go on to the next. A token crosses the network once for each
other node that it reaches and is handed on over NVLink to the GPUs there (arXiv 2412.19437,
3.2.2), both at the same time, so an exchange takes as long as the slower of them.
"""

from __future__ import annotations

from functools import cache
from math import comb

from dualray.model.config import ModelConfig
from dualray.platform.planning.hardware import Hardware
from dualray.platform.planning.precision import Precision


def reach(model: ModelConfig, num_ranks: int, num_bins: int) -> float:
    """Mean number of `num_bins` equal shares of `num_ranks` expert ranks that a token visits.

    Experts are chosen evenly: `topk_group` of `n_group` groups, then `num_experts_per_tok` of
    their experts. Bins are unions or parts of groups; else groups are left out of account.
    """
    assert num_ranks % num_bins == 0, (num_ranks, num_bins)
    E, K = model.n_routed_experts, model.num_experts_per_tok
    if num_bins % model.n_group and model.n_group % num_bins:
        return num_bins * _hit(E, E // num_bins, K)
    return _grouped_reach(E, K, model.n_group, model.topk_group, num_bins)


@cache
def _grouped_reach(E: int, K: int, groups: int, chosen: int, num_bins: int) -> float:
    eligible, size = chosen * E // groups, E // groups
    if num_bins >= groups:
        share = E // num_bins
        return num_bins * chosen / groups * _hit(eligible, share, K)
    per_bin = groups // num_bins
    mean = 0.0
    for inside in range(min(per_bin, chosen) + 1):
        ways = comb(per_bin, inside) * comb(groups - per_bin, chosen - inside)
        mean += ways / comb(groups, chosen) * _hit(eligible, inside * size, K)
    return num_bins * mean


def _hit(experts: int, share: int, K: int) -> float:
    """Chance that at least one of K of `experts` lies among `share` of them."""
    return 1 - comb(experts - share, K) / comb(experts, K)


def visits(model: ModelConfig, hardware: Hardware, num_ranks: int) -> tuple[float, float]:
    """How often a token is sent over the slower of network and NVLink, and that one's rate in
    bytes a second."""
    nodes = max(1, num_ranks // hardware.gpus_per_node)
    local = num_ranks // nodes
    crossing = reach(model, num_ranks, nodes) * (nodes - 1) / nodes
    handed_on = reach(model, num_ranks, num_ranks) * (local - 1) / local
    return max(
        (crossing, hardware.network_bytes_per_s),
        (handed_on, hardware.nvlink_bytes_per_s),
        key=lambda way: way[0] / way[1],
    )


def exchange_seconds(
    model: ModelConfig,
    hardware: Hardware,
    num_ranks: int,
    num_tokens: float,
    value_bytes: float,
) -> float:
    """Seconds to send each of `num_tokens` tokens of a rank to its experts, or back.

    `value_bytes` are those of one of the hidden_size values of a token.
    """
    if num_ranks == 1:
        return 0.0
    number, rate = visits(model, hardware, num_ranks)
    return num_tokens * model.hidden_size * value_bytes * number / rate


def dispatch_bytes(precision: Precision) -> float:
    """Bytes a value on the way to the experts; gradients of results travel alike."""
    return precision.operand_bytes + precision.scale_bytes_per_value


def combine_bytes(precision: Precision) -> float:
    """Bytes a value on the way back, and of a gradient on it: never FP8 (3.3.3)."""
    return precision.activation_bytes
