"""verify(): whether a result is valid and optimal, checked independently of the solvers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.core
import numpy as np

from lplb_jax._problem import check_problem
from lplb_jax.placement import Placement
from lplb_jax.solver import Split, TileSplit
from lplb_jax.status import Status


def verify(
    loads: Any,
    split: Split | TileSplit,
    r2o: Any = None,
    *,
    placement: Placement | None = None,
    indices: Any = None,
    physical_indices: Any = None,
    tile: int | None = None,
    base_load: Any = None,
) -> list[str]:
    """Checks a `Split` of whole tokens and, if given, the assignment of tokens to slots.

    It shares no code with the solvers. On the host, in Python integers and from `phy2log` alone, it
    computes the fewest tokens that the busiest rank can have and a set of ranks that proves it. It
    takes milliseconds for 8 ranks and a second for hundreds. Only for ranks of equal speed.

    Args:
      loads: integers `[n_logical]`, or `[ep_size, n_logical]` by source rank, as given to `solve`.
        None: counted from `indices`.
      split: result of `solve` or `rebalance` for these loads, of one layer.
      r2o: static topology `[group_size, n_columns]`; None for the placement's.
      placement: where the experts are; None for the given order.
      indices: integers of any shape, the logical ids of all source ranks, to verify their routing
        as well. Ids that name no expert get slot −1.
      physical_indices: the slots assigned to them, of the same shape.
      tile: as given to `solve`. Then `max_load` and `lower_bound` are verified in tiles, and
        `max_tokens` against the quotas, but not that it is minimal for these tiles.
      base_load: integers `[ep_size]`, as given to `solve`.

    Returns:
      One sentence per fault. The list is empty if the quotas are valid, the busiest rank of each
      group has the fewest tokens possible, `lower_bound` proves it, status is 0, and every slot
      gets its quota of tokens of its own expert.

    Raises:
      TypeError, ValueError: an argument is traced, of another type or of another shape.

    Source: maximum flow by shortest augmenting paths (Edmonds and Karp), Newton steps on the cut
    ratio (Dinkelbach).

    >>> loads, ring = jnp.array([9, 1, 1, 1], jnp.int32), topologies.ring(2)
    >>> split = solve(loads, ring)
    >>> verify(loads, split, ring)
    []
    >>> for fault in verify(loads, split._replace(quota=jnp.array([6, 1, 0, 1, 1, 3])), ring):
    ...     print(fault)
    group 0: max_load is 6, the busiest rank's quotas sum to 7
    group 0: the busiest rank has 7 tokens, 6 are possible
    """
    if (indices is None) != (physical_indices is None):
        raise ValueError("physical_indices: expected the slots of indices, got only one of the two")
    placement, group_size, tokens = _operands(loads, indices, r2o, placement)
    n_groups = placement.ep_size // group_size
    quota, *found = _of_split(split, placement.n_physical, n_groups)
    if (tile is None) == isinstance(split, TileSplit):
        raise ValueError(f"tile: expected the tile that solve was called with, got {tile!r}")
    base, tile = _base_load(base_load, placement.ep_size), tile or 1
    phy2log = jax.device_get(placement.phy2log)

    faults = list(_illegal(quota, phy2log, tokens))
    rank = np.arange(len(phy2log)) // (len(phy2log) // placement.ep_size)
    hosts = [sorted(set(rank[phy2log == expert].tolist())) for expert in range(len(tokens))]
    for group in range(n_groups):
        members = range(group * group_size, (group + 1) * group_size)
        mine = [expert for expert, ranks in enumerate(hosts) if ranks[0] in members]
        # What a rank has anyway is an expert more, which is nowhere else.
        best = fewest_possible(
            [-(-tokens[e] // tile) for e in mine] + [base[member] for member in members],
            [hosts[e] for e in mine] + [[member] for member in members],
            members,
        )
        of_ranks = [quota[rank == member] for member in members]
        tiles = (-(-mine // tile) for mine in of_ranks)
        busiest = max(sum(n.tolist()) + base[m] for n, m in zip(tiles, members, strict=True))
        said = (int(field[group]) for field in found[:3])
        faults += [f"group {group}: {fault}" for fault in _not_optimal(busiest, *best, *said)]
        most = max(sum(n.tolist()) + tile * base[m] for n, m in zip(of_ranks, members, strict=True))
        if len(found) > 3 and found[3][group] != most:
            said_most = f"max_tokens is {found[3][group]:,}"
            faults.append(f"group {group}: {said_most}, the quotas of a rank sum to {most:,}")
    if indices is not None:
        faults += _misrouted(indices, physical_indices, quota, phy2log, len(tokens))
    return faults


def fewest_possible(
    loads: Sequence[int], hosts: Sequence[Sequence[int]], ranks: Iterable[int]
) -> tuple[int, list[int]]:
    """The fewest tokens that the busiest of `ranks` can have, and a set of ranks that proves it.

    Some rank of a set S has at least ⌈tokens of experts whose hosts all lie in S / |S|⌉. Beginning
    with each expert on its first host, tokens move along shortest paths from ranks above a target
    to ranks below it. When no path is left, the ranks that can be reached are a set S whose bound
    exceeds the target, and becomes the next one.

    Args:
      loads: tokens of every expert.
      hosts: the ranks with a slot of every expert, each once.
      ranks: all ranks of the group.

    Returns:
      Tokens; and the ranks of S, in order.

    >>> fewest_possible([9, 1, 1, 1], [[0, 1], [0], [0, 1], [1]], range(2))
    (6, [0, 1])
    >>> fewest_possible([9, 1, 1, 1], [[0], [0], [0, 1], [1]], range(2))
    (10, [0])
    """
    proof = sorted(ranks)
    load = dict.fromkeys(proof, 0)
    served = [dict.fromkeys(mine, 0) for mine in hosts]
    hosted: dict[int, list[int]] = {rank: [] for rank in proof}
    for expert, mine in enumerate(hosts):
        served[expert][mine[0]] = loads[expert]
        load[mine[0]] += loads[expert]
        for rank in mine:
            hosted[rank].append(expert)
    target = -(-sum(loads) // len(proof))
    while max(load.values()) > target:
        below, came_from = _search(load, served, hosted, target)
        if below is None:
            proof = sorted(came_from)
            confined = sum(
                n for n, mine in zip(loads, hosts, strict=True) if came_from.keys() >= set(mine)
            )
            target = -(-confined // len(proof))
        else:
            _shift(load, served, target, below, came_from)
    return target, proof


# How a rank was reached: from which rank, and by moving whose tokens; None where a search begins.
_Paths = dict[int, tuple[int, int] | None]


def _search(
    load: dict[int, int], served: list[dict[int, int]], hosted: dict[int, list[int]], target: int
) -> tuple[int | None, _Paths]:
    """The nearest rank below the target that tokens can move to from one above; None without."""
    came_from: _Paths = {rank: None for rank, n in load.items() if n > target}
    reached = list(came_from)
    for rank in reached:
        for expert in hosted[rank]:
            if served[expert][rank] == 0:
                continue
            for other in served[expert]:
                if other not in came_from:
                    came_from[other] = rank, expert
                    reached.append(other)
                    if load[other] < target:
                        return other, came_from
    return None, came_from


def _shift(
    load: dict[int, int],
    served: list[dict[int, int]],
    target: int,
    below: int,
    came_from: _Paths,
) -> None:
    """Moves as many tokens to the rank below the target as its path allows."""
    moves, rank = [], below
    while step := came_from[rank]:
        moves.append((*step, rank))
        rank = step[0]
    left = min(served[expert][giver] for giver, expert, _ in moves)
    amount = min(left, target - load[below], load[rank] - target)
    for giver, expert, taker in moves:
        served[expert][giver] -= amount
        served[expert][taker] += amount
    load[rank] -= amount
    load[below] += amount


def _operands(
    loads: Any, indices: Any, r2o: Any, placement: Placement | None
) -> tuple[Placement, int, list[int]]:
    """The placement, the ranks of a group, and the tokens of every expert."""
    if loads is None:
        if indices is None or placement is None:
            raise ValueError(
                "loads: expected integers, got None; give loads, or indices and placement"
            )
        ids = _integers("indices", indices)
        known = ids[(ids >= 0) & (ids < placement.n_logical)]
        loads = np.bincount(known, minlength=placement.n_logical)
    loads = _integers("loads", loads)
    problem = check_problem(loads, r2o, placement, axis_name=None)
    # Negative loads count as 0.
    per_expert = loads.astype(object).clip(0).reshape(-1, problem.n_logical).sum(axis=0)
    return problem.placement, len(problem.r2o), per_expert.tolist()


def _base_load(base_load: Any, ep_size: int) -> list[int]:
    """What every rank has anyway."""
    if base_load is None:
        return [0] * ep_size
    base = _integers("base_load", base_load)
    if base.shape != (ep_size,):
        raise ValueError(
            f"base_load: expected shape [ep_size] = [{ep_size}], got {list(base.shape)}"
        )
    return base.clip(0).tolist()


def _of_split(split: Split | TileSplit, n_physical: int, n_groups: int) -> Iterator[np.ndarray]:
    """The fields of a split of whole tokens, in their order."""
    if not isinstance(split, Split | TileSplit):
        raise TypeError(f"split: expected a Split, got {type(split).__name__}")
    for name, field in split._asdict().items():
        array, size = _integers(f"split.{name}", field), n_physical if name == "quota" else n_groups
        if array.shape != (size,):
            raise ValueError(f"split.{name}: expected shape [{size}], got {list(array.shape)}")
        yield array


def _integers(name: str, array: Any) -> np.ndarray:
    """An array of integers on the host, in a type that has −1 and every id and sum."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(array)):
        raise TypeError(f"{name}: expected an array known on the host, got a traced value")
    array = np.asarray(jax.device_get(array))
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got dtype {array.dtype}")
    return array.astype(np.int64)


