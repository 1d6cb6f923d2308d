"""Derives a placement's other tables from the experts of its slots, on the host and traced."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from lplb_jax import _host, _native, reference


def log2phy_of(
    xp: ModuleType, phy2log: Any, homes: Any, ep_size: int, n_logical: int
) -> tuple[Any, Any]:
    """log2phy `[n_logical, n_physical − n_logical + 1]` and logcnt of one table `[n_physical]`.

    An expert's home comes first, then its first slots on other ranks in rank order, then further
    slots on ranks that already have one, then −1. `homes[e]` is the home of e, out of range if it
    has none. Slots with invalid ids count as empty. `xp` is NumPy or jax.numpy.
    """
    n_physical = phy2log.shape[0]
    expert = xp.where((phy2log >= 0) & (phy2log < n_logical), phy2log, n_logical)
    slot = xp.arange(n_physical, dtype=xp.int32)
    is_home = homes[xp.minimum(expert, n_logical - 1)] == slot
    by_rank = expert.reshape(ep_size, -1)
    earlier = xp.tril(by_rank[:, :, None] == by_rank[:, None, :], -1).any(axis=2).reshape(-1)
    key = 3 * expert + xp.where(is_home, 0, xp.where(earlier, 2, 1)).astype(xp.int32)
    order = xp.argsort(key, stable=True).astype(xp.int32)
    experts = xp.arange(n_logical, dtype=xp.int32)
    first = xp.searchsorted(expert[order], experts, side="left").astype(xp.int32)
    logcnt = xp.searchsorted(expert[order], experts, side="right").astype(xp.int32) - first
    nth = xp.arange(n_physical - n_logical + 1, dtype=xp.int32)
    of_expert = order[xp.minimum(first[:, None] + nth, n_physical - 1)]
    return xp.where(nth < logcnt[:, None], of_expert, xp.int32(-1)), logcnt


def check_phy2log(phy2log: Any, ep_size: int, n_logical: int | None) -> tuple[Any, int]:
    """The table as int32 `[..., n_physical]`, and n_logical.

    Raises if shape or dtype are wrong and, for concrete values, if an id is out of range or an
    expert has no slot.
    """
    traced = isinstance(phy2log, jax.core.Tracer)
    table = phy2log if traced else _host.array_of("phy2log", phy2log, "integers")
    if not np.issubdtype(table.dtype, np.integer):
        raise TypeError(f"phy2log: expected integers, got {table.dtype}")
    if traced and table.dtype != np.int32:
        # Wide ids could wrap around to valid ones.
        raise TypeError(f"phy2log: expected int32 where it is traced, got {table.dtype}")
    shape: tuple[int, ...] = table.shape
    flat = len(shape) == 1 and shape[0] % ep_size == 0
    by_rank = len(shape) in (2, 3) and shape[-2:-1] == (ep_size,)
    if not (flat or by_rank) or 0 in shape:
        raise ValueError(
            f"phy2log: expected shape [ep_size, slots_per_rank], [layers, ep_size, slots_per_rank] "
            f"or [n_physical], n_physical a multiple of ep_size = {ep_size}, got {list(shape)}; "
            f"reshape a table [layers, n_physical] to [layers, {ep_size}, -1]"
        )
    if n_logical is None and traced:
        raise ValueError("n_logical: expected the number of experts where phy2log is traced")
    most = int(np.prod(shape[-2:]))
    if n_logical is not None:
        if not isinstance(n_logical, int | np.integer):
            raise TypeError(f"n_logical: expected an integer or None, got {n_logical!r}")
        if not 1 <= n_logical <= most:
            raise ValueError(
                f"n_logical: expected 1 to n_physical = {most} experts, got {int(n_logical)}"
            )
    if isinstance(table, np.ndarray):
        table = _host.with_minus_one(table, n_logical)
        n_logical = int(table.max()) + 1 if n_logical is None else n_logical
        _check_values(table, int(n_logical))
        table = table.astype(np.int32)
    assert n_logical is not None
    return table.reshape(*shape[: max(len(shape) - 2, 0)], -1), int(n_logical)


def _check_values(table: np.ndarray, n_logical: int) -> None:
    wrong = (table < -1) | (table >= n_logical)
    if wrong.any():
        at = [int(i) for i in np.argwhere(wrong)[0]]
        raise ValueError(
            f"phy2log: expected logical experts 0 to {n_logical - 1}, or −1 for an empty slot, got "
            f"{table[tuple(at)]} at {at}"
        )
    if n_logical == 0:
        raise ValueError("phy2log: expected logical experts, got empty slots only")
    layers = table.reshape(table.shape[0] if table.ndim == 3 else 1, -1)
    for layer, row in enumerate(layers):
        # An id may be far beyond the slots; then an expert below their number has none.
        missing = np.ones(min(n_logical, len(row) + 1), bool)
        missing[row[(row >= 0) & (row < len(missing))]] = False
        if missing.any():
            where = f" in layer {layer}" if table.ndim == 3 else ""
            raise ValueError(
                f"phy2log: expected a slot for each of the {n_logical} experts, got none for "
                f"expert {missing.argmax()}{where}"
            )


def warn_of_layers(rows: np.ndarray, n_logical: int) -> None:
    """Warns if the ranks' rows look like layers: each with all experts, some of them twice.

    Ranks could have them, but no use for the second ones. EPLB's tables are `[layers, n_physical]`,
    which has the shape of one by rank if there are as many layers as ranks.
    """
    ep_size, n_slots = rows.shape
    if ep_size == 1 or n_slots <= n_logical or n_slots % ep_size or (rows < 0).any():
        return
    if all(len(np.unique(row)) == n_logical for row in rows):
        _native.warn_once(
            f"phy2log: each of {ep_size} rows holds all {n_logical} experts, some of them twice. "
            f"Rows are ranks; if these are layers, pass phy2log.reshape({ep_size}, {ep_size}, -1)"
        )


def other_tables(phy2log: Any, ep_size: int, n_logical: int) -> tuple[Any, Any]:
    """log2phy and logcnt of a checked table `[n_physical]` or `[layers, n_physical]`."""
    if isinstance(phy2log, jax.core.Tracer):
        function = functools.partial(_traced_tables, ep_size=ep_size, n_logical=n_logical)
        return (jax.vmap(function) if phy2log.ndim == 2 else function)(phy2log)
    if phy2log.ndim == 1:
        return _host_tables(phy2log, ep_size, n_logical)
    log2phy, logcnt = zip(*(_host_tables(row, ep_size, n_logical) for row in phy2log), strict=True)
    return np.stack(log2phy), np.stack(logcnt)


def _host_tables(
    phy2log: np.ndarray, ep_size: int, n_logical: int
) -> tuple[np.ndarray, np.ndarray]:
    def solve(*operands: Any, ep_size: int) -> Any:
        return reference.solve(*map(jnp.asarray, operands), ep_size=ep_size)

    cpu = _native.cpu()
    if cpu is None:
        with jax.ensure_compile_time_eval():
            homes = np.asarray(_homes(solve, jnp.asarray(phy2log), ep_size, n_logical))
    else:
        homes = np.empty(n_logical, np.int32)
        cpu.homes(np.ascontiguousarray(phy2log), ep_size, homes)
    return log2phy_of(np, phy2log, homes, ep_size, n_logical)


def _traced_tables(phy2log: jax.Array, ep_size: int, n_logical: int) -> tuple[jax.Array, jax.Array]:
    def solve(*operands: Any, ep_size: int) -> Any:
        return _native.call("lplb_solve", reference.solve, *operands, ep_size=ep_size)

    homes = _homes(solve, phy2log, ep_size, n_logical)
    return log2phy_of(jnp, phy2log, homes, ep_size, n_logical)


def _homes(solve: Any, phy2log: Any, ep_size: int, n_logical: int) -> Any:
    """Every expert's home slot, such that homes are spread over the ranks as evenly as possible.

    The exact solver balances loads of one token each; the token marks the home. n_physical if an
    expert has no slot.
    """
    one_each = jnp.ones((1, n_logical), jnp.int32)
    no_log2phy = jnp.full((n_logical, 1), -1, jnp.int32)
    no_columns = np.zeros((ep_size, 0), np.int32)
    quota, *_ = solve(one_each, phy2log, no_log2phy, no_columns, ep_size=ep_size)
    n_physical = phy2log.shape[0]
    slot = jnp.arange(n_physical, dtype=jnp.int32)
    expert = jnp.where(quota > 0, phy2log, n_logical)
    return jnp.full(n_logical, n_physical, jnp.int32).at[expert].set(slot, mode="drop")
