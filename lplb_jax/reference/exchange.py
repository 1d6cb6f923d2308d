"""Tokens to rows on all ranks, and rows to tokens: each other's transposes.

`row` is rank · capacity + row, or −1 if a choice goes nowhere. `order` is a token's place in its
list to another rank, given at its first choice for that rank, and −1 elsewhere. `lists` holds for
each rank: the tokens sent there, where their list starts in that rank's window, and where that
rank's list starts in this window; then, for the way back, where this rank's list starts in that
window and that rank's in this one. Without gates, both `gates` and `row_gates` are empty.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int32

SIZES_SENT, STARTS_THERE, STARTS_HERE, STARTS_HOME, STARTS_RETURN = range(5)


def there(
    tokens: Float[Array, "tokens hidden"],
    gates: Float[Array, "tokens top_k_or_0"],
    row: Int32[Array, "tokens top_k"],
    order: Int32[Array, "tokens top_k"],
    lists: Int32[Array, "lists ep_size"],
    rank: Int32[Array, ""],
    *,
    axis_name: Any,
    capacity: int,
    n_received: int,
    n_sent: int,
    comm: int,
    sms: int,
) -> tuple[
    Float[Array, "capacity hidden"],
    Float[Array, " capacity_or_0"],
    Int32[Array, "n_received top_k"],
    Int32[Array, " ep_size"],
]:
    """Rows, their gates, the rows of every token from another rank, and the number of tokens."""
    del n_sent, comm, sms  # The result does not depend on how tokens are moved.

    def of_all(array: Array) -> Array:
        return lax.all_gather(array, axis_name)

    top_k = row.shape[1]
    everyones = of_all(row)
    local = jnp.where(everyones // capacity == rank, everyones % capacity, -1)
    local = jnp.where(everyones < 0, -1, local)  # [ep_size, tokens, top_k]
    place = jnp.where(local < 0, capacity, local).reshape(-1)
    copies = jnp.repeat(of_all(tokens).reshape(-1, tokens.shape[1]), top_k, axis=0)
    rows = jnp.zeros((capacity, tokens.shape[1]), tokens.dtype).at[place].set(copies, mode="drop")
    row_gates = jnp.zeros(capacity if gates.size else 0, gates.dtype)
    if gates.size:
        row_gates = row_gates.at[place].set(of_all(gates).reshape(-1), mode="drop")

    first = jnp.where(local >= 0, of_all(order), -1).max(axis=2)  # [ep_size, tokens]
    slot = lists[STARTS_HERE][:, None] + first
    slot = jnp.where(first < 0, n_received, slot).reshape(-1)
    numbers = jnp.full((n_received, top_k), -1, jnp.int32)
    numbers = numbers.at[slot].set(local.reshape(-1, top_k), mode="drop")
    return rows, row_gates, numbers, of_all(lists[SIZES_SENT])[:, rank]


def back(
    rows: Float[Array, "capacity hidden"],
    row_gates: Float[Array, " capacity_or_0"],
    row: Int32[Array, "tokens top_k"],
    order: Int32[Array, "tokens top_k"],
    lists: Int32[Array, "lists ep_size"],
    rank: Int32[Array, ""],
    numbers: Int32[Array, "n_received top_k"],
    sizes: Int32[Array, " ep_size"],
    *,
    axis_name: Any,
    capacity: int,
    n_received: int,
    n_sent: int,
    comm: int,
    sms: int,
) -> tuple[Float[Array, "tokens hidden"], Float[Array, "tokens top_k_or_0"]]:
    """Sums of a token's rows, first per rank, rounded, then over ranks; and its gates."""
    del order, lists, rank, numbers, sizes, n_received, n_sent, comm, sms
    wide = jnp.promote_types(rows.dtype, jnp.float32)
    everyones = lax.all_gather(rows, axis_name)
    n_tokens, top_k = row.shape

    def pick(of_ranks: Array, choice: Array) -> Array:
        picked = of_ranks.reshape(-1, *of_ranks.shape[2:])[jnp.maximum(choice, 0)]
        return jnp.where((choice >= 0).reshape(-1, *[1] * (picked.ndim - 1)), picked, 0)

    def of_rank(total: Array, number: Array) -> tuple[Array, None]:
        partial = jnp.zeros((n_tokens, rows.shape[1]), wide)
        for k in range(top_k):
            choice = jnp.where(row[:, k] // capacity == number, row[:, k], -1)
            partial += pick(everyones, choice).astype(wide)
        return total + partial.astype(rows.dtype).astype(wide), None

    zero = jnp.zeros((n_tokens, rows.shape[1]), wide) + 0 * everyones[0, 0].astype(wide)
    total, _ = lax.scan(of_rank, zero, jnp.arange(len(everyones), dtype=jnp.int32))
    gates = jnp.zeros((n_tokens, 0), row_gates.dtype)
    if row_gates.size:
        gates = pick(lax.all_gather(row_gates, axis_name), row.reshape(-1)).reshape(row.shape)
    return total.astype(rows.dtype), gates


def weights_there(
    *operands: Array, arrays: int, first_row: int, **options: Any
) -> tuple[Array, ...]:
    """`there` for experts' weights, `[experts, rows, hidden]` in each of `arrays`.

    An expert's rows are numbered through the arrays. Tokens are the rows of the experts that the
    next operand, `sent`, lists; the others there have no row in `row`. They come to rows from
    `first_row` on, among the weights themselves, which stay where nothing comes. The other operands
    and results are those of `there`.
    """
    del first_row  # Those before survive a failure, too.
    weights, sent, routing = operands[:arrays], operands[arrays], operands[arrays + 1 :]
    tokens = _joined(tuple(array.at[sent].get(mode="fill", fill_value=0) for array in weights))
    came, *others = there(tokens, *routing, **options)
    comes, *_ = there(jnp.ones_like(tokens[:, :1]), *routing, **options)
    rows = jnp.where(comes > 0, came, _joined(weights))
    return *_parted(rows, weights), *others


def weights_back(*operands: Array, arrays: int, **options: Any) -> tuple[Array, ...]:
    """`back` for gradients of what `weights_there` returns; undefined for experts not sent."""
    weights, others = operands[:arrays], operands[arrays:]
    sums, gates = back(_joined(weights), *others, **options)
    return *_parted(sums, weights), gates


def _joined(weights: tuple[Array, ...]) -> Array:
    """The rows of all experts, `[experts · rows, hidden]`."""
    return jnp.concatenate(weights, axis=1).reshape(-1, weights[0].shape[2])


def _parted(rows: Array, like: tuple[Array, ...]) -> list[Array]:
    """The inverse of `_joined`, for any number of experts."""
    ends = np.cumsum([array.shape[1] for array in like])
    rows = rows.reshape(-1, ends[-1], rows.shape[1])
    return [rows[:, end - array.shape[1] : end] for end, array in zip(ends, like, strict=True)]
