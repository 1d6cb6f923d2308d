"""Trace-time checks of the arguments that the four steps share."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from lplb_jax import _native
from lplb_jax._axes import axes_of_size, check_axis, varies_over
from lplb_jax.placement import (
    Placement,
    check_fits,
    check_nodes,
    choose_topology,
    given_order,
)
from lplb_jax.topologies import Topology

_INDEX_DTYPES = ("int32", "int64", "uint8", "uint16")
Solver = Literal["auto", "exact", "ipm"]
SOLVERS = get_args(Solver)
Factor = Literal["elimination", "cusolverdx"]
FACTORS = get_args(Factor)
MOST_ROWS = 1 << 20  # of a tile
# The tile of tile="auto", used if slots average fewer than this many tiles. See docs/solvers.md for
# the measurements behind both.
AUTO_TILE = 128
AUTO_MOST_TILES = 4


@dataclasses.dataclass(frozen=True)
class Problem:
    """The checked static description of one balancing problem, and its placement.

    Without a topology, r2o has no columns and one row per rank, and all ranks are one group.
    `n_nodes` is the caller's; None takes the placement's if there is no topology.
    """

    r2o: Topology | np.ndarray
    placement: Placement
    n_nodes: int | None = None

    @property
    def ep_size(self) -> int:
        return self.placement.ep_size

    @property
    def n_logical(self) -> int:
        return self.placement.n_logical

    @property
    def along_topology(self) -> bool:
        return self.r2o is None or self.r2o.shape[1] > 0

    @property
    def node_size(self) -> int:
        """Ranks per node; 0 along a topology without `n_nodes`, where home ranks come first."""
        if self.n_nodes is None and self.along_topology:
            return 0
        return self.ep_size // (self.n_nodes or self.placement.n_nodes)


def anywhere(placement: Placement, n_nodes: int | None = None) -> Problem:
    """The problem of a placement as any placement, ignoring the topology it was made along."""
    return Problem(np.zeros((placement.ep_size, 0), np.int32), placement, n_nodes)


def check_problem(
    loads: jax.Array | None,
    r2o: Any,
    placement: Placement | None,
    axis_name: Any,
    n_nodes: int | None = None,
) -> Problem:
    """Finds ep_size and n_logical; raises if the arguments are inconsistent."""
    if r2o is None and isinstance(placement, Placement) and placement.topology is None:
        topology = anywhere(placement).r2o
    else:
        topology = choose_topology(r2o, placement)
    axis_size = None if axis_name is None else check_axis(axis_name)
    if placement is None:
        if loads is None:
            raise ValueError(
                "placement: expected a Placement where loads is None (it holds the number of "
                "experts), got None; make one with place_experts(None, r2o, ...)"
            )
        topology = choose_topology(r2o, None)
        rows = loads.shape[0] if loads.ndim == 2 else len(topology)
        placement = given_order(topology, loads.shape[-1], axis_size or rows)
    else:
        try:
            check_fits(placement, topology)
        except ValueError as error:
            check_unsharded(placement, axis_name, str(error))
            raise
    ep_size = placement.ep_size
    if axis_size is not None and axis_size != ep_size:
        raise ValueError(
            f"axis_name: expected an axis as large as placement.ep_size = {ep_size}, got "
            f"{axis_name!r} of size {axis_size}"
        )
    if loads is not None and loads.shape not in [
        (placement.n_logical,),
        (ep_size, placement.n_logical),
    ]:
        words = (
            f"loads: expected shape [n_logical] = [{placement.n_logical}] or [ep_size, n_logical] "
            f"= [{ep_size}, {placement.n_logical}], got {list(loads.shape)}"
        )
        check_unsharded(placement, axis_name, words)
        raise ValueError(words)
    if n_nodes is not None:
        check_nodes(ep_size, n_nodes)
    return Problem(topology, placement, n_nodes)


def check_unsharded(placement: Placement, axis_name: Any, contradiction: str) -> None:
    """Raises if `placement` differs between ranks, which then explains the contradiction.

    Without one it may be equal in fact, such as one computed from `lax.all_gather`'s result.
    """
    if axis_name is not None and varies_over(placement.phy2log, axis_name):
        raise ValueError(
            f"placement: expected the same on all ranks, got one that varies over {axis_name!r}; "
            f"pass it to jax.shard_map with in_specs P(), since for a part of it, {contradiction}"
        )


def _cut_to_32_bits() -> bool:
    """Whether JAX truncates int64 to int32."""
    return jax.dtypes.canonicalize_dtype(np.int64) == np.int32


def check_indices(indices: Any) -> jax.Array:
    """`indices` as an array of an accepted integer dtype."""
    dtype = getattr(indices, "dtype", None)
    if dtype is None:
        indices = np.asarray(indices)
        dtype = indices.dtype
    if dtype.name not in _INDEX_DTYPES:
        raise TypeError(
            f"indices: expected dtype {', '.join(_INDEX_DTYPES)}, got {dtype.name}; convert with "
            f".astype(jnp.int32)"
        )
    if isinstance(indices, np.ndarray) and dtype == np.int64 and _cut_to_32_bits():
        # JAX would truncate wide ids to 32 bits, which could turn them into valid ids.
        indices = np.clip(indices, np.iinfo(np.int32).min, np.iinfo(np.int32).max)
    return _native.whole(indices)


def check_loads(loads: Any, *, floats: bool = False) -> jax.Array:
    """`loads` as an int32 array (or float32, if allowed) of one or two dimensions."""
    dtype = getattr(loads, "dtype", None)
    if dtype != np.int32 and not (floats and dtype == np.float32):
        real = floats and dtype is not None and jnp.issubdtype(dtype, jnp.floating)
        raise TypeError(
            f"loads: expected an int32 {'or float32 ' if floats else ''}array, got "
            f"{dtype or type(loads).__name__}; convert with jnp.asarray(loads, "
            f"jnp.{'float32' if real else 'int32'})"
        )
    if loads.ndim not in (1, 2):
        raise ValueError(
            f"loads: expected shape [n_logical] or [ep_size, n_logical], got {list(loads.shape)}"
        )
    return _native.whole(loads)


def check_sources(
    indices: jax.Array, loads: jax.Array | None, problem: Problem, axis_name: Any
) -> None:
    """Raises if loads have several sources but the indices' source is unknown.

    Warns if there seem to be several sources that do not know of one another.
    """
    if loads is None and axis_name is None:
        _warn_if_alone(indices, problem.ep_size)
    if loads is None or loads.ndim == 1 or axis_name is not None:
        return
    if indices.ndim < 1 or indices.shape[0] != problem.ep_size:
        raise ValueError(
            f"indices: expected a leading axis of ep_size = {problem.ep_size} source ranks, got "
            f"shape {list(indices.shape)}"
        )


def _warn_if_alone(indices: jax.Array, ep_size: int) -> None:
    """Warns if the ranks of a placement each balance their own tokens only.

    A shard may hold all tokens of a placement's ranks; that there are equally many shards would be
    chance.
    """
    names = axes_of_size(indices, ep_size) if ep_size > 1 else None
    if names is not None:
        axis = names[0] if len(names) == 1 else names
        _native.warn_once(
            f"axis_name: expected the axis of the ranks, got None, though indices vary over "
            f"{axis!r}, as large as placement.ep_size = {ep_size}: every shard balances by itself, "
            f"as if it had all tokens. Pass axis_name={axis!r}; or if that is meant, "
            f"warnings.filterwarnings('ignore', 'axis_name: ')"
        )


def choose_solver(solver: str, loads: jax.Array | None, rank_weights: Any) -> str:
    """ "exact" or "ipm"; raises if `solver` is unknown or does not support the arguments."""
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {solver!r}")
    needs_ipm = None
    if loads is not None and loads.dtype == np.float32:
        needs_ipm = "loads: expected int32 for solver='exact', got float32"
    elif rank_weights is not None:
        needs_ipm = "rank_weights: expected None for solver='exact', got weights"
    if solver == "exact" and needs_ipm:
        raise ValueError(f"{needs_ipm}; use solver='ipm' or 'auto'")
    if solver == "auto":
        return "ipm" if needs_ipm else "exact"
    return solver


def check_factor(factor: str, method: str, problem: Problem, costs: Costs) -> bool:
    """Whether the interior point uses cuSolverDx; raises if it cannot."""
    if factor not in FACTORS:
        raise ValueError(f"factor: expected one of {', '.join(FACTORS)}, got {factor!r}")
    if factor == "elimination":
        return False
    if method != "ipm":
        raise ValueError(
            f"factor: expected 'elimination' for solver={method!r}, which factors nothing, got "
            f"{factor!r}; use solver='ipm'"
        )
    if not problem.along_topology:
        raise ValueError(
            f"factor: expected 'elimination' for a placement without a topology, got {factor!r}"
        )
    if costs.asked:
        raise ValueError(f"factor: expected 'elimination' with base_load, got {factor!r}")
    extension = _native.cuda()
    if extension is None or not extension.has_cusolverdx():
        raise ValueError(
            f"factor: expected 'elimination', got {factor!r}: this lplb_jax was built without "
            f"cuSolverDx; rebuild it with: LPLB_MATHDX=on LPLB_CUDA=pypi pip install ."
        )
    return True


@dataclasses.dataclass(frozen=True)
class Costs:
    """The costs besides single tokens: tiles of `tile` rows, and base loads of the ranks, in tokens
    or, with `tile`, in tiles."""

    tile: int | None = None
    base_load: jax.Array | None = None

    @property
    def asked(self) -> bool:
        return self.tile is not None or self.base_load is not None

    def of_ranks(self, ep_size: int) -> jax.Array | np.ndarray:
        """The base loads, zeros where there are none."""
        return np.zeros(ep_size, np.int32) if self.base_load is None else self.base_load


NO_COSTS = Costs()


def check_costs(
    tile: Any, base_load: Any, ep_size: int, method: str, most_tiles: float | None = None
) -> Costs:
    """The checked costs; `most_tiles`: tiles of `AUTO_TILE` rows per slot if tile may be "auto"."""
    if tile == "auto":
        if most_tiles is None:
            raise ValueError(
                "tile: expected a number of rows or None here, where loads do not tell the number "
                "of tokens before the program runs, got 'auto'"
            )
        tile = AUTO_TILE if most_tiles < AUTO_MOST_TILES and method == "exact" else None
    if tile is not None:
        integer = isinstance(tile, int | np.integer) and not isinstance(tile, bool)
        if not integer or not 1 <= tile <= MOST_ROWS:
            raise ValueError(
                f"tile: expected a static integer from 1 to {MOST_ROWS:,}, or None, got {tile!r}"
            )
        if method != "exact":
            raise ValueError(
                f"tile: expected None where the interior point solves, got {tile}; use "
                f"solver='exact', and int32 loads without rank_weights"
            )
        tile = int(tile)
    if base_load is not None:
        dtype = getattr(base_load, "dtype", None)
        if dtype != np.int32:
            raise TypeError(
                f"base_load: expected an int32 array, got {dtype or type(base_load).__name__}; "
                f"convert with jnp.asarray(base_load, jnp.int32)"
            )
        if base_load.shape != (ep_size,):
            raise ValueError(
                f"base_load: expected shape [ep_size] = [{ep_size}], got {list(base_load.shape)}"
            )
        base_load = _native.whole(base_load)
    return Costs(tile, base_load)


def check_weights(rank_weights: Any, group_size: int) -> jax.Array | np.ndarray | None:
    """`rank_weights` as float32 `[group_size]`."""
    if rank_weights is None:
        return None
    if isinstance(rank_weights, jax.core.Tracer):
        weights = jnp.asarray(rank_weights, jnp.float32)
    else:
        weights = np.asarray(jax.device_get(rank_weights), np.float32)
        if weights.shape == (group_size,) and not ((weights > 0) & (weights < np.inf)).all():
            raise ValueError(
                f"rank_weights: expected positive finite numbers, got {weights.tolist()}"
            )
    if weights.shape != (group_size,):
        raise ValueError(
            f"rank_weights: expected shape [group_size] = [{group_size}], got {list(weights.shape)}"
        )
    return weights


def check_count(name: str, value: Any, least: int = 1) -> int:
    """A static integer, positive unless `least` says otherwise."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected a static integer of at least {least}, got {value!r}")
    return int(value)


def check_flags(**flags: Any) -> None:
    """Raises unless all are static truth values."""
    for name, flag in flags.items():
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(f"{name}: expected a static True or False, got {flag!r}")


def check_array(name: str, value: Any, words: str) -> None:
    """Raises unless `value` is an array of JAX or NumPy; `words` say what should be in it."""
    known = isinstance(value, jax.Array | np.ndarray | np.generic)
    if not known and not hasattr(value, "__jax_array__"):
        raise TypeError(
            f"{name}: expected an array, {words}, got {type(value).__name__}; make one with "
            f"jnp.asarray"
        )
