"""Inputs: problems over topologies, loads of every kind, and tokens with these loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from lplb_jax import Placement, place_experts, topologies
from lplb_jax.topologies import Topology

INT32_MAX = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one problem: `combined` experts per column, `n_local` experts per rank."""

    r2o: Topology | np.ndarray
    n_local: int
    n_groups: int = 1
    combined: int = 1

    @property
    def ep_size(self) -> int:
        return len(self.r2o) * self.n_groups

    @property
    def n_logical(self) -> int:
        return self.ep_size * self.n_local

    @property
    def redundants_per_rank(self) -> int:
        return self.r2o.shape[1] * self.combined

    def placement(self, rng: np.random.Generator | None = None) -> Placement:
        """Experts in random order, or in the given one."""
        return place_experts(
            None if rng is None else rng.random(self.n_logical),
            self.r2o,
            n_logical=self.n_logical,
            ep_size=self.ep_size,
            redundants_per_rank=self.redundants_per_rank,
        )


def random_topology(rng: np.random.Generator, n_ranks: int, n_columns: int) -> np.ndarray:
    """Columns that are arbitrary permutations, including self-copies and repeated edges."""
    return np.stack([rng.permutation(n_ranks) for _ in range(n_columns)], axis=1).astype(np.int32)


def repeated_edges(rng: np.random.Generator, n_ranks: int, n_columns: int) -> np.ndarray:
    """All columns have the same edges, and one rank copies only from itself."""
    column = np.append(rng.permutation(n_ranks - 1), n_ranks - 1)
    return np.repeat(column[:, None], n_columns, axis=1).astype(np.int32)


# Random topologies are drawn anew in every test.
CASES: dict[str, Callable[[np.random.Generator], Case]] = {
    "one rank": lambda rng: Case(np.array([[0]], np.int32), 3),
    "ring 2": lambda rng: Case(topologies.ring(2), 3),
    "ring 8": lambda rng: Case(topologies.ring(8), 4),
    "ring 4, two groups": lambda rng: Case(topologies.ring(4), 2, n_groups=2),
    "cube": lambda rng: Case(topologies.cube(), 8),
    "cube, three combined": lambda rng: Case(topologies.cube(), 8, combined=3),
    "cube, three groups": lambda rng: Case(topologies.cube(), 4, n_groups=3, combined=2),
    "hypercube": lambda rng: Case(topologies.hypercube(), 4, combined=2),
    "torus 2x3, all replicated": lambda rng: Case(topologies.torus(2, 3), 2),
    "torus 4x4": lambda rng: Case(topologies.torus(4, 4), 3),
    "complete 4": lambda rng: Case(topologies.complete(4), 5),
    "complete 8": lambda rng: Case(topologies.complete(8), 8),
    "random 5x3": lambda rng: Case(random_topology(rng, 5, 3), 7, combined=2),
    "random 8x2": lambda rng: Case(random_topology(rng, 8, 2), 32),
    "repeated 6x3": lambda rng: Case(repeated_edges(rng, 6, 3), 4),
    "random 16x8": lambda rng: Case(random_topology(rng, 16, 8), 16, combined=2),
    "random 32x4": lambda rng: Case(random_topology(rng, 32, 4), 8),
    "random 33x1": lambda rng: Case(random_topology(rng, 33, 1), 2),
    "random 64x4": lambda rng: Case(random_topology(rng, 64, 4), 4),
    "random 128x2": lambda rng: Case(random_topology(rng, 128, 2), 3),
}
SMALL_CASES = {
    name: CASES[name]
    for name in ["ring 2", "ring 4, two groups", "cube, three combined", "random 5x3"]
}


def mild(rng, case, placement):
    """Equal loads with 20 % noise."""
    return rng.normal(200, 40, case.n_logical).clip(0)


def skewed(rng, case, placement):
    """Log-normal: a few experts hold most of the load."""
    return rng.lognormal(4, 1.5, case.n_logical)


