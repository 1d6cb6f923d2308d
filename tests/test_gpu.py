"""On an NVIDIA GPU: the CUDA code equals the specification, computed on the CPU, bit for bit."""

import functools
import os
import subprocess
import sys

import digest
import jax
import numpy as np
import pytest
from cases import FAMILIES, Case, batch, counts_of, random_topology, repeated_edges, spoiled
from chips import CHIPS, chip
from oracles import assert_hosted, tokens_at_slots
from steps import (
    assert_same,
    native_assign,
    native_count,
    native_rebalance,
    native_solve,
    on_cpu,
    repeated,
    spec_assign,
    spec_count,
    spec_rebalance,
    spec_solve,
)

from lplb_jax import (
    Placement,
    Status,
    _native,
    assign,
    count_loads,
    place_experts,
    rebalance,
    solve,
    topologies,
)
from lplb_jax._problem import Problem
from lplb_jax.solver import solve_checked

pytestmark = pytest.mark.gpu

# Around the sizes of warps (32 ranks), of registers (4 columns) and of blocks.
SHAPES = {
    "1x1": lambda rng: Case(np.array([[0]], np.int32), 3),
    "2x1": lambda rng: Case(topologies.ring(2), 3),
    "8x2, 256 experts": lambda rng: Case(topologies.cube(), 32),
    "8x2, 16 combined": lambda rng: Case(topologies.cube(), 32, combined=16),
    "6x3 repeated": lambda rng: Case(repeated_edges(rng, 6, 3), 4),
    "5x4, three groups": lambda rng: Case(random_topology(rng, 5, 4), 9, 3, 2),
    "4x1, forty groups": lambda rng: Case(topologies.ring(4), 2, n_groups=40),
    "16x2": lambda rng: Case(topologies.hypercube(), 4, combined=2),
    "31x2": lambda rng: Case(random_topology(rng, 31, 2), 33),
    "32x4": lambda rng: Case(random_topology(rng, 32, 4), 8),
    "8x5": lambda rng: Case(random_topology(rng, 8, 5), 7),
    "8x7": lambda rng: Case(topologies.complete(8), 8),
    "32x8, two groups": lambda rng: Case(random_topology(rng, 32, 8), 16, 2, 2),
    "33x1": lambda rng: Case(random_topology(rng, 33, 1), 2),
    "64x4": lambda rng: Case(random_topology(rng, 64, 4), 5),
    "128x1": lambda rng: Case(random_topology(rng, 128, 1), 3),
    "128x8, 1024 experts": lambda rng: Case(random_topology(rng, 128, 8), 8),
}


@pytest.fixture(autouse=True)
def on_gpu():
    """Without native code, these tests would compare the CPU with itself."""
    assert jax.default_backend() == "gpu"
    assert "CUDA" in _native.AVAILABLE


def test_results_are_on_the_gpu():
    """The program calls the handlers, instead of copying results of the CPU or the reference."""
    placement = Case(topologies.cube(), 2).placement()

    @jax.jit
    def run(ids):
        alone = rebalance(ids, None, topologies.cube(), placement=placement)
        return alone, rebalance(ids, np.ones((8, 16), np.int32), topologies.cube())

    ids = np.zeros((8, 5), np.int32)
    for array in jax.tree.leaves(run(ids)):
        assert {device.platform for device in array.devices()} == {"gpu"}
    text = str(run.lower(ids).compile().as_text())
    for target in ("lplb_count", "lplb_solve", "lplb_assign", "lplb_rebalance"):
        assert target in text
    assert "while(" not in text


@pytest.mark.parametrize("name", SHAPES)
def test_solve(rng, name):
    """All load families, 58 instances at once, each with its own placement."""
    case = SHAPES[name](rng)
    loads, stacked = batch(rng, case, (FAMILIES * 7)[:58])
    operands = (loads[:, None], repeated(case.r2o, 58), stacked)
    assert_same(native_solve(*operands), spec_solve(*operands))


@pytest.mark.parametrize("n_instances", [1, 3])
@pytest.mark.parametrize("name", ["8x2, 256 experts", "33x1"])
def test_solve_small_batches_by_source(rng, name, n_instances):
    """Loads of every source, some negative, with a different topology for every instance."""
    case = SHAPES[name](rng)
    stacked = repeated(case.placement(rng), n_instances)
    n_ranks, n_columns = case.r2o.shape
    r2o = np.stack([random_topology(rng, n_ranks, n_columns) for _ in range(n_instances)])
    loads = rng.integers(-5, 1000, (n_instances, case.ep_size, case.n_logical)).astype(np.int32)
    assert_same(native_solve(loads, r2o, stacked), spec_solve(loads, r2o, stacked))


