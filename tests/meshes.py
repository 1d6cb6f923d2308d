"""Arrays and programs over a mesh of one or several processes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

RANKS = P("ep")


def everywhere(mesh: Mesh, array: np.ndarray, spec: P = RANKS) -> jax.Array:
    """The same global array on all processes, whichever process holds its parts."""
    return jax.make_array_from_callback(
        array.shape, NamedSharding(mesh, spec), lambda index: array[index]
    )


def per_rank(function, mesh: Mesh, n_inputs: int = 1, axis: Any = "ep"):
    """jit of shard_map; outputs get a leading axis of ranks, to check every rank's."""

    def rank(*operands):
        return jax.tree.map(lambda array: jnp.asarray(array)[None], function(*operands))

    return jax.jit(
        jax.shard_map(
            rank, mesh=mesh, in_specs=(P(axis),) * n_inputs, out_specs=P(axis), check_vma=False
        )
    )


def n_compiled(run: Any) -> int:
    """The number of programs that jit has compiled for a function."""
    return run._cache_size()


def assert_equal(got, expected) -> None:
    """Compares the parts of two results that this process holds, bit for bit."""
    got, expected = jax.tree.leaves(got), jax.tree.leaves(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        for part, other in zip(a.addressable_shards, b.addressable_shards, strict=True):
            np.testing.assert_array_equal(np.asarray(part.data), np.asarray(other.data))
