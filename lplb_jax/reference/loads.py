"""Counting: tokens per logical expert."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Int32, Integer


def count(indices: Integer[Array, " tokens"], *, n_logical: int) -> Int32[Array, " bins"]:
    """Tokens per expert, followed by the number of ids that name no expert."""
    bins = expert_or_none(indices, n_logical)
    bins = jnp.where(bins >= 0, bins, jnp.where(is_absent(indices), n_logical + 1, n_logical))
    return jnp.zeros(n_logical + 2, jnp.int32).at[bins].add(1)[: n_logical + 1]


def sync(
    counts: Int32[Array, " row"], rank: Int32[Array, ""], *, axis_name: Any, comm: int
) -> Int32[Array, "ep_size row"]:
    """The counts of all ranks of `axis_name`, by rank."""
    del rank, comm  # The result does not depend on how counts are exchanged.
    return lax.all_gather(counts, axis_name, to="invarying")


def expert_or_none(indices: Integer[Array, "..."], n_logical: int) -> Int32[Array, "..."]:
    """The ids as int32, −1 if they name no expert."""
    valid = indices >= 0
    if n_logical <= jnp.iinfo(indices.dtype).max:
        valid &= indices < n_logical
    return jnp.where(valid, indices.astype(jnp.int32), -1)


def is_absent(indices: Integer[Array, "..."]) -> Bool[Array, "..."]:
    """Whether a token chose no expert: −1, or the largest value of an unsigned dtype."""
    info = jnp.iinfo(indices.dtype)
    return indices == (info.max if info.min == 0 else -1)
