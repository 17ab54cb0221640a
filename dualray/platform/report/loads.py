"""A run's tables of loads, summed up to what a picture can show.

Shape suffixes: L MoE layers, E experts, R expert ranks, N nodes, P places (R or N), C columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from dualray.platform.loads import LoadsFile, loads_files

MAX_COLUMNS = 240
_PLACE = ["column", "layer", "expert", "rank", "node"]


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
    parts = [_summed(file, first, last, columns) for file in files]
    table = pa.concat_tables(parts)
    layers, layer = np.unique(table["layer"].to_numpy(), return_inverse=True)
    nodes, node = np.unique(table["node"].to_numpy().astype(str), return_inverse=True)
    column, tokens = table["column"].to_numpy(), table["tokens_sum"].to_numpy()

    def spread(place: np.ndarray) -> np.ndarray:
        shape = (len(layers), int(place.max()) + 1, columns)
        cell = np.ravel_multi_index((layer, place, column), shape)
        # Counts are whole numbers below 2^53, so float64 sums are exact.
        sums = np.bincount(cell, tokens, minlength=np.prod(shape))
        noted = np.bincount(cell, minlength=len(sums))
        return np.where(noted > 0, sums, np.nan).reshape(shape)

    return LoadHistory(
        first=first,
        last=last,
        layers=tuple(layers.tolist()),
        nodes=tuple(nodes.tolist()),
        experts_LEC=spread(table["expert"].to_numpy()),
        ranks_LRC=spread(table["rank"].to_numpy()),
        nodes_LNC=spread(node),
    )


def _summed(file: LoadsFile, first: int, last: int, columns: int) -> pa.Table:
    """The rows of one file by column and place."""
    table = file.read()
    column = (table["step"].to_numpy().astype(np.int64) - first) * columns // (last - first + 1)
    table = table.append_column("column", pa.array(column))
    table = table.set_column(4, "node", table["node"].cast(pa.string()))
    return table.group_by(_PLACE).aggregate([("tokens", "sum")])


def relative_to_mean(places_LPC: np.ndarray) -> np.ndarray:
    """(P, C): a place's load over the mean of the places that hold the layer, averaged over the
    layers that it holds; NaN where it holds none."""
    held_LPC = np.isfinite(places_LPC)
    load_LPC = np.where(held_LPC, places_LPC, 0.0)
    mean_L1C = load_LPC.sum(1, keepdims=True) / np.maximum(held_LPC.sum(1, keepdims=True), 1)
    relative_LPC = load_LPC / np.where(mean_L1C > 0, mean_L1C, 1.0)
    layers_PC = held_LPC.sum(0)
    return np.where(layers_PC > 0, relative_LPC.sum(0) / np.maximum(layers_PC, 1), np.nan)
