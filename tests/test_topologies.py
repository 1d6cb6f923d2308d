"""The topologies' tables, and what is no topology."""

import numpy as np
import pytest

from lplb_jax import topologies

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
    assert r2o.dtype == np.int32
    assert not r2o.flags.writeable
    np.testing.assert_array_equal(np.sort(r2o, axis=0).T, [range(len(r2o))] * r2o.shape[1])
    np.testing.assert_array_equal(topologies.validate(r2o), r2o)


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
