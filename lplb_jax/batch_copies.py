"""place_copies(): copies chosen after a batch has been counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax

from lplb_jax import _native, reference
from lplb_jax._problem import Problem, check_count, check_loads, check_problem
from lplb_jax.placement import Placement
from lplb_jax.solver import Split

# Where a rank's copies come from: `rebalance` and `moe_layer` take one of these.
CopiesFrom = Literal["placement", "batch"]
COPIES = get_args(CopiesFrom)


def place_copies(loads: Any, placement: Placement, *, fan_out: int | None = None) -> Placement:
    """Fills a placement's redundant slots with the copies that the batch at hand needs.

    Intended for layers that fetch their copies' weights in every step anyway, as in training. It
    needs no history. With one or two copies per rank, the busiest rank gets 1.00 to 1.04 times the
    mean, for any loads. Homes stay, so parameters and their gradients do not move. Works inside
    `jax.jit` with traced `loads` and `placement`, and under `vmap` over layers with one placement
    each.

    The busiest rank hands its hottest expert to the emptiest rank with a free slot until no rank is
    above a target. Of 32 targets between the mean and the largest load, the lowest feasible one
    is used, or one at most 1/512 of the mean above it that needs fewer copies. The arithmetic is on
    integers in a fixed order: equal loads give equal copies on every rank and backend.

    Args:
      loads: int32 tokens per expert, `[n_logical]` or, by source rank, `[ep_size, n_logical]`.
        Negative loads count as 0. If their sum exceeds 2³¹ − 1, no copies are chosen.
      placement: any placement. Its homes, `log2phy[:, 0]`, keep their slots. All other slots are
        refilled, whatever they hold; they stay empty, −1, if no copy helps.
      fan_out: the most copies of its experts that a rank may send; None for no limit. Hot experts
        may need up to `ep_size − 1`, and then a limit costs balance.

    Returns:
      A `Placement` without topology, for `solve`, `assign` and `moe.moe_layer`, with `log2phy`
      `[n_logical, width]`, where `width` is the least of `ep_size`, `fan_out` + 1 and the number of
      redundant slots + 1. No expert is twice on a rank. The largest load that `solve` finds on it
      never exceeds that without copies. If a traced placement contradicts itself, so does the
      result, and `Split.status` reports it, as it reports negative loads.

    Raises:
      TypeError, ValueError: at trace time; the message names the argument.

    Source: `lplb_jax.reference` specifies the method and its order; UltraEP and MoonEP also choose
    copies per batch.

    Example: two ranks with two experts and a redundant slot each; expert 0 is hot.

    >>> empty = Placement.from_phy2log([[0, 1, -1], [2, 3, -1]], ep_size=2)
    >>> loads = jnp.array([90, 10, 10, 10])
    >>> chosen = place_copies(loads, empty)
    >>> chosen.phy2log.tolist()  # rank 1 gets a copy, rank 0 needs none
    [0, 1, -1, 2, 3, 0]
    >>> solve(loads, placement=chosen).max_load.tolist()
    [60]
    """
    loads = check_loads(loads)
    limit = check_fan_out(fan_out, placement)
    problem = check_problem(loads, None, placement, axis_name=None)
    return copies_for(loads, problem.placement, limit)


def copies_for(loads: jax.Array, placement: Placement, fan_out: int) -> Placement:
    """`place_copies` of checked arguments; rows may have an extra entry for invalid ids."""
    tables = _native.call(
        "lplb_place_copies",
        reference.place_copies,
        loads.reshape(-1, loads.shape[-1]),
        placement.phy2log,
        placement.log2phy,
        ep_size=placement.ep_size,
        fan_out=fan_out,
    )
    return with_copies(placement, tables)


def solve_copies_for(loads: jax.Array, problem: Problem, fan_out: int) -> tuple[Split, Placement]:
    """The exact split over `copies_for` these loads, solved from the one they were found with."""
    placement = problem.placement
    results = _native.call(
        "lplb_solve_copies",
        reference.solve_copies,
        loads.reshape(-1, loads.shape[-1]),
        placement.phy2log,
        placement.log2phy,
        problem.r2o,
        ep_size=placement.ep_size,
        fan_out=fan_out,
    )
    return Split(*results[:4]), with_copies(placement, results[4:])


def with_copies(placement: Placement, tables: Sequence[jax.Array]) -> Placement:
    """The placement of these tables, phy2log, log2phy and logcnt, on the same ranks and nodes."""
    phy2log, log2phy, logcnt = tables
    return Placement(phy2log, log2phy, logcnt, placement.ep_size, None, placement.n_nodes)


def check_copies(copies: str, r2o: Any, fan_out: Any, placement: Placement | None) -> int | None:
    """How many copies a rank may send if they are chosen for the batch; None if they are not.

    Raises if other arguments are inconsistent with that.
    """
    if copies not in COPIES:
        raise ValueError(f"copies: expected one of {', '.join(COPIES)}, got {copies!r}")
    if copies == "placement":
        if fan_out is not None:
            raise ValueError(
                f"fan_out: expected None with copies='placement', which are chosen already, got "
                f"{fan_out!r}; use copies='batch'"
            )
        return None
    if r2o is not None:
        raise ValueError(
            f"r2o: expected None with copies='batch', which may be on any rank, got {r2o!r}; pass "
            f"the placement alone"
        )
    return check_fan_out(fan_out, placement)


def check_fan_out(fan_out: Any, placement: Any) -> int:
    """`fan_out`, or a number that does not limit; raises if there is no placement to refill."""
    if not isinstance(placement, Placement):
        raise TypeError(
            f"placement: expected a lplb_jax.Placement, whose homes and number of slots are kept, "
            f"got {type(placement).__name__}; make one with place_experts or Placement.from_phy2log"
        )
    most = placement.n_physical
    return most if fan_out is None else min(check_count("fan_out", fan_out), most)