def zipf(rng, case, placement):
    """Tokens of a Zipf law over shuffled experts."""
    weight = 1 / rng.permutation(np.arange(1, case.n_logical + 1)) ** 1.1
    return rng.multinomial(50_000, weight / weight.sum())


def one_hot(rng, case, placement):
    """One expert has almost everything, another at most one token."""
    loads = np.zeros(case.n_logical)
    loads[rng.integers(case.n_logical)] = rng.integers(1, 100_000)
    loads[rng.integers(case.n_logical)] += rng.integers(2)
    return loads


def zeros(rng, case, placement):
    """No tokens at all."""
    return np.zeros(case.n_logical)


def tiny(rng, case, placement):
    """Fewer tokens than ranks."""
    total = rng.integers(1, max(2, case.ep_size))
    return rng.multinomial(total, np.full(case.n_logical, 1 / case.n_logical))


def huge(rng, case, placement):
    """Totals above 2³¹ where sums over ranks can reach it; every rank's possible load just fits."""
    most = INT32_MAX // (case.n_local + case.redundants_per_rank)
    return most - rng.integers(0, max(most // 5, 1), case.n_logical)


def huge_one_hot(rng, case, placement):
    """One expert has as many tokens as an int32 holds."""
    loads = np.zeros(case.n_logical)
    loads[rng.integers(case.n_logical)] = INT32_MAX
    return loads


def half_empty(rng, case, placement):
    """Every second rank has no tokens of its own; one of the others is very hot."""
    loads = rng.integers(0, 1000, case.n_logical)
    own = np.asarray(placement.phy2log).reshape(case.ep_size, -1)[:, : case.n_local]
    loads[own[1::2]] = 0
    loads[own[2 * rng.integers((case.ep_size + 1) // 2)]] *= 20
    return loads


FAMILIES = [mild, skewed, zipf, one_hot, zeros, tiny, huge, huge_one_hot, half_empty]


def batch(
    rng: np.random.Generator, case: Case, families=FAMILIES, repeat: int = 1
) -> tuple[np.ndarray, Placement]:
    """Instances of all families, each in a random order of the experts: stacked for `vmap`."""
    loads, placements = [], []
    for family in list(families) * repeat:
        placement = case.placement(rng)
        loads.append(np.asarray(family(rng, case, placement)).astype(np.int32))
        placements.append(placement)
    return np.stack(loads), jax.tree.map(lambda *layers: np.stack(layers), *placements)


def layers(stacked: Placement) -> list[Placement]:
    """The placements of a stacked one."""
    count = len(stacked.phy2log)
    return [jax.tree.map(lambda array, i=i: array[i], stacked) for i in range(count)]


def tokens(rng: np.random.Generator, case: Case, n_tokens: int, absent=0.1) -> np.ndarray:
    """Ids `[ep_size, n_tokens]`, with a different skew on every source, some −1."""
    ids = np.empty((case.ep_size, n_tokens), np.int32)
    for row in ids:
        weight = rng.lognormal(0, 1.5, case.n_logical)
        row[:] = rng.choice(case.n_logical, n_tokens, p=weight / weight.sum())
    ids[rng.random(ids.shape) < absent] = -1
    return ids


def counts_of(indices: np.ndarray, n_logical: int) -> np.ndarray:
    """Tokens per expert of every row, int32 `[rows, n_logical]`; ids that name none are skipped."""
    rows = indices.reshape(len(indices), -1).astype(np.int64)
    return np.array(
        [np.bincount(row[(row >= 0) & (row < n_logical)], minlength=n_logical) for row in rows],
        np.int32,
    )


def spoiled(rng: np.random.Generator, array: np.ndarray) -> np.ndarray:
    """Replaces some values by small and by arbitrary ones."""
    wild = rng.integers(-(2**31), 2**31, array.shape)
    near = rng.integers(-2, 100, array.shape)
    kind = rng.integers(0, 20, array.shape)
    return np.where(kind == 0, wild, np.where(kind == 1, near, array)).astype(np.int32)
