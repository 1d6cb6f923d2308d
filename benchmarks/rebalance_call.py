"""Launches rebalance's kernels on raw pointers, without XLA."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from graph import microseconds, pointer

from lplb_jax import Placement, _bench
from lplb_jax.assignment import workspace_shape
from lplb_jax.topologies import Topology


class Results(NamedTuple):
    """The kernels' results, in order; see `lplb_jax.Assignment` and `lplb_jax.Split`."""

    physical_indices: jax.Array
    position: jax.Array
    counts: jax.Array
    quota: jax.Array
    max_load: jax.Array
    lower_bound: jax.Array
    status: jax.Array
    workspace: jax.Array


class RebalanceCall:
    """int32 `indices` of one source over a placement, all on one device.

    With `fan_out`, copies are chosen first, and each rank sends at most `fan_out`. With `tile`,
    tiles are balanced, on top of `base_load`, of any placement.

    Attributes:
      arguments: the arguments of `launch_synced_rebalance` before the stream: problem, number of
        tokens, tiles, pointers to operands and results, how copies are chosen, and costs.
      results: the arrays that a launch writes.
      tables: phy2log, log2phy and logcnt of the chosen copies.
      max_tokens: of the busiest rank, where tiles are balanced.
    """

    def __init__(
        self,
        r2o: Topology | np.ndarray,
        placement: Placement,
        indices: np.ndarray,
        device: Any = None,
        fan_out: int = 0,
        tile: int | None = None,
        base_load: np.ndarray | None = None,
    ) -> None:
        n_tokens, n_physical = indices.size, placement.n_physical
        group_size, n_columns = r2o.shape
        tiles = workspace_shape(n_tokens, placement.n_logical)
        n_groups = placement.ep_size // group_size
        groups = [(n_groups,)] * 3
        shapes = [(n_tokens,), (n_tokens,), (n_physical,), (n_physical,), *groups, tiles]
        operands = indices, placement.phy2log, placement.log2phy, r2o
        self._operands = [jax.device_put(np.asarray(a, np.int32), device) for a in operands]

        def filled(shape: tuple[int, ...]) -> jax.Array:
            return jax.device_put(np.full(shape, -7, np.int32), device)

        self.results = Results(*map(filled, shapes))
        n_logical, max_copies = placement.log2phy.shape
        width = 1 + min(placement.ep_size - 1, n_physical - n_logical, fan_out)
        self.tables = [filled(s) for s in [(n_physical,), (n_logical, width), (n_logical,)]]
        sizes = [placement.ep_size, group_size, n_columns, placement.n_logical, n_physical]
        read, written, tables = (
            [pointer(a) for a in of] for of in (self._operands, self.results, self.tables)
        )
        base = np.zeros(placement.ep_size) if base_load is None else base_load
        self._base_load = jax.device_put(np.asarray(base, np.int32), device)
        self.max_tokens = filled((n_groups,))
        costs = (0, 0) if tile is None else (pointer(self._base_load), pointer(self.max_tokens))
        choice = fan_out, width, tables, tile or 1, costs
        self.arguments = (
            [*sizes, max_copies],
            n_tokens,
            tiles,
            read,
            written,
            *choice,
        )

    def time(self, *, replays: int = 20) -> float:
        """Median µs of one launch, see `microseconds`; results must reach the bound."""
        problem, *rest = self.arguments
        launch: Any = _bench.launch_rebalance
        median = microseconds(lambda stream: launch(problem, 1, *rest, stream), replays=replays)
        got = jax.tree.map(np.asarray, self.results)
        assert got.status == 0
        assert got.max_load == got.lower_bound
        of_slots = np.bincount(got.physical_indices, minlength=len(got.quota))
        assert np.array_equal(of_slots, got.quota)
        assert np.array_equal(got.counts, got.quota)
        return median
