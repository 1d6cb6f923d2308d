"""Steps 1 and 2: count the tokens of every expert, and share the counts between ranks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lplb_jax import _native, reference
from lplb_jax._axes import check_axis
from lplb_jax._problem import check_array, check_count, check_indices
from lplb_jax.comm import Comm, check_comm


def count_loads(indices: Any, n_logical: int) -> jax.Array:
    """Counts the tokens routed to every logical expert.

    Args:
      indices: int32, int64, uint8 or uint16 of any shape: logical expert ids. −1, or the largest
        value of an unsigned type unless that is an id, means no expert; other ids outside
        0 … n_logical − 1 are skipped as well.
      n_logical: logical experts.

    Returns:
      int32 `[n_logical]`.

    Raises:
      TypeError: `indices` is of another type.
      ValueError: `n_logical` is not a positive integer.

    >>> count_loads(jnp.array([[0, 2], [2, -1]]), 3).tolist()
    [1, 0, 2]
    """
    n_logical = check_count("n_logical", n_logical)
    return lax.slice_in_dim(count(check_indices(indices), n_logical), 0, n_logical)


def sync_loads(counts: jax.Array, axis_name: Any, *, comm: Comm | None = None) -> jax.Array:
    """Gathers every rank's counts on all ranks. Call it inside `jax.shard_map`.

    Args:
      counts: int32 `[n]`, this rank's tokens per expert.
      axis_name: the expert-parallel mesh axis (or a tuple of axes).
      comm: from `init_comm`, several times faster than `lax.all_gather`, which is used for None. As
        with any collective, all ranks must make the same calls in the same order, so not under a
        `lax.cond` whose predicate differs between ranks; `vmap` over it raises.

    Returns:
      int32 `[ep_size, n]`, equal on all ranks (`shard_map` knows that: `out_specs=P()` passes). If
      a rank does not arrive within `comm.timeout_s`, all entries are −1, and the next use of comm
      raises.

    Raises:
      TypeError: `counts` is not an int32 array, or comm is not a Comm.
      ValueError: `axis_name` is not in scope or differs from comm's; comm is closed or was made for
        fewer experts.

    >>> mesh = jax.sharding.Mesh(jax.devices()[:1], "ep")
    >>> spec = jax.sharding.PartitionSpec
    >>> def sync(counts):
    ...     return sync_loads(counts, "ep")
    >>> sync = jax.shard_map(sync, mesh=mesh, in_specs=spec("ep"), out_specs=spec())
    >>> sync(jnp.array([3, 1])).tolist()
    [[3, 1]]
    """
    check_axis(axis_name)
    if not isinstance(counts, list | tuple):
        check_array("counts", counts, "int32 [n]")
    counts = jnp.asarray(counts)
    if counts.dtype != jnp.int32 or counts.ndim != 1:
        raise TypeError(f"counts: expected int32 [n], got {counts.dtype.name} {list(counts.shape)}")
    check_comm(comm, axis_name, counts.size)
    return all_gather_counts(counts, axis_name, comm)


def all_gather_counts(counts: jax.Array, axis_name: Any, comm: Comm | None) -> jax.Array:
    """`sync_loads` of checked arguments."""
    if comm is None or comm.transport == "xla":
        return lax.all_gather(counts, axis_name, to="invarying")
    return _native.call(
        "lplb_sync",
        reference.sync,
        counts,
        lax.axis_index(axis_name),
        axis_name=axis_name,
        comm=comm.identifier,
    )


def count(indices: jax.Array, n_logical: int) -> jax.Array:
    """Counts `[n_logical + 1]` of checked indices; the last entry counts invalid ids."""
    return _native.call("lplb_count", reference.count, indices.reshape(-1), n_logical=n_logical)
