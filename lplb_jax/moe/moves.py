"""Moves weights and optimizer state along with their experts when a placement changes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lplb_jax.placement import Placement


def move_experts(
    weights: Any,
    old: Placement,
    new: Placement,
    *,
    where: Callable[[tuple[Any, ...]], bool] | None = None,
) -> Any:
    """Moves experts from their places in `old` to those in `new`, bit for bit.

    Call it on global arrays, outside `jax.shard_map`, whenever a placement changes: on the experts'
    weights and on their optimizer state. Works under `jit` and `vmap`.

    Args:
      weights: a pytree of arrays `[n_rows, …]` in home order: the experts whose home, the first of
        their slots, is on rank 0, slot by slot, then those of rank 1, … Each rank has
        n_local = ⌈n_logical / ep_size⌉ rows, and n_rows = ep_size · n_local; rows without an expert
        are the last of their rank. With stacked placements, `[layers, n_rows, …]`. Scalars, such as
        an optimizer's step count, stay as they are; so do scalars per layer with stacked
        placements.
      old: the placement of the arrays; stacked if it has a leading layer axis.
      new: the new placement, with the same numbers of layers, experts and ranks.
      where: whether a leaf belongs to experts, by its path as in
        `jax.tree_util.tree_map_with_path`; other leaves stay as they are, so that a whole training
        state can be moved. None for all leaves.

    Returns:
      The pytree in the order of `new`, sharded as before. Rows without an expert are 0.

    Raises:
      TypeError: old or new is not a Placement.
      ValueError: the placements differ in size, the home of an expert holds another one, a rank is
        home of more than n_local, or an array is not as above. The values of traced placements
        cannot be checked: if a rank is home of more than n_local, all rows are NaN (of integers
        the smallest, if unsigned the largest number), and so are rows that get no expert if all
        should have one.

    >>> place = functools.partial(
    ...     place_experts, n_logical=4, ep_size=2, redundants_per_rank=1
    ... )
    >>> old, new = place(None, topologies.ring(2)), place([5, 1, 9, 1], topologies.ring(2))
    >>> move_experts(jnp.array([0, 1, 2, 3]), old, new).tolist()
    [2, 3, 0, 1]
    >>> state = {"experts": jnp.array([0, 1, 2, 3]), "router": jnp.ones((8, 4)), "step": 7}
    >>> of_experts = lambda path: "experts" in jax.tree_util.keystr(path)
    >>> move_experts(state, old, new, where=of_experts)["experts"].tolist()
    [2, 3, 0, 1]
    """
    homes = check_homes("old", old), check_homes("new", new)
    given, wanted = (
        (*home.shape, place.ep_size) for home, place in zip(homes, (old, new), strict=True)
    )
    if given != wanted:
        raise ValueError(f"new: expected {_in_words(*given)} as old has, got {_in_words(*wanted)}")
    n_rows = old.ep_size * rows_per_rank(old)
    sizes = (old.n_physical, new.n_physical), old.ep_size
    return _reordered(weights, homes, (n_rows, n_rows), _Rows(_between, *sizes), where)


def to_home_order(
    weights: Any,
    placement: Placement,
    *,
    where: Callable[[tuple[Any, ...]], bool] | None = None,
) -> Any:
    """Converts fresh or imported weights from the order of expert ids to home order.

    Call it on global arrays, outside `jax.shard_map`. Works under `jit` and `vmap`.

    Args:
      weights: a pytree of arrays `[n_logical, …]`, or with stacked placements `[layers, n_logical,
        …]`. Scalars stay as they are, see `move_experts`.
      placement: the placement to use, for any number of ranks.
      where: which leaves belong to experts, see `move_experts`.

    Returns:
      The pytree with `[n_rows, …]` instead, in home order, see `move_experts`: shard it over the
      ranks, and pass a rank's part to `moe_layer`. Rows without an expert are 0. Arrays are sharded
      as before, as far as their new size allows it.

    Raises:
      TypeError, ValueError: as `move_experts`.

    >>> placement = Placement.from_phy2log([[2, 0], [1, 0]], ep_size=2)
    >>> to_home_order(jnp.array([10, 11, 12]), placement).tolist()
    [12, 10, 11, 0]
    """
    return _from_or_to_ids(weights, placement, where, to_ids=False)


def to_id_order(
    weights: Any,
    placement: Placement,
    *,
    where: Callable[[tuple[Any, ...]], bool] | None = None,
) -> Any:
    """Converts weights from home order to the order of expert ids, for an export or a checkpoint.

    Call it on global arrays, outside `jax.shard_map`. Works under `jit` and `vmap`.

    Args:
      weights: a pytree of arrays `[n_rows, …]` in home order, see `move_experts`.
      placement: the placement of the arrays; stacked if they are.
      where: which leaves belong to experts, see `move_experts`.

    Returns:
      The pytree with `[n_logical, …]` instead, whatever the number of ranks. Arrays are sharded as
      before, as far as their new size allows it.

    Raises:
      TypeError, ValueError: as `move_experts`.

    >>> placement = Placement.from_phy2log([[2, 0], [1, 0]], ep_size=2)
    >>> to_id_order(jnp.array([12, 10, 11, 0]), placement).tolist()
    [10, 11, 12]
    """
    return _from_or_to_ids(weights, placement, where, to_ids=True)


def _from_or_to_ids(weights: Any, placement: Placement, where: Any, to_ids: bool) -> Any:
    homes = (check_homes("placement", placement),)
    n_home, n_ids = placement.ep_size * rows_per_rank(placement), placement.n_logical
    n_rows = (n_home, n_ids) if to_ids else (n_ids, n_home)
    rows = _Rows(_of_ids if to_ids else _of_homes, (placement.n_physical,), placement.ep_size)
    return _reordered(weights, homes, n_rows, rows, where)


class _Rows(NamedTuple):
    """Computes the source row of each row of a new order; static."""

    find: Callable[..., jax.Array]
    n_slots: tuple[int, ...]
    ep_size: int

    def __call__(self, *homes: jax.Array) -> jax.Array:
        """int32 `[n_rows]` of one layer; past the old order's end for rows without an expert."""
        n_logical = len(homes[0])
        of_experts = (
            home_rows(home, n, self.ep_size) for home, n in zip(homes, self.n_slots, strict=True)
        )
        return self.find(n_logical, self.ep_size * -(-n_logical // self.ep_size), *of_experts)

    def lose(self, *homes: jax.Array) -> jax.Array:
        """bool `[(layers)]`: whether an order has no room for some experts."""

        def of_one(home: jax.Array, n: int) -> jax.Array:
            of_layer = functools.partial(uneven, n_slots=n, ep_size=self.ep_size)
            return of_layer(home) if home.ndim == 1 else jax.vmap(of_layer)(home)

        return functools.reduce(jnp.logical_or, map(of_one, homes, self.n_slots))


def _between(n_logical: int, n_rows: int, old: jax.Array, new: jax.Array) -> jax.Array:
    del n_logical
    return jnp.full(n_rows, n_rows, jnp.int32).at[new].set(old, mode="drop")


def _of_ids(n_logical: int, n_rows: int, rows: jax.Array) -> jax.Array:
    del n_logical, n_rows
    return rows


def _of_homes(n_logical: int, n_rows: int, rows: jax.Array) -> jax.Array:
    ids = jnp.arange(n_logical, dtype=jnp.int32)
    return jnp.full(n_rows, n_logical, jnp.int32).at[rows].set(ids, mode="drop")


def _reordered(
    weights: Any,
    homes: tuple[Any, ...],
    n_rows: tuple[int, int],
    rows: _Rows,
    where: Callable[[tuple[Any, ...]], bool] | None,
) -> Any:
    """Reorders the experts' arrays, which may change their number of rows."""
    layers = homes[0].shape[:-1]
    n_before, n_after = n_rows

    def reorder(path: tuple[Any, ...], array: Any) -> Any:
        shape = jnp.shape(array)
        if where is not None and not where(path):
            return array
        if shape[: len(layers) + 1] != (*layers, n_before):
            if shape in ((), (1,), layers, (*layers, 1)):
                return array
            axes = "layers, n_rows, …" if layers else "n_rows, …"
            expected = ", ".join(map(str, (*layers, n_before)))
            raise ValueError(
                f"weights: expected arrays [{axes}] = [{expected}, …] or scalars, got {list(shape)}"
            )
        array = jnp.asarray(array)
        if any(isinstance(value, jax.core.Tracer) for value in (array, *homes)):
            return _picked(array, *homes, rows=rows)
        # If it is not committed to a device, neither is the result.
        before = array.sharding if array.committed else None
        after = _sharding_of(before, (*layers, n_after, *shape[len(layers) + 1 :]))
        return _compiled(after)(array, *_beside(before, homes), rows=rows)

    return jax.tree_util.tree_map_with_path(reorder, weights)


def rows_per_rank(placement: Placement) -> int:
    """Rows of each rank for the experts whose home it is."""
    return -(-placement.n_logical // placement.ep_size)


def home_rows(home: jax.Array, n_slots: int, ep_size: int) -> jax.Array:
    """int32 `[n_logical]`: the row of each expert in home order, from the slots of the homes.

    A rank that is home of more than n_local experts would need rows of the next one, see `uneven`.
    """
    per_rank, n_local = n_slots // ep_size, -(-len(home) // ep_size)
    is_home = jnp.zeros(n_slots, jnp.int32).at[home].set(1).reshape(ep_size, per_rank)
    place = jnp.cumsum(is_home, axis=1, dtype=jnp.int32).reshape(-1)[home] - 1
    return home // per_rank * n_local + place


def uneven(home: Any, n_slots: int, ep_size: int) -> jax.Array:
    """bool `[]`: whether a rank is home of more experts than it has rows, from the homes' slots."""
    ranks = jnp.arange(ep_size, dtype=home.dtype)
    at_home = jnp.asarray(home)[:, None] // (n_slots // ep_size) == ranks[None]
    n_homes = at_home.sum(axis=0)
    return (n_homes > -(-len(home) // ep_size)).any()


def lost(dtype: Any) -> Any:
    """What stands for the value of an expert without a row, as where JAX fills a gather."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.asarray(jnp.nan, dtype)
    if dtype == jnp.bool_:
        return jnp.asarray(True)
    limits = jnp.iinfo(dtype)
    return jnp.asarray(limits.min if limits.min < 0 else limits.max, dtype)


def _picked(array: jax.Array, *homes: jax.Array, rows: _Rows) -> jax.Array:
    """The rows of `array` that `rows` names; rows without an expert are 0 if there must be some."""
    full = homes[0].shape[-1] % rows.ep_size == 0
    if homes[0].ndim == 1:
        source = rows(*homes)
        picked = array.at[source]
    else:
        source = jax.vmap(rows)(*homes)
        picked = array.at[jnp.arange(len(source), dtype=jnp.int32)[:, None], source]
    sharding = _sharding_of(
        jax.typeof(array).sharding, (*source.shape, *array.shape[source.ndim :])
    )
    picked = picked.get(
        mode="fill",
        fill_value=None if full else 0,
        # JAX requires it if the mesh has explicit axes.
        out_sharding=sharding if any(sharding.spec) else None,
    )
    is_lost = rows.lose(*homes).reshape(source.shape[:-1] + (1,) * (array.ndim - source.ndim + 1))
    return jnp.where(is_lost, lost(array.dtype), picked)


def _sharding_of(sharding: Any, shape: tuple[int, ...]) -> Any:
    """A sharding for the replacement array; axes that do not divide its shape are not sharded."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = list(sharding.spec)
    for axis, names in enumerate(spec):
        names = names if isinstance(names, tuple) else () if names is None else (names,)
        if shape[axis] % math.prod(sharding.mesh.shape[name] for name in names):
            spec[axis] = None
    return NamedSharding(sharding.mesh, P(*spec))


@functools.lru_cache(maxsize=256)
def _compiled(sharding: jax.sharding.Sharding | None) -> Any:
    return jax.jit(_picked, static_argnames="rows", out_shardings=sharding)


def _beside(sharding: jax.sharding.Sharding | None, values: Any) -> Any:
    """Puts `values` on the devices of an array explicitly, which a transfer guard allows."""
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, P())
    return jax.device_put(values, sharding)


def check_homes(name: str, placement: Placement) -> Any:
    """The slot of each expert's home, int32 `[(layers,) n_logical]`; checked unless traced."""
    if not isinstance(placement, Placement):
        raise TypeError(f"{name}: expected a lplb_jax.Placement, got {type(placement).__name__}")
    arrays = placement.phy2log, placement.log2phy
    if any(isinstance(array, jax.core.Tracer) for array in arrays):
        return placement.log2phy[..., 0]
    phy2log, log2phy = (np.asarray(array) for array in jax.device_get(arrays))
    n_logical, n_physical = placement.n_logical, placement.n_physical
    homes = log2phy[..., 0]
    layers = zip(homes.reshape(-1, n_logical), phy2log.reshape(-1, n_physical), strict=True)
    for layer, (home, held) in enumerate(layers):
        where = f" of layer {layer}" if homes.ndim > 1 else ""
        inside = (home >= 0) & (home < n_physical)
        wrong = ~inside | (held[np.where(inside, home, 0)] != np.arange(n_logical))
        if wrong.any():
            expert = int(wrong.argmax())
            slot = int(home[expert])
            holds = f"holds expert {held[slot]}" if inside[expert] else "does not exist"
            raise ValueError(
                f"{name}: expected every expert in the first of its slots, got expert {expert}"
                f"{where} in slot {slot}, which {holds}"
            )
        at_home = np.bincount(home // (n_physical // placement.ep_size))
        if at_home.max() > rows_per_rank(placement):
            raise ValueError(
                f"{name}: expected every rank as the home of at most {rows_per_rank(placement)} "
                f"experts, got {at_home.max()}{where} on rank {at_home.argmax()}; place_experts "
                f"makes homes even with method='auto', and moe.InSlots holds weights without homes"
            )
    return homes


def _in_words(*sizes: int) -> str:
    *layers, n_logical, ep_size = sizes
    stacked = f"{layers[0]} stacked placements" if layers else "one placement"
    return f"{stacked} of {n_logical} experts on {ep_size} ranks"