@pytest.mark.parametrize("name", ["5x4, three groups", "8x5", "33x1"])
def test_solve_garbage(rng, name):
    """Arbitrary loads and placements: no fault, and the same status and bits."""
    case = SHAPES[name](rng)
    loads, stacked = batch(rng, case, (FAMILIES * 7)[:58])
    loads, stacked = jax.tree.map(lambda array: spoiled(rng, array), (loads, stacked))
    operands = (loads[:, None], repeated(case.r2o, 58), stacked)
    assert_same(native_solve(*operands), spec_solve(*operands))


@pytest.mark.parametrize("name", ["8x2, 256 experts", "5x4, three groups", "8x7", "128x1"])
def test_a_topology_that_is_none_is_a_bad_placement(rng, name):
    """r2o's values are addresses. No kernel faults, even without the public functions' checks."""
    case = SHAPES[name](rng)
    loads, stacked = batch(rng, case)
    n_ranks, n_columns = case.r2o.shape
    r2o = np.array(repeated(case.r2o, len(loads)))
    wild = rng.random(r2o.shape) < 0.3 * rng.integers(0, 2, (len(r2o), 1, 1))
    r2o[wild] = rng.choice([-(2**31), -1, n_ranks, 2**31 - 1], r2o.shape)[wild]
    for columns in r2o:
        twice, other = rng.permutation(n_ranks)[:2]
        column = rng.integers(n_columns)
        columns[twice, column] = columns[other, column]

    @jax.jit
    @jax.vmap
    def interior(loads, r2o, placement):
        return solve_checked(loads[None], Problem(r2o, placement), "ipm", None, True)

    ids = random_ids(rng, "int32", case.n_logical, len(loads), 1000)
    split = native_solve(loads[:, None], r2o, stacked)
    rebalanced = native_rebalance(ids, r2o, stacked)[1]
    for status in (split[3], rebalanced.status, interior(loads, r2o, stacked).status):
        assert (np.asarray(status) & int(Status.BAD_PLACEMENT)).all()


def test_solve_is_deterministic(rng):
    case = SHAPES["64x4"](rng)
    loads, stacked = batch(rng, case, (FAMILIES * 7)[:58])
    operands = (loads[:, None], repeated(case.r2o, 58), stacked)
    first = native_solve(*operands)
    for _ in range(20):
        assert_same(first, native_solve(*operands))


def assert_near(left, right, relative, absolute):
    """Equal, as infinities and zeros are, or near."""
    left, right = np.asarray(left, np.float64), np.asarray(right, np.float64)
    with np.errstate(invalid="ignore"):
        near = np.abs(left - right) <= relative * np.abs(right) + absolute
    assert ((left == right) | near).all()


