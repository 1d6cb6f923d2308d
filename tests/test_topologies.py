"""The topologies' tables, invalid topologies, and `Topology` as an array and as a key."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random_topology

from lplb_jax import topologies
from lplb_jax.topologies import Topology

EDGES = [3, 0, 1, 2, 7, 4, 5, 6]
DIAGONALS = [6, 7, 4, 5, 0, 1, 2, 3]


def test_cube():
    np.testing.assert_array_equal(topologies.cube().T, [EDGES, DIAGONALS])


def test_hypercube():
    within = EDGES + [rank + 8 for rank in EDGES]
    across = [12, 13, 14, 15, *range(12)]
    np.testing.assert_array_equal(topologies.hypercube().T, [within, across])


@pytest.mark.parametrize("n", [2, 3, 8, 31])
def test_ring(n):
    np.testing.assert_array_equal(topologies.ring(n), [[(v + 1) % n] for v in range(n)])


@pytest.mark.parametrize(("m", "n"), [(2, 2), (2, 3), (3, 2), (4, 8)])
def test_torus(m, n):
    expected = [[(i + 1) % m * n + j, i * n + (j + 1) % n] for i in range(m) for j in range(n)]
    np.testing.assert_array_equal(topologies.torus(m, n), expected)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_complete_copies_from_every_other_rank_once(n):
    r2o = topologies.complete(n)
    assert r2o.shape == (n, n - 1)
    for rank, sources in enumerate(r2o):
        assert sorted([rank, *sources]) == list(range(n))


@pytest.mark.parametrize(
    "r2o",
    [
        topologies.ring(5),
        topologies.cube(),
        topologies.hypercube(),
        topologies.torus(3, 4),
        topologies.complete(5),
        topologies.validate([[1], [0]]),
    ],
)
def test_all_are_valid_static_arrays(r2o):
    assert isinstance(r2o, Topology)
    assert r2o.dtype == np.asarray(r2o).dtype == np.int32
    assert not np.asarray(r2o).flags.writeable
    assert r2o.shape == (r2o.group_size, r2o.n_columns) == np.shape(r2o)
    np.testing.assert_array_equal(np.sort(r2o, axis=0).T, [range(len(r2o))] * r2o.shape[1])
    assert topologies.validate(r2o) is r2o


def test_a_topology_is_an_array(rng):
    table = random_topology(rng, 7, 3)
    r2o = topologies.validate(table)
    for array in [r2o, np.array(r2o), jnp.asarray(r2o), jax.jit(jnp.asarray)(r2o), list(r2o)]:
        np.testing.assert_array_equal(array, table)
    assert np.asarray(r2o, np.int64).dtype == np.int64
    assert np.array(r2o).flags.writeable
    np.testing.assert_array_equal(np.arange(7)[r2o], table)
    np.testing.assert_array_equal(r2o[2:, 1], table[2:, 1])
    np.testing.assert_array_equal(r2o.T, table.T)
    assert r2o.tolist() == table.tolist()
    assert (len(r2o), r2o.ndim, r2o.size) == (7, 2, 21)


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))]
)
def test_copies_are_equal_and_read_only(rng, again):
    topology = topologies.validate(random_topology(rng, 6, 2))
    other = again(topology)
    assert other == topology
    assert hash(other) == hash(topology)
    with pytest.raises(ValueError, match="read-only"):
        np.asarray(other)[0, 0] = 1


def test_equality_is_of_tables(rng):
    table = random_topology(rng, 6, 2)
    topology = Topology(table)
    for same in (table, table.tolist(), table.astype(np.uint8), np.asfortranarray(table)):
        assert Topology(same) == topology
        assert hash(Topology(same)) == hash(topology)
    assert Topology([[0], [1]]) != Topology([[0, 0], [1, 1]])
    swapped = table[:, [1, 0]]
    assert (Topology(swapped) == topology) == np.array_equal(swapped, table)
    assert topology != table.tolist()


def test_equal_topologies_share_what_was_compiled(rng):
    traced = []

    @jax.jit
    def first(r2o):
        traced.append(r2o)
        return jnp.asarray(r2o)[0]

    table = random_topology(rng, 9, 2)
    for r2o in (Topology(table), topologies.validate(table.copy()), Topology(table.tolist())):
        np.testing.assert_array_equal(first(r2o), table[0])
    assert len(traced) == 1
    np.testing.assert_array_equal(first(topologies.ring(9)), [1])
    assert len(traced) == 2


def test_a_topology_cannot_be_changed():
    ring = topologies.ring(3)
    with pytest.raises(AttributeError):
        setattr(ring, "r2o", np.zeros((3, 1), np.int32))  # noqa: B010
    with pytest.raises(ValueError, match="read-only"):
        ring[0][:] = 2


@pytest.mark.parametrize("n_ranks", range(1, 130))
def test_named(n_ranks):
    """Each name fits exactly the sizes at which its constructor makes one."""
    for name, entry in topologies.NAMED.items():
        if entry.fits(n_ranks):
            assert topologies.named(n_ranks)[name] == entry.make(n_ranks)
            assert len(entry.make(n_ranks)) == n_ranks
        else:
            assert name not in topologies.named(n_ranks)
    composite = any(n_ranks % n == 0 for n in range(2, n_ranks))
    assert ("torus" in topologies.named(n_ranks)) == composite


def test_named_tori_are_nearly_square():
    for n_ranks, sides in {8: (4, 2), 12: (4, 3), 32: (8, 4), 64: (8, 8), 26: (13, 2)}.items():
        assert topologies.named(n_ranks)["torus"] == topologies.torus(*sides)


def test_validate_copies(rng):
    """A later change of the caller's array changes nothing."""
    mine = np.array([[1], [0]])
    validated = topologies.validate(mine)
    mine[:] = 7
    np.testing.assert_array_equal(validated, [[1], [0]])


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: topologies.ring(1), "n: "),
        (lambda: topologies.ring(2.0), "n: "),
        (lambda: topologies.complete(0), "n: "),
        (lambda: topologies.torus(1, 4), "m: "),
        (lambda: topologies.torus(4, 1), "n: "),
    ],
)
def test_too_small(make, argument):
    with pytest.raises(ValueError, match=f"^{argument}expected .* got "):
        make()


@pytest.mark.parametrize(
    ("r2o", "error", "words"),
    [
        ([[1], [1]], ValueError, r"permutation of 0 … 1, got column 0 = \[1, 1\]"),
        ([[1, 0], [0, 0]], ValueError, r"got column 1 = \[0, 0\]"),
        ([[1], [2]], ValueError, "permutation"),
        ([[-1], [0]], ValueError, "permutation"),
        ([1, 0], ValueError, r"expected shape \[group_size, n_columns\].*got \(2,\)"),
        (np.zeros((0, 1), int), ValueError, "at least 1"),
        (np.zeros((2, 0), int), ValueError, "at least 1"),
        ([[1.0], [0.0]], TypeError, "expected integers, got dtype float64"),
        ([[True], [False]], TypeError, "expected integers, got dtype bool"),
        (None, TypeError, "expected integers"),
    ],
)
def test_invalid(r2o, error, words):
    with pytest.raises(error, match=f"^r2o: .*{words}"):
        topologies.validate(r2o)
