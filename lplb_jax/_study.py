"""Evaluates placements on a workload: their balance, cost and lifetime."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lplb_jax import topologies
from lplb_jax._cost import Costs
from lplb_jax._portfolio import imbalances
from lplb_jax._problem import check_count
from lplb_jax._workload import Workload
from lplb_jax.batch_copies import place_copies
from lplb_jax.placement import Placement, place_experts
from lplb_jax.solver import solve

# Kinds of placements other than along topologies.
GIVEN, PACKED, EVEN = "given order", "packed", "EPLB, even split"
ANY, BATCH = "any ranks", "copies per batch"
_REDUNDANTS = (1, 2, 4, 8)
# The gain that justifies one more redundant slot: in layer time, or in mean load if unknown.
_WORTH = 0.005
# A placement is too old when it costs this much more of the mean than a fresh one.
_TOO_OLD = 0.02
_MOST_SPANS, _LEAST_LATER, _AGEING_LAYERS = 6, 4, 2


class Choice(NamedTuple):
    """One way to place experts, with its balance and cost.

    Attributes:
      placement: "given order": experts in the order of their ids. "packed": by load, without
        copies. "EPLB, even split": EPLB's copies, and equal shares for all copies of an expert.
        "any ranks": `place_experts` without topology. "copies per batch": `place_copies`. Otherwise
        the name of a topology, or "cube of 8" for one in groups of 8 ranks. All but the even split
        are balanced exactly.
      redundants: redundant slots of each rank.
      mean: the largest over the mean rank load, averaged over all batches and layers.
      p99: the 99th percentile of the same ratio.
      bound: the mean of the same ratio for the proven lower bound over the same copies.
      memory: bytes of a rank's copies, in all layers of the model; None if unknown.
      traffic: bytes of copies and of their gradients per rank, layer and step; None if unknown.
      seconds: estimated time of a layer; None if unknown.
      fits: whether the memory is within the budget.
    """

    placement: str
    redundants: int
    mean: float
    p99: float
    bound: float
    memory: float | None
    traffic: float | None
    seconds: float | None
    fits: bool


class Ageing(NamedTuple):
    """How a fixed placement ages.

    Attributes:
      placement: the kind of placement, as in `Choice`.
      redundants: redundant slots of each rank.
      age: batches since it was made, in the middle of each span.
      kept: largest over mean rank load with it.
      fresh: the same with a placement made just before that span.
      refresh_after: batches after which it costs 0.02 of the mean more than a fresh one; None if
        it never does.
    """

    placement: str
    redundants: int
    age: list[float]
    kept: list[float]
    fresh: list[float]
    refresh_after: int | None


def plans(
    n_logical: int,
    ep_size: int,
    redundants: Sequence[int] | None,
    topology: str | None,
    n_nodes: int = 1,
) -> list[tuple[str, int]]:
    """Placements and redundant slots to try; raises if `topology` never fits."""
    n_local = -(-n_logical // ep_size)
    fitting = {
        kind: r2o.n_columns
        for kind, r2o in _along_topologies(ep_size, n_nodes).items()
        if r2o.n_columns <= n_local and n_logical % ep_size == 0
    }
    if topology is not None:
        fitting = _of_name(topology, n_logical, ep_size, fitting)
    if redundants is None:
        most = max(1, min(2 * n_local, n_logical - n_local))
        redundants = [n for n in _REDUNDANTS if n <= most] or [1]
        if topology is not None:
            per_column = {n * n_columns for n in _REDUNDANTS for n_columns in fitting.values()}
            redundants = [n for n in per_column if n <= n_local]
    tried = [(GIVEN, 0), (PACKED, 0)]
    for n in sorted(set(redundants)):
        check_count("redundants", n)
        along = [kind for kind, columns in fitting.items() if n <= n_local and n % columns == 0]
        kinds = along if topology is not None else [EVEN, *along, ANY, BATCH]
        tried += [(kind, int(n)) for kind in kinds]
    if topology is not None and len(tried) == 2:
        columns = " or ".join(map(str, sorted(set(fitting.values()))))
        raise ValueError(
            f"redundants: expected multiples of the {columns} columns of the {topology}, "
            f"at most the {n_local} experts of a rank, got {', '.join(map(str, redundants))}"
        )
    return tried


def _along_topologies(ep_size: int, n_nodes: int) -> dict[str, topologies.Topology]:
    """Topologies of all ranks by name; and of groups, such as "cube of 8", if a group is a node or
    if there is none of all ranks."""
    found = topologies.named(ep_size)
    of_all = set(found)
    for size in range(2, ep_size):
        if ep_size % size == 0:
            for name, r2o in topologies.named(size).items():
                if size * n_nodes == ep_size or name not in of_all:
                    found[f"{name} of {size}"] = r2o
    return found


def topology_of(kind: str, ep_size: int) -> tuple[str, int]:
    """The name of a topology, and the ranks of its groups."""
    name, _, size = kind.partition(" of ")
    return name, int(size or ep_size)


def _of_name(
    topology: str, n_logical: int, ep_size: int, fitting: dict[str, int]
) -> dict[str, int]:
    """The fitting topologies with this name; raises, listing the others, if there is none."""
    named = {kind: n for kind, n in fitting.items() if topology_of(kind, ep_size)[0] == topology}
    if named:
        return named
    if topology not in topologies.NAMED:
        expected = f"one of {', '.join(topologies.NAMED)}"
    elif fitting:
        expected = f"one that fits {ep_size} ranks of {n_logical // ep_size} experts each"
    else:
        expected = f"none, since no topology fits {n_logical} experts on {ep_size} ranks"
    fit = f"; these fit: {', '.join(fitting)}" if fitting else ""
    raise ValueError(f"topology: expected {expected}, got {topology!r}{fit}")


class Study:
    """Placements for a workload, each computed once."""

    def __init__(
        self,
        workload: Workload,
        ep_size: int,
        n_nodes: int,
        costs: Costs | None,
        memory_per_expert: float | None,
        memory_budget: float | None,
    ) -> None:
        self._workload, self._costs = workload, costs
        self._memory_per_expert, self._memory_budget = memory_per_expert, memory_budget
        self._sizes = {"n_logical": workload.n_logical, "ep_size": ep_size}
        self._ep_size, self._n_nodes = ep_size, n_nodes

    def judge(self, kind: str, redundants: int) -> Choice:
        """Balance of the later batches on placements from the earlier ones, and its cost."""
        results = []
        for history, batches in zip(self._workload.history, self._workload.batches, strict=True):
            placement = self._placement(kind, redundants, history)
            bound = self._exactly(kind, placement, batches)
            results.append((self._evenly(placement, batches) if kind == EVEN else bound, bound))
        found, bound = np.concatenate(results, axis=1)
        mean = float(found.mean())
        p99 = float(np.quantile(found, 0.99, method="higher"))
        cost = self._cost(kind, redundants, mean)
        return Choice(kind, redundants, mean, p99, float(bound.mean()), *cost)

    def _cost(
        self, kind: str, redundants: int, mean: float
    ) -> tuple[float | None, float | None, float | None, bool]:
        """memory, traffic, seconds and fits of a Choice."""
        memory = traffic = seconds = None
        if self._memory_per_expert is not None:
            memory = redundants * self._memory_per_expert * self._workload.n_layers
        if self._costs is not None:
            traffic = self._costs.traffic(redundants, kind == BATCH)
            n_slots = -(-self._workload.n_logical // self._ep_size) + redundants
            seconds = self._costs.layer(mean, n_slots, traffic)
        fits = memory is None or self._memory_budget is None or memory <= self._memory_budget
        return memory, traffic, seconds, fits

    def _placement(self, kind: str, redundants: int, history: np.ndarray) -> Placement:
        """The placement of a layer, from its earlier batches `[batches, n_logical]`."""
        n_logical, ep_size = self._workload.n_logical, self._ep_size
        if kind == GIVEN:
            experts = np.full((ep_size, -(-n_logical // ep_size)), -1)
            for row, part in zip(
                experts, np.array_split(np.arange(n_logical), ep_size), strict=True
            ):
                row[: len(part)] = part
            return Placement.from_phy2log(experts, ep_size=ep_size, n_logical=n_logical)
        sizes: dict[str, Any] = {
            "n_logical": n_logical,
            "ep_size": ep_size,
            "n_nodes": self._n_nodes,
        }
        if kind == BATCH:
            homes = self._placement(PACKED, 0, history).phy2log.reshape(ep_size, -1)
            empty = np.full((ep_size, redundants), -1)
            table = np.concatenate([homes, empty], axis=1)
            return Placement.from_phy2log(table, **sizes)
        r2o, method = None, "eplb" if kind == EVEN else "auto"
        if kind not in (PACKED, ANY, EVEN):
            name, group_size = topology_of(kind, ep_size)
            r2o = topologies.named(group_size)[name]
        stacked = place_experts(
            history[None], r2o, **sizes, redundants_per_rank=redundants, method=method
        )
        return jax.tree.map(lambda array: array[0], stacked)

    def _exactly(self, kind: str, placement: Placement, batches: np.ndarray) -> np.ndarray:
        """Largest over mean rank load of every batch, at the optimum over all routings."""
        if kind != BATCH:
            return imbalances(placement.phy2log, self._ep_size, batches)
        chosen = np.asarray(_copies_of(batches.astype(np.int32), placement).phy2log)
        pairs = zip(chosen, batches, strict=True)
        return np.concatenate([imbalances(row, self._ep_size, batch[None]) for row, batch in pairs])

    def _evenly(self, placement: Placement, batches: np.ndarray) -> np.ndarray:
        """Largest over mean rank load of every batch with equal shares for an expert's copies."""
        share = np.append(batches / placement.logcnt, np.zeros((len(batches), 1)), axis=1)
        ranks = share[:, placement.phy2log].reshape(len(batches), self._ep_size, -1).sum(axis=2)
        return ranks.max(axis=1) / ranks.mean(axis=1)

    def ranks(self, choice: Choice) -> list[int]:
        """Tokens of every rank, in the last batch of the first layer."""
        history, batch = self._workload.history[0], self._workload.batches[0, -1].astype(np.int32)
        placement = self._placement(choice.placement, choice.redundants, history)
        if choice.placement == BATCH:
            placement = place_copies(batch, placement)
        quota = np.asarray(solve(batch, placement=placement).quota)
        return quota.reshape(self._ep_size, -1).sum(axis=1).tolist()

    def ageing(self, best: Choice, choices: Sequence[Choice]) -> Ageing | None:
        """The ageing of the best placement, or of one on any ranks if that does not age."""
        later = self._workload.batches.shape[1]
        if best.placement == BATCH:
            others = [c for c in choices if c[:2] == (ANY, best.redundants)]
            best = others[0] if others else best
        fixed = best.placement in (GIVEN, BATCH)
        if fixed or not self._workload.in_order or later < _LEAST_LATER:
            return None
        spans = np.array_split(np.arange(later), min(_MOST_SPANS, later))
        layers = range(min(_AGEING_LAYERS, len(self._workload.history)))
        found = np.mean([self._ageing_of(best, layer, spans) for layer in layers], axis=0)
        kept, fresh = found.T.tolist()
        spans_too_old = np.flatnonzero(found[:, 0] > found[:, 1] + _TOO_OLD)
        anew = max(1, int(spans[spans_too_old[0]][0])) if len(spans_too_old) else None
        ages = [float(span.mean()) + 1 for span in spans]
        return Ageing(best.placement, best.redundants, ages, kept, fresh, anew)

    def _ageing_of(
        self, choice: Choice, layer: int, spans: list[np.ndarray]
    ) -> list[tuple[float, float]]:
        """The ratios of one layer with the first placement and with a fresh one, in every span."""
        history, batches = self._workload.history[layer], self._workload.batches[layer]
        kind, redundants = choice.placement, choice.redundants
        first = self._placement(kind, redundants, history)
        found = []
        for span in spans:
            past = np.concatenate([history, batches[: span[0]]])[-len(history) :]
            fresh = self._placement(kind, redundants, past) if span[0] else first
            both = [self._exactly(kind, each, batches[span]).mean() for each in (first, fresh)]
            found.append((float(both[0]), float(both[1])))
        return found


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None))
def _copies_of(loads: jax.Array, placement: Placement) -> Placement:
    return place_copies(loads, placement)


def recommended(choices: list[Choice]) -> Choice:
    """The fastest choice, or one that is nearly as fast with fewer redundant slots.

    An even split is never better than the exact split over the same copies.
    """
    possible = [choice for choice in choices if choice.fits and choice.placement != EVEN]
    costs = [choice.seconds for choice in possible if choice.seconds is not None]
    if len(costs) < len(possible):
        costs = [choice.mean for choice in possible]
    most = min(costs) * (1 + _WORTH)
    good = [choice for choice, cost in zip(possible, costs, strict=True) if cost <= most]
    return min(good, key=lambda choice: choice.redundants)