def _illegal(quota: np.ndarray, phy2log: np.ndarray, tokens: list[int]) -> Iterator[str]:
    """Where the quotas do not serve every token of every expert once."""
    if (quota < 0).any():
        slot = int(np.argmax(quota < 0))
        yield f"slot {slot} has a quota of {quota[slot]:,}, expected at least 0"
    empty = (phy2log < 0) & (quota != 0)
    if empty.any():
        slot = int(np.argmax(empty))
        yield f"slot {slot} is empty and has a quota of {quota[slot]:,}, expected 0"
    for expert, load in enumerate(tokens):
        served = sum(quota[phy2log == expert].tolist())
        if served != load:
            yield f"expert {expert} has {load:,} tokens, the quotas of its slots sum to {served:,}"
            return


def _not_optimal(
    busiest: int, fewest: int, proof: list[int], max_load: int, lower_bound: int, status: int
) -> Iterator[str]:
    """What a group's result says that is not so."""
    if status:
        yield f"status is {Status(status)!r}, expected 0"
    if max_load != busiest:
        yield f"max_load is {max_load:,}, the busiest rank's quotas sum to {busiest:,}"
    if busiest != fewest:
        yield f"the busiest rank has {busiest:,} tokens, {fewest:,} are possible"
    if lower_bound != fewest:
        yield f"lower_bound is {lower_bound:,}, ranks {proof} prove {fewest:,}"


def _misrouted(
    indices: Any, physical_indices: Any, quota: np.ndarray, phy2log: np.ndarray, n_logical: int
) -> Iterator[str]:
    """Where tokens were sent to slots of others, or slots got more or less than their quota."""
    ids = _integers("indices", indices).ravel()
    slots = _integers("physical_indices", physical_indices).ravel()
    if np.shape(indices) != np.shape(physical_indices):
        raise ValueError(
            f"physical_indices: expected the shape of indices, {list(np.shape(indices))}, got "
            f"{list(np.shape(physical_indices))}"
        )
    in_range = (slots >= 0) & (slots < len(phy2log))
    expected = np.where((ids >= 0) & (ids < n_logical), ids, -1)
    got = np.where(in_range, phy2log[np.where(in_range, slots, 0)], -1)
    wrong = (got != expected) | (~in_range & (slots != -1))
    if wrong.any():
        yield f"{wrong.sum():,} tokens were sent to a slot without their expert"
    counted = np.bincount(slots[in_range], minlength=len(phy2log))
    off_quota = np.count_nonzero(counted != quota)
    if off_quota:
        yield f"{off_quota:,} slots got another number of tokens than their quota"