@pytest.mark.parametrize("garbage", [False, True])
@pytest.mark.parametrize(
    ("floats", "weighted", "repair"),
    [
        (floats, weighted, repair)
        for floats in [False, True]
        for weighted in [False, True]
        for repair in [False, True]
        if not (floats and repair)
    ],
)
@pytest.mark.parametrize("name", ["5x4, three groups", "8x7", "16x2", "31x2", "64x4", "128x1"])
def test_ipm(rng, name, floats, weighted, repair, garbage):
    """The same status as on the CPU, and as good a plan and bound: to float32's tolerance."""
    case = SHAPES[name](rng)
    loads, stacked = batch(rng, case)
    weights = np.exp(rng.normal(0, 0.5, (len(loads), len(case.r2o)))).astype(np.float32)
    if garbage:
        loads, stacked = jax.tree.map(lambda array: spoiled(rng, array), (loads, stacked))
        weights[::3, 0] = [-1, np.nan, np.inf][: len(weights[::3])] if weighted else 1
    if floats:
        loads = loads * np.float32(0.37)
        if garbage:
            loads[rng.random(loads.shape) < 0.02] = np.nan
            loads[rng.random(loads.shape) < 0.002] = np.inf

    @jax.jit
    @jax.vmap
    def run(loads, placement, weights):
        problem = Problem(case.r2o, placement)
        return solve_checked(loads[None], problem, "ipm", weights if weighted else None, repair)

    split = run(loads, stacked, weights)
    other = on_cpu(run)(loads, stacked, weights)
    good = ((weights > 0) & (weights < np.inf)).all(axis=1, keepdims=True)
    status, max_load = np.asarray(split.status), np.asarray(split.max_load, np.float64)
    if floats or repair:
        np.testing.assert_array_equal(status, other.status)
    else:  # Rounding may cost more on one of them than on the other.
        rest = ~int(Status.NOT_CONVERGED)
        np.testing.assert_array_equal(status & rest, np.asarray(other.status) & rest)
        near = max_load - np.asarray(split.lower_bound) <= 1e-4 * (1 + 1e-6) * max_load
        near |= status & Status.LOAD_OVERFLOW != 0
        expected = near & (good | (not weighted))
        np.testing.assert_array_equal(status & Status.NOT_CONVERGED == 0, expected)
    shares = np.where(good & weighted, weights, 1)
    token = 0 if floats else 1 / (shares / shares.mean(axis=1, keepdims=True)).min()
    if repair and not weighted:
        assert_same(split.max_load, other.max_load)
        assert_same(split.lower_bound, other.lower_bound)
    else:
        rounding = 1.01 if repair else case.r2o.shape[1] + 1.01
        assert_near(split.max_load, other.max_load, 1.2e-4, rounding * token)
        # Of tokens, cuts that are as good in real numbers may differ by a token.
        one = 0 if floats else token if weighted else 1
        assert_near(split.lower_bound, other.lower_bound, 1.2e-4, one)
    if not garbage:
        served = np.zeros(loads.shape)
        for total, phy2log, quota in zip(served, stacked.phy2log, split.quota, strict=True):
            assert (np.asarray(quota) >= 0).all()
            np.add.at(total, np.asarray(phy2log), np.asarray(quota))
        np.testing.assert_allclose(served, loads, rtol=1e-6 if floats else 0)


def test_ipm_with_cusolverdx(rng):
    """Slower, and it may not converge, but says so; the split is feasible and consistent."""
    case = SHAPES["32x4"](rng)
    loads, stacked = batch(rng, case)
    loads = loads.astype(np.float32)
    if not _native.built_cuda().has_cusolverdx():
        with pytest.raises(ValueError, match=r"factor: .* built without cuSolverDx"):
            solve(np.ones(16, np.float32), topologies.cube(), factor="cusolverdx")
        pytest.skip("built without cuSolverDx")

    def run(factor):
        one = functools.partial(solve, r2o=case.r2o, factor=factor, solver="ipm")
        return jax.jit(jax.vmap(lambda row, placement: one(row, placement=placement)))

    split, best = (run(factor)(loads, stacked) for factor in ["cusolverdx", "elimination"])
    assert (best.status == 0).all()
    converged = split.max_load - split.lower_bound <= 1e-4 * split.max_load
    np.testing.assert_array_equal(split.status, np.where(converged, 0, Status.NOT_CONVERGED))
    assert (split.lower_bound <= best.max_load * (1 + 1e-6)).all()
    assert (split.max_load >= best.lower_bound * (1 - 1e-6)).all()
    served = np.zeros(loads.shape)
    for total, phy2log, quota in zip(served, stacked.phy2log, split.quota, strict=True):
        np.add.at(total, np.asarray(phy2log), np.asarray(quota))
    np.testing.assert_allclose(served, loads, rtol=1e-6)


def random_ids(rng, dtype, n_logical, rows, n_tokens):
    """Rows in three kinds in turn: random with a few that name no expert, sorted, one expert."""
    most = min(n_logical, np.iinfo(dtype).max + 1)
    ids = rng.integers(0, most, (rows, n_tokens)).astype(dtype)
    ids[rng.random(ids.shape) < 0.05] = np.iinfo(dtype).max
    if np.iinfo(dtype).min:
        ids[rng.random(ids.shape) < 0.1] = -1
    ids[1::3] = np.sort(ids[1::3], axis=1)
    ids[2::3] = rng.integers(most)
    return ids


N_TOKENS = [0, 1, 31, 32, 33, 1000, 32768, 131072, 1_000_003]
DTYPES = ["int32", "int64", "uint8", "uint16"]


