"""Base loads: other work of the ranks, such as shared experts or a part of attention."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Int32

from lplb_jax.reference.sums import INT32_MAX


class BaseLoad(NamedTuple):
    """The base loads of all ranks, or of a group's."""

    tiles: Int32[Array, "*n_ranks"]  # the unit in which loads are balanced
    tokens: Int32[Array, "*n_ranks"]  # at most 2³¹ − 1
    too_large: Bool[Array, "*n_ranks"]  # whether `tokens` was capped
    negative: Bool[Array, "*n_ranks"]  # counts as 0

    def none_if(self, overflow: Bool[Array, ""]) -> BaseLoad:
        """Zero base loads if `overflow`, where nothing is balanced."""
        tiles, tokens = (jnp.where(overflow, 0, load) for load in self[:2])
        return self._replace(tiles=tiles, tokens=tokens)


def base_load_of(given: Int32[Array, "*n_ranks"], tile: int) -> BaseLoad:
    """Base loads from tiles of `tile` tokens; with `tile` 1, from tokens."""
    tiles = jnp.maximum(given, 0)
    too_large = tiles > INT32_MAX // tile
    tokens = jnp.where(too_large, INT32_MAX, tiles * tile)
    return BaseLoad(tiles, tokens, too_large, given < 0)
