"""Weights and optimiser state that follow their experts when a placement changes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lplb_jax.placement import Placement


def move_experts(weights: Any, old: Placement, new: Placement) -> Any:
    """Moves experts from where `old` has them to where `new` does, bit for bit.

    Call it on global arrays, outside `jax.shard_map`, whenever a placement changes: on the experts'
    weights and on whatever an optimiser keeps for them. Works under `jit` and `vmap`.

    Args:
      weights: a pytree of arrays `[n_rows, …]` in home order: the experts whose home, the first of
        their slots, is on rank 0, slot by slot, then those of rank 1, … Each rank has
        n_local = ⌈n_logical / ep_size⌉ rows, and n_rows = ep_size · n_local; rows without an expert
        are the last of their rank. With stacked placements, `[layers, n_rows, …]`. Scalars, such as
        an optimiser's step count, stay as they are; with stacked placements `[layers]` does, too.
      old: the placement that the arrays are in; stacked where it has a leading layer axis.
      new: the placement wanted, of as many layers, experts and ranks.

    Returns:
      The pytree in the order of `new`, sharded as before. Rows without an expert are 0.

    Raises:
      TypeError: old or new is no Placement.
      ValueError: the placements differ in size, the home of an expert holds another one, a rank is
        home of more than n_local, or an array is not as above. The values of traced placements are
        not checked; rows that get no expert then are NaN if all should have one.

    >>> place = functools.partial(
    ...     place_experts, n_logical=4, ep_size=2, redundants_per_rank=1
    ... )
    >>> old, new = place(None, topologies.ring(2)), place([5, 1, 9, 1], topologies.ring(2))
    >>> move_experts(jnp.array([0, 1, 2, 3]), old, new).tolist()
    [2, 3, 0, 1]
    """
    homes = check_homes("old", old), check_homes("new", new)
    given, wanted = (
        (*home.shape, place.ep_size) for home, place in zip(homes, (old, new), strict=True)
    )
    if given != wanted:
        raise ValueError(f"new: expected {_in_words(*given)} as old has, got {_in_words(*wanted)}")
    layers = homes[0].shape[:-1]
    n_rows = old.ep_size * rows_per_rank(old)
    sizes = {"n_slots": (old.n_physical, new.n_physical), "ep_size": old.ep_size}

    def move(array: Any) -> Any:
        shape = jnp.shape(array)
        if shape in ((), layers):
            return array
        if shape[: len(layers) + 1] != (*layers, n_rows):
            axes = "layers, n_rows, …" if layers else "n_rows, …"
            expected = ", ".join(map(str, (*layers, n_rows)))
            raise ValueError(
                f"weights: expected arrays [{axes}] = [{expected}, …] or scalars, got {list(shape)}"
            )
        array = jnp.asarray(array)
        if any(isinstance(value, jax.core.Tracer) for value in (array, *homes)):
            return _reordered(array, *homes, **sizes)
        return _compiled(array.sharding)(array, *_beside(array, homes), **sizes)

    return jax.tree.map(move, weights)


def rows_per_rank(placement: Placement) -> int:
    """Rows that each rank has for the experts whose home it is."""
    return -(-placement.n_logical // placement.ep_size)


def home_rows(home: jax.Array, n_slots: int, ep_size: int) -> jax.Array:
    """int32 `[n_logical]`: the row of each expert in home order, from the slots of the homes."""
    per_rank, n_local = n_slots // ep_size, -(-len(home) // ep_size)
    is_home = jnp.zeros(n_slots, jnp.int32).at[home].set(1).reshape(ep_size, per_rank)
    place = jnp.cumsum(is_home, axis=1, dtype=jnp.int32).reshape(-1)[home] - 1
    return home // per_rank * n_local + place


def home_slots(placement: Placement) -> jax.Array:
    """int32 `[ep_size, n_local]`: slot of each row's expert on its rank; past the last, none."""
    n_ranks, n_local = placement.ep_size, rows_per_rank(placement)
    home = jnp.asarray(placement.log2phy)[:, 0]
    per_rank = placement.n_physical // n_ranks
    rows = home_rows(home, placement.n_physical, n_ranks)
    slots = jnp.full(n_ranks * n_local, per_rank, jnp.int32)
    return slots.at[rows].set(home % per_rank, mode="drop").reshape(n_ranks, n_local)


def _reordered(
    array: jax.Array,
    old: jax.Array,
    new: jax.Array,
    *,
    n_slots: tuple[int, int],
    ep_size: int,
) -> jax.Array:
    """`array` in the order of the homes `new`, from that of `old`."""

    def source(old: jax.Array, new: jax.Array) -> jax.Array:
        """Where the row is that goes to each row; past the end for those without an expert."""
        n_rows = ep_size * -(-len(old) // ep_size)
        from_row, to_row = (
            home_rows(home, n, ep_size) for home, n in zip((old, new), n_slots, strict=True)
        )
        return jnp.full(n_rows, n_rows, jnp.int32).at[to_row].set(from_row, mode="drop")

    full = old.shape[-1] % ep_size == 0
    if old.ndim == 1:
        picked = array.at[source(old, new)]
    else:
        layer = jnp.arange(len(old), dtype=jnp.int32)[:, None]
        picked = array.at[layer, jax.vmap(source)(old, new)]
    sharding = jax.typeof(array).sharding
    return picked.get(
        mode="fill",
        fill_value=None if full else 0,
        # JAX asks for it where the axes of the mesh are explicit.
        out_sharding=sharding if any(sharding.spec) else None,
    )


@functools.lru_cache(maxsize=256)
def _compiled(sharding: jax.sharding.Sharding) -> Any:
    return jax.jit(_reordered, static_argnames=("n_slots", "ep_size"), out_shardings=sharding)


def _beside(array: jax.Array, values: Any) -> Any:
    """`values` on the devices of `array`: put there, as a transfer guard demands."""
    sharding = array.sharding
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
                f"experts, got {at_home.max()}{where} on rank {at_home.argmax()}"
            )
    return homes


def _in_words(*sizes: int) -> str:
    *layers, n_logical, ep_size = sizes
    stacked = f"{layers[0]} stacked placements" if layers else "one placement"
    return f"{stacked} of {n_logical} experts on {ep_size} ranks"