@pytest.mark.parametrize("n_tokens", N_TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_count(rng, n_tokens, dtype):
    n_logical = int(rng.choice([8, 64, 255, 256, 1000, 1024]))
    with jax.enable_x64(dtype == "int64"):
        ids = random_ids(rng, dtype, n_logical, 3, n_tokens)
        absent = -1 if np.iinfo(dtype).min else np.iinfo(dtype).max
        invalid = ((ids < 0) | (ids >= n_logical)) & (ids != absent)
        counts = np.asarray(jax.vmap(lambda row: native_count(row, n_logical))(ids))
        np.testing.assert_array_equal(counts[:, :-1], counts_of(ids, n_logical))
        np.testing.assert_array_equal(counts[:, -1], invalid.sum(axis=1))
        row = ids[0, : min(n_tokens, 1000)]
        assert_same(native_count(row, n_logical), spec_count(row, n_logical))


ASSIGN = [
    *((topologies.cube, 32, n) for n in [0, 1, 31, 32, 33, 1000, 32768]),
    *((functools.partial(topologies.ring, 8), 1, n) for n in [31, 1000]),
    *((functools.partial(topologies.torus, 8, 4), 32, n) for n in [33, 4096]),
    *((functools.partial(topologies.ring, 2), 128, n) for n in [131072, 1_000_003]),
]


@pytest.mark.parametrize("proportional", [False, True])
@pytest.mark.parametrize(("topology", "n_local", "n_tokens"), ASSIGN)
def test_assign(rng, topology, n_local, n_tokens, proportional):
    """All ranks' parts, with the quotas of a solve and with any."""
    case = Case(topology(), n_local)
    placement = case.placement(rng)
    dtype = str(rng.choice(["int32", "uint16"] if case.n_logical > 256 else DTYPES))
    with jax.enable_x64(dtype == "int64"):
        ids = random_ids(rng, dtype, case.n_logical, case.ep_size, n_tokens)
        loads = counts_of(ids, case.n_logical)
        fitting = solve(loads, case.r2o, placement=placement).quota
        other = rng.integers(0, 2 * n_tokens // n_local + 2, placement.n_physical)
        quota = np.stack([fitting, other]).astype(np.int32)
        operands = (*repeated((ids, loads), 2), quota, repeated(placement, 2))
        options = {"proportional": proportional, "positions": bool(rng.integers(2))}
        assigned = native_assign(*operands, **options)
        assert_same(assigned, spec_assign(*operands, **options))
        physical = np.asarray(assigned.physical_indices[0])
        assert_hosted(ids, physical, placement)
        if not proportional:
            got = tokens_at_slots(physical, placement.n_physical)
            np.testing.assert_array_equal(got, fitting)


@pytest.mark.parametrize("proportional", [False, True])
def test_assign_garbage(rng, proportional):
    case = SHAPES["5x4, three groups"](rng)
    placements = jax.tree.map(lambda x: spoiled(rng, x), repeated(case.placement(rng), 20))
    ids = repeated(random_ids(rng, "int32", case.n_logical, case.ep_size, 300), 20)
    counts = spoiled(rng, repeated(counts_of(ids[0], case.n_logical), 20))
    quota = rng.integers(0, 40, placements.phy2log.shape).astype(np.int32)
    operands = (ids, counts, quota, placements)
    assigned = native_assign(*operands, proportional=proportional)
    assert_same(assigned, spec_assign(*operands, proportional=proportional))


ALONE = [
    *(("8x2, 256 experts", n) for n in [0, 1, 33, 1000, 8192, 8193, 32768, 262144, 1_000_003]),
    *((name, 4099) for name in SHAPES if name != "8x2, 256 experts"),
]


@pytest.mark.parametrize(("name", "n_tokens"), ALONE)
def test_rebalance_alone(rng, name, n_tokens):
    """All steps in one call, for three batches of ids: random, sorted, one expert.

    Mostly against the CPU's native code, which other tests hold against the specification: the
    latter takes seconds to compile for each shape.
    """
    case = SHAPES[name](rng)
    dtype = str(rng.choice(["int32", "uint16"] if case.n_logical > 256 else DTYPES))
    with jax.enable_x64(dtype == "int64"):
        ids = random_ids(rng, dtype, case.n_logical, 3, n_tokens)
        placements = [case.placement(rng) for _ in ids]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *placements)
        operands = (ids, repeated(case.r2o, 3), stacked)
        positions = bool(rng.integers(2))
        results = native_rebalance(*operands, positions=positions)
        assert_same(results, on_cpu(native_rebalance)(*operands, positions=positions))
        if n_tokens in (33, 8193):
            assert_same(results, spec_rebalance(*operands, positions=positions))


@pytest.mark.parametrize("name", ["8x2, 256 experts", "5x4, three groups", "64x4"])
@pytest.mark.parametrize("mode", ["counted", "by source", "statistics"])
def test_rebalance(rng, name, mode):
    """End to end against the three specifications, composed."""
    case = SHAPES[name](rng)
    placement = case.placement(rng)
    ids = random_ids(rng, "int32", case.n_logical, case.ep_size, 8 * 512)
    by_source = counts_of(ids, case.n_logical)
    total = by_source.sum(axis=0, dtype=np.int32)
    loads, rows = {
        "counted": (None, ids.reshape(1, -1)),
        "by source": (by_source, ids),
        "statistics": (total, ids[:1]),
    }[mode]
    given = rows if mode == "by source" else rows[0]
    run = jax.jit(lambda ids: rebalance(ids, loads, case.r2o, placement=placement))
    physical, split = run(given)
    invalid = spec_count(rows, case.n_logical)[-1] > 0
    quota, *rest, status = spec_solve(*repeated((total[None], case.r2o, placement), 1))
    expected = [quota[0], *(array[0] for array in rest), np.asarray(status[0]) | np.int32(invalid)]
    assert_same(split, expected)
    assert_hosted(given, physical, placement)
    if mode != "statistics":
        got = tokens_at_slots(physical, placement.n_physical)
        np.testing.assert_array_equal(got, split.quota)
    on_host = on_cpu(lambda ids: run(ids))(given)
    assert_same((physical, split), on_host)


def test_transformations(rng):
    """jit, nested vmap, scan and checkpoint give the results of plain calls, and the CPU's bits."""
    inputs = digest.inputs(rng)
    results = digest.transformed(*inputs)
    assert_same(results, on_cpu(digest.transformed)(*inputs))
    ids, placements = inputs
    for i in range(len(ids)):
        placement = jax.tree.map(lambda array, i=i: array[i], placements)
        for j in range(ids.shape[1]):
            counts = jax.numpy.stack([count_loads(row, 64) for row in ids[i, j]])
            split = solve(counts, digest.CASE.r2o, placement=placement)
            physical = assign(ids[i, j], counts, split, digest.CASE.r2o, placement=placement)
            assert_same(physical, results[0][i, j])
            assert_same(split, jax.tree.map(lambda array, i=i, j=j: array[i, j], results[1]))


@pytest.mark.parametrize(
    "flags",
    [
        "--xla_gpu_enable_command_buffer=",
        "--xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL,WHILE --xla_gpu_graph_min_graph_size=1",
    ],
    ids=["launched one by one", "in command buffers"],
)
def test_command_buffers(request, flags):
    """Kernels recorded once and replayed with new inputs give the same bits as without."""
    seed = request.config.option.seed
    path = os.environ.get("PYTHONPATH")
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "PYTHONPATH": os.pathsep.join([os.path.dirname(digest.__file__), *filter(None, [path])]),
    }
    done = subprocess.run(
        [sys.executable, digest.__file__, str(seed), "gpu"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == on_cpu(lambda: digest.of_runs(seed))(), f"--seed={seed}"


def test_too_many_experts_are_refused():
    """Exceeding the kernels' limits raises clear errors and never gives wrong results."""
    with pytest.raises(Exception, match=r"n_logical: .*at most"):
        jax.block_until_ready(count_loads(np.zeros(5, np.int32), 10_000))
    ring = topologies.ring(8)
    placement = place_experts(None, ring, n_logical=4096, ep_size=8, redundants_per_rank=1)
    with pytest.raises(Exception, match=r"at most 2048 experts .*n_logical = 4096"):
        jax.block_until_ready(rebalance(np.zeros(5, np.int32), None, ring, placement=placement))


def test_too_large_groups_are_refused():
    ring = topologies.ring(200)
    with pytest.raises(Exception, match=r"r2o: .*at most 128 ranks"):
        jax.block_until_ready(solve(np.ones(200, np.int32), ring))


def test_the_device_is_asked():
    """Properties come from the driver instead of assumptions."""
    device = _native.built_cuda().current_device()
    major, minor = jax.devices()[0].compute_capability.split(".")
    assert device.capability == 10 * int(major) + int(minor)
    if device.capability in (80, 90):  # All of the chip, not a part of it.
        expected = CHIPS[{80: "A100", 90: "H100"}[device.capability]]
        got = (device.shared_bytes, device.largest_cluster, device.dependent_launch)
        assert got == expected[1:]


@pytest.fixture
def assume():
    """Chooses launches as if the first GPU were a smaller chip."""
    real = _native.built_cuda().current_device()

    def choose(capability, shared_bytes, largest_cluster, dependent_launch):
        # XLA replays recorded command buffers without choosing launches again.
        jax.clear_caches()
        _native.built_cuda().assume_device(
            0,
            chip(
                capability,
                min(shared_bytes, real.shared_bytes),
                min(largest_cluster, real.largest_cluster),
                dependent_launch and real.dependent_launch,
            ),
        )

    yield choose
    _native.built_cuda().assume_device(0, None)
    jax.clear_caches()


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize("n_tokens", [3000, 40_000])
@pytest.mark.parametrize(
    "case",
    [
        lambda rng: Case(topologies.cube(), 32),
        lambda rng: Case(random_topology(rng, 64, 2), 16),
        lambda rng: Case(random_topology(rng, 128, 8), 8),
        lambda rng: Case(random_topology(rng, 64, 2), 32),
    ],
    ids=["256", "1024", "1024 on 128x8", "2048"],
)
def test_launches_of_other_chips(rng, assume, case, n_tokens, name):
    """Smaller clusters, fewer warps, no dependent launch: the same bits."""
    case = case(rng)
    assume(*CHIPS[name])
    ids = random_ids(rng, "int32", case.n_logical, case.ep_size, n_tokens // case.ep_size)
    stacked, r2o = repeated((case.placement(rng), case.r2o), 1)
    rows = ids.reshape(1, -1)
    results = native_rebalance(rows, r2o, stacked)
    assert_same(results, on_cpu(native_rebalance)(rows, r2o, stacked))
    loads = counts_of(ids, case.n_logical)[None]
    solved = native_solve(loads, r2o, stacked)
    assert_same(solved, on_cpu(native_solve)(loads, r2o, stacked))
    operands = (ids[None], loads, solved[0], stacked)
    assigned = native_assign(*operands, proportional=False)
    assert_same(assigned, on_cpu(native_assign)(*operands, proportional=False))


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize("ep_size", [8, 64])
def test_copies_of_the_batch_on_other_chips(rng, assume, ep_size, name):
    """At once, or step by step where a block has no room to choose among 512 experts."""
    table = np.full((ep_size, 512 // ep_size + 2), -1, np.int32)
    table[:, :-2] = rng.permutation(512).reshape(ep_size, -1)
    placement = Placement.from_phy2log(table, ep_size=ep_size)
    ids = np.minimum(rng.zipf(1.3, (ep_size * 100, 4)), 512).astype(np.int32) - 1

    def balance(ids):
        return rebalance(ids, None, placement=placement, positions=True, copies="batch")

    want = on_cpu(balance)(ids)
    assume(*CHIPS[name])
    assert_same(jax.tree.leaves(jax.jit(balance)(ids)), jax.tree.leaves(want))


def test_what_a_chip_has_no_room_for_is_refused(assume):
    """Every call refuses it with a clear message, before the launch fails."""
    ids, ring = np.zeros((8, 5), np.int32), topologies.ring(8)
    placement = place_experts(None, ring, n_logical=64, ep_size=8, redundants_per_rank=1)
    split = solve(np.ones(64, np.int32), ring, placement=placement)
    assume(86, 512, 0, False)
    for call in (
        lambda: solve(np.ones(64, np.int32), ring, placement=placement),
        lambda: solve(np.ones(64, np.float32), ring, placement=placement),
        lambda: assign(ids, None, split, ring, placement=placement),
        lambda: rebalance(ids, None, ring, placement=placement),
    ):
        with pytest.raises(Exception, match=r"need \d+ bytes .* 8\.6\) has 512: use"):
            jax.block_until_ready(call())


def test_every_device_has_limits_of_its_own(assume):
    if len(jax.devices()) < 2:
        pytest.skip("takes two GPUs")
    assume(86, 512, 0, False)
    balance = jax.jit(lambda ids: rebalance(ids, None, topologies.cube(), placement=placement))
    placement = Case(topologies.cube(), 2).placement()
    ids = np.zeros((8, 5), np.int32)
    jax.block_until_ready(balance(jax.device_put(ids, jax.devices()[1])))
    with pytest.raises(Exception, match=r"has 512: use"):
        jax.block_until_ready(balance(jax.device_put(ids, jax.devices()[0])))
