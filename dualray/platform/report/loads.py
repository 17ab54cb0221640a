"""A run's tables of loads, summed up to what a picture can show.

Shape suffixes: L MoE layers, E experts, R expert ranks, N nodes, P places (R or N), C columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from dualray.platform.loads import loads_files

MAX_COLUMNS = 240


@dataclass(frozen=True, kw_only=True)
class LoadHistory:
    """Tokens in equal stretches of the steps `first` to `last`; NaN where nothing was noted."""

    first: int
    last: int
    layers: tuple[int, ...]
    nodes: tuple[str, ...]
    """Addresses, ascending."""
    experts_LEC: np.ndarray
    ranks_LRC: np.ndarray
    """NaN also where a rank holds no expert of the layer; so for nodes."""
    nodes_LNC: np.ndarray

    def relative(self, layer: int) -> np.ndarray:
        """Loads of one layer's experts over their mean, (E, C)."""
        load_EC = self.experts_LEC[self.layers.index(layer)]
        return load_EC / load_EC.mean(axis=0)


def read_history(folder: Path, columns: int = MAX_COLUMNS) -> LoadHistory | None:
    """Sum the tables of a run, file by file; None if there are none. Raises RunError."""
    files = loads_files(folder)
    if not files:
        return None
    first, last = files[0].first, files[-1].last
    columns = min(columns, last - first + 1)
    sums = {name: np.zeros((2, 0, 0, columns)) for name in ("expert", "rank", "node")}
    nodes: dict[str, int] = {}
    for file in files:
        table = file.read().unify_dictionaries().combine_chunks()
        steps = table["step"].to_numpy().astype(np.int64)
        column = (steps - first) * columns // (last - first + 1)
        layer, tokens = (table[name].to_numpy().astype(np.int64) for name in ("layer", "tokens"))
        for name in sums:
            place = _nodes(table, nodes) if name == "node" else table[name].to_numpy()
            part = _summed(layer, place.astype(np.int64), column, tokens, columns)
            sums[name] = _padded_sum(sums[name], part)
    order = sorted(nodes)
    sums["node"] = sums["node"][:, :, [nodes[node] for node in order]]
    layers = np.flatnonzero(sums["rank"][1].any(axis=(1, 2)))
    experts, ranks, by_node = (_known(sums[name][:, layers]) for name in sums)
    return LoadHistory(
        first=first,
        last=last,
        layers=tuple(layers.tolist()),
        nodes=tuple(order),
        experts_LEC=experts,
        ranks_LRC=ranks,
        nodes_LNC=by_node,
    )


def _nodes(table: pa.Table, known: dict[str, int]) -> np.ndarray:
    """Numbers of the rows' nodes; new nodes are added to `known`."""
    column = table["node"].chunk(0)
    numbers = [known.setdefault(node, len(known)) for node in column.dictionary.to_pylist()]
    return np.array(numbers)[column.indices.to_numpy()]


def _summed(
    layer: np.ndarray, place: np.ndarray, column: np.ndarray, tokens: np.ndarray, columns: int
) -> np.ndarray:
    """(2, L, P, C): tokens, and how many rows they are sums of; by every layer up to the last."""
    shape = (int(layer.max()) + 1, int(place.max()) + 1, columns)
    cell = (layer * shape[1] + place) * columns + column
    # Counts are whole numbers below 2^53, so float64 sums are exact.
    both = (np.bincount(cell, weights, math.prod(shape)) for weights in (tokens, None))
    return np.stack([counts.reshape(shape) for counts in both])


def _padded_sum(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The sum of arrays that may each be longer than the other."""
    total = np.zeros(np.maximum(one.shape, other.shape))
    for part in (one, other):
        total[tuple(slice(size) for size in part.shape)] += part
    return total


def _known(sums: np.ndarray) -> np.ndarray:
    tokens_LPC, rows_LPC = sums
    return np.where(rows_LPC > 0, tokens_LPC, np.nan)


def relative_to_mean(places_LPC: np.ndarray) -> np.ndarray:
    """(P, C): a place's load over the mean of the places that hold the layer, averaged over the
    layers that it holds; NaN where it holds none."""
    held_LPC = np.isfinite(places_LPC)
    load_LPC = np.where(held_LPC, places_LPC, 0.0)
    mean_L1C = load_LPC.sum(1, keepdims=True) / np.maximum(held_LPC.sum(1, keepdims=True), 1)
    relative_LPC = load_LPC / np.where(mean_L1C > 0, mean_L1C, 1.0)
    layers_PC = held_LPC.sum(0)
    return np.where(layers_PC > 0, relative_LPC.sum(0) / np.maximum(layers_PC, 1), np.nan)
