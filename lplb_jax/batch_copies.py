"""place_copies(): copies chosen after a batch has been counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax

from lplb_jax import _native, reference
from lplb_jax._problem import check_count, check_loads, check_problem
from lplb_jax.placement import Placement

# Where a rank's copies come from: `rebalance` and `moe_layer` take one of these.
CopiesFrom = Literal["placement", "batch"]
COPIES = get_args(CopiesFrom)


def place_copies(loads: Any, placement: Placement, *, fan_out: int | None = None) -> Placement:
    """Fills a placement's redundant slots with the copies that the batch at hand needs.

    For a layer whose copies' weights are fetched in every step anyway, as in training: then nothing
    has to be known of earlier batches. With one copy or two per rank, the busiest rank gets 1.00 to
    1.04 times the mean, whatever the loads are. Homes stay where they are, so parameters and their
    gradients do not move. Works inside `jax.jit`, where `loads` and `placement` are traced, and
    under `vmap`, with a layer's placement for each of them.

    The busiest rank hands its hottest expert to the emptiest rank with a free slot until no rank is
    above a target. Of 32 targets between the mean and the largest load the lowest that can be had
    is taken, or one at most 1/512 of the mean above it that needs fewer copies. All is integers in
    a fixed order: ranks with equal loads choose equal copies, on every backend.

    Args:
      loads: int32 tokens per expert, `[n_logical]` or, by source rank, `[ep_size, n_logical]`.
        Negative loads count as 0. Where all together pass 2³¹ − 1, no copies are chosen.
      placement: any one. Its homes, `log2phy[:, 0]`, are kept in their slots. All its other slots
        are filled anew, whatever they hold; −1, empty, where no copy helps.
      fan_out: how many copies of its experts a rank may send at most; None for any number. Hot
        experts may need up to `ep_size − 1`, and a limit then costs balance.

    Returns:
      A `Placement` without topology, for `solve`, `assign` and `moe.moe_layer`, with `log2phy`
      `[n_logical, width]`, where `width` is the least of `ep_size`, `fan_out` + 1 and the number of
      redundant slots + 1. No expert is twice on a rank. The largest load that `solve` finds for it
      is never above that without copies. Where a traced placement contradicts itself, the result
      does, and `Split.status` tells; so it does of negative loads.

    Raises:
      TypeError, ValueError: at trace time; the message names the argument.

    Source: the method and its order in `lplb_jax.reference`; UltraEP and MoonEP choose copies per
    batch, too.

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
    """`place_copies` of checked arguments; rows may carry a last place for ids without expert."""
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


def with_copies(placement: Placement, tables: Sequence[jax.Array]) -> Placement:
    """The placement of these tables, phy2log, log2phy and logcnt, on the same ranks and nodes."""
    phy2log, log2phy, logcnt = tables
    return Placement(phy2log, log2phy, logcnt, placement.ep_size, None, placement.n_nodes)


def check_copies(copies: str, r2o: Any, fan_out: Any, placement: Placement | None) -> int | None:
    """How many copies a rank may send if they are chosen for the batch; None if they are not.

    Raises where other arguments do not fit that.
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
    """`fan_out`, or a number that is no limit; raises where there is no placement to refill."""
    if not isinstance(placement, Placement):
        raise TypeError(
            f"placement: expected a lplb_jax.Placement, whose homes and number of slots are kept, "
            f"got {type(placement).__name__}; make one with place_experts or Placement.from_phy2log"
        )
    most = placement.n_physical
    return most if fan_out is None else min(check_count("fan_out", fan_out), most)
