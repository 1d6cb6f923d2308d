"""Tokens by transport "peer" on NVIDIA GPUs: virtual ranks on one and two, and the layer itself."""

import contextlib
import functools
import importlib.util
import time

import jax
import jax.numpy as jnp
import numpy as np
import peer_checks
import plan_cases
import processes
import pytest
from jax import lax
from jax.sharding import Mesh
from meshes import everywhere, per_rank
from moe_checks import AnyCase
from steps import on_cpu
from test_moe_slots import hot, slots_used

from lplb_jax import _native, init_comm, reference, topologies
from lplb_jax.comm import Windows
from lplb_jax.moe.flight import Flight
from lplb_jax.moe.slots import room_for

with contextlib.suppress(ModuleNotFoundError):  # cuda.bindings: only where GPUs are
    from exchange_batch import ExchangeBatch
    from virtual_ranks import VirtualRanks

pytestmark = pytest.mark.gpu

several = pytest.mark.usefixtures("two_gpus")
needs_nvshmem = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None, reason="needs nvidia-nvshmem-cu13"
)


@pytest.fixture(autouse=True)
def on_gpu():
    assert jax.default_backend() == "gpu"


# Tokens of one tile and of many, of several rounds and of none that is full; and few choices.
@pytest.mark.parametrize(
    ("n_ranks", "n_slots", "n_tokens", "top_k"),
    [
        (1, 3, 5, 2), (2, 20, 32, 8), (2, 20, 2048, 8), (8, 40, 16384, 8), (64, 6, 1000, 8),
        (5, 90, 333, 32), (32, 1, 5000, 1), (3, 500, 4097, 7),
    ],
)  # fmt: skip
def test_the_plan(rng, n_ranks, n_slots, n_tokens, top_k):
    for _ in range(3):
        case = plan_cases.random_case(rng, n_ranks, n_slots, n_tokens, top_k)
        plan_cases.check(case.run(), case)


@pytest.mark.parametrize(
    ("n_ranks", "n_slots", "n_logical"),
    [(1, 3, 3), (2, 34, 64), (4, 5, 6), (8, 6, 16), (64, 6, 256), (144, 3, 300), (12, 90, 500)],
)
def test_the_journeys(rng, n_ranks, n_slots, n_logical):
    """Rows of slots and every rank's journeys are those of the specification."""
    case = AnyCase(n_ranks, n_slots, n_logical)
    for turn in range(4):
        placement = hot(rng, case) if turn % 2 else case.placement(rng)
        loads = slots_used(rng, placement).astype(np.int32)
        tables = placement.phy2log, placement.log2phy
        sizes = {"ep_size": n_ranks, "room": room_for(placement)}
        rows = of_both("lplb_slots_by_row", reference.slots_by_row, *tables, **sizes)
        limits = {"most": int(rng.integers(1, 9)), "n_received": int(rng.integers(0, 3 * n_slots))}
        for me in rng.permutation(n_ranks)[:4]:
            operands = tables[0], rows, loads, np.int32(me)
            limits |= {"n_logical": n_logical}
            of_both("lplb_journeys", reference.journeys, *operands, **limits)


def of_both(target, specification, *operands, **attributes):
    """The kernel's result, which must be the specification's."""
    call = functools.partial(_native.call, target, specification, **attributes)
    got = jax.jit(call)(*map(jnp.asarray, operands))
    want = on_cpu(jax.jit(functools.partial(specification, **attributes)))(*operands)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(got), jax.tree.leaves(want))
    return got


@pytest.fixture
def virtual_ranks():
    """Creates VirtualRanks on the first GPUs, or skips if there are too few."""
    with contextlib.ExitStack() as stack:

        def make(n_gpus, size, n_tokens, top_k, row_bytes, timeout_s=20.0):
            if len(jax.devices()) < n_gpus:
                pytest.skip(f"needs {n_gpus} GPUs")
            windows = Windows(size, n_tokens, top_k, row_bytes)
            gpus = jax.devices()[:n_gpus]
            return stack.enter_context(VirtualRanks(gpus, size, 8, timeout_s, windows))  # pyright: ignore[reportPossiblyUnboundVariable]

        yield make


def random_batch(rng, ranks, size, listed):
    """Any sizes; sometimes ranks send nothing, one gets everything, or there is little room. Rows
    in one array, or in several; all of them, or those of listed entries."""
    # With few blocks, warps receive one item at a time of the small ones, several of the large.
    n_tokens = int(np.exp(rng.uniform(0, np.log(480 // max(size - 1, 1)))))
    top_k = int(rng.integers(1, 9))
    per_entry = ((1,), (2, 1), (1, 3, 1, 2))[rng.integers(0, 3)]
    each = sum(per_entry)
    n_tokens = max(n_tokens // each, 1) * each
    kind = rng.choice(["any", "one", "silent", "nothing", "little room"])
    ranks_of = rng.integers(-1, size, (size, n_tokens, top_k))
    if kind == "one":
        ranks_of[:] = rng.integers(size)
    elif kind == "silent":
        ranks_of[::2] = -1
    elif kind == "nothing":
        ranks_of[:] = -1
    most = size * n_tokens * top_k
    capacity = int(rng.integers(1, most // each + 1)) * each if kind == "little room" else most
    dtype = rng.choice(["bfloat16", "float16", "float32"])
    hidden = 8 * int(rng.integers(1, 65))
    blocks = int(rng.integers(1, 9))
    options = {"dtype": str(dtype), "blocks": (blocks, int(rng.integers(1, blocks + 1)))}
    options |= {"per_entry": per_entry, "listed": listed}
    return ExchangeBatch(ranks.put, ranks_of, capacity, hidden, rng, **options)  # pyright: ignore[reportPossiblyUnboundVariable]


# One rank waits for nobody, so that the sanitizers can run it: they let kernels run one by one.
@pytest.mark.parametrize(
    ("n_gpus", "size", "n_bursts"),
    [(1, 1, 5), (1, 2, 85), (1, 4, 85), (2, 2, 85), (2, 4, 85), (2, 8, 85)],
)
def test_virtual_ranks(rng, virtual_ranks, n_gpus, size, n_bursts):
    """Thousands of exchanges in bursts, alternating random batches: every row, gate and sum."""
    ranks = virtual_ranks(n_gpus, size, 480, 8, 2080)
    batches = [random_batch(rng, ranks, size, listed=i % 2 == 1) for i in range(6)]
    for _ in range(n_bursts):
        which = rng.integers(0, len(batches), 20)  # there and back each
        done = np.zeros(size, int)
        while done.min() < len(which):
            rank = rng.choice(np.flatnonzero(done < len(which)))
            end = min(done[rank] + rng.integers(1, 20), len(which))
            for call in range(done[rank], end):
                ranks.there(rank, batches[which[call]])
                ranks.back(rank, batches[which[call]])
            done[rank] = end
        ranks.wait()
        assert not any(ranks.failures())
        for i in np.unique(which):
            batches[i].check()
            batches[i].clear()


@pytest.mark.parametrize(("n_gpus", "size"), [(1, 1), (1, 2), (2, 2), (2, 4)])
def test_long_rows(rng, virtual_ranks, n_gpus, size):
    """Rows that a warp moves and sums in many steps, the last one not full."""
    n_tokens, top_k = 2100 // size, int(rng.integers(2, 9))
    hidden = 8 * int(rng.integers(200, 600))
    ranks = virtual_ranks(n_gpus, size, (size - 1) * n_tokens, top_k, 2 * hidden)
    ranks_of = rng.integers(-1, size, (size, n_tokens, top_k))
    capacity = int(np.bincount(ranks_of[ranks_of >= 0]).max())
    batch = ExchangeBatch(ranks.put, ranks_of, capacity, hidden, rng)  # pyright: ignore[reportPossiblyUnboundVariable]
    for _ in range(4):
        for rank in range(size):
            ranks.there(rank, batch)
            ranks.back(rank, batch)
    ranks.wait()
    assert not any(ranks.failures())
    batch.check()


@pytest.mark.parametrize(
    ("n_gpus", "first_row", "per_entry"),
    [(1, 0, (1,)), (1, 7, (1,)), (2, 0, (1,)), (1, 20, (3, 2)), (1, 10, (1, 2, 1, 1))],
)
def test_a_missing_rank_is_reported(rng, virtual_ranks, n_gpus, first_row, per_entry):
    """Named within the timeout; received data is not returned, and no rank keeps waiting. Rows
    before the first that may come are spared: they can be a rank's own experts."""
    ranks = virtual_ranks(n_gpus, 3, 480, 2, 256, timeout_s=2.0)
    ranks_of = rng.integers(0, 3, (3, 50, 2))
    sizes = {"first_row": first_row, "per_entry": per_entry, "listed": first_row > 0}
    batch = ExchangeBatch(ranks.put, ranks_of, 300, 128, rng, **sizes)  # pyright: ignore[reportPossiblyUnboundVariable]
    start = time.perf_counter()
    for rank in (0, 2):
        ranks.there(rank, batch)
    ranks.wait()
    # Other processes may have the GPU in turn.
    assert 1.9 < time.perf_counter() - start < 10
    failures = ranks.failures()
    for rank in (0, 2):
        assert f"rank {rank} waited 2000 ms" in failures[rank]
        assert "tokens of rank 1" in failures[rank]
        assert batch.is_poisoned(rank)
    start = time.perf_counter()
    ranks.back(0, batch)
    ranks.wait()
    assert time.perf_counter() - start < 1.9


def test_a_failed_rank_sends_no_tokens(rng, virtual_ranks):
    """What it sent before is right; who awaits more of it fails at once, too."""
    ranks = virtual_ranks(1, 3, 480, 2, 256, timeout_s=2.0)
    batch = ExchangeBatch(ranks.put, rng.integers(0, 3, (3, 50, 2)), 300, 128, rng)  # pyright: ignore[reportPossiblyUnboundVariable]
    for of_call in ((0,), (1, 2)):
        for rank in of_call:
            ranks.there(rank, batch)
        ranks.wait()
    assert [batch.is_poisoned(rank) for rank in range(3)] == [True, False, False]
    start = time.perf_counter()
    for rank in range(3):
        ranks.back(rank, batch)
    ranks.wait()
    assert time.perf_counter() - start < 1.9
    failures = ranks.failures()
    for rank in range(3):
        sums = batch.of(rank, ranks.put(rank, np.int32(rank)))[3]
        assert all(np.isnan(np.asarray(array, np.float64)).all() for array in sums)
        assert ("of rank 0, which has failed" in failures[rank]) == (rank > 0)


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()), "ep")


@several
@pytest.mark.parametrize("check", peer_checks.CHECKS, ids=lambda check: check.__name__)
def test_p2p(rng, mesh, check):
    with init_comm(mesh, max_experts=64, **peer_checks.WINDOWS) as comm:
        assert comm.transport == "p2p"
        check(mesh, comm, rng)
        assert comm.failure() is None


@pytest.mark.parametrize("copies", ["placement", "batch"])
def test_a_sub_axis_of_a_mesh(rng, copies):
    """Two groups of GPUs, each with its own windows."""
    gpus = jax.devices()
    if len(gpus) < 4:
        pytest.skip("needs four GPUs")
    mesh = Mesh(np.array(gpus)[: len(gpus) // 2 * 2].reshape(2, -1), ("data", "ep"))
    with init_comm(mesh, "ep", max_experts=64, **peer_checks.WINDOWS) as comm:
        peer_checks.check_sub_axis(mesh, comm, rng, copies)
        assert comm.failure() is None


@several
@pytest.mark.parametrize("check", peer_checks.COPY_CHECKS, ids=lambda check: check.__name__)
def test_copies_in_flight(rng, mesh, check):
    with init_comm(mesh, max_experts=64, **peer_checks.WITH_COPIES) as comm:
        check(mesh, comm, rng)
        assert comm.failure() is None


@several
@pytest.mark.parametrize("homewards", [False, True])
def test_a_late_rank_takes_no_mixed_copies(mesh, homewards):
    """Who gives up waiting for a place cannot stop its engines: they overwrite what a late rank has
    not taken yet, and that rank must not mistake it for what it waits for. That may come from
    another rank than what overwrites it: the third flight goes the other way."""
    r2o, shape = topologies.ring(mesh.size), (2, 1 << 20)

    def rank(ones):
        copies = Flight(r2o, "ep", 1, comm)
        flights, homes = [], [False, False, homewards]
        for value, home in enumerate(homes, start=1):  # The memory has room for two.
            weights = [ones * value]
            number = copies.start(weights, home=home)
            ones, number = lax.optimization_barrier((ones, number))
            flights.append((number, weights))
        rounds = jnp.where(lax.axis_index("ep") == 1, 100_000, 0)
        busy = lax.fori_loop(0, rounds, lambda _, x: jnp.sin(x) + 1, jnp.tile(ones, 8))
        flights, busy = lax.optimization_barrier((flights, busy))
        came = []
        for i, home in enumerate(homes):
            number, weights = flights[i]
            came += copies.take(number, weights, home=home)
            came, flights = lax.optimization_barrier((came, flights))
        return jnp.stack(came), busy[0, 0]  # or else XLA drops the loop

    room = 4 * shape[1]
    with init_comm(
        mesh, max_experts=64, timeout_s=1.0, copy_bytes=room, **peer_checks.WINDOWS
    ) as comm:
        run = per_rank(rank, mesh, n_inputs=1)
        came, _ = run(everywhere(mesh, np.ones((shape[0] * mesh.size, shape[1]), np.float32)))
        of_ranks = np.asarray(came).reshape(mesh.size, 3, -1)
        assert "copies" in str(comm.failure())
    expected = np.arange(1, 4, dtype=np.float32)[None, :, None]
    assert ((of_ranks == expected) | np.isnan(of_ranks)).all()
    assert np.isnan(of_ranks[1, 0]).all()


@several
def test_copies_of_another_size_are_not_taken(mesh):
    """Nothing is written beyond a result."""
    r2o, shape = topologies.ring(mesh.size), (2, 1 << 10)

    def rank(ones):
        copies = Flight(r2o, "ep", 1, comm)
        number = copies.start([ones], home=False)
        half, number = lax.optimization_barrier((ones[:, ::2], number))
        (came,) = copies.take(number, [half], home=False)
        return came, ones * 2  # What left stays as it is until then.

    with init_comm(mesh, max_experts=64, copy_bytes=4 * shape[1], **peer_checks.WINDOWS) as comm:
        run = per_rank(rank, mesh, n_inputs=1)
        ones = everywhere(mesh, np.ones((shape[0] * mesh.size, shape[1]), np.float32))
        with pytest.raises(Exception, match="other copies are on their way"):
            jax.block_until_ready(run(ones))


def test_one_gpu_is_a_mesh_too(rng):
    mesh = Mesh(np.array(jax.devices()[:1]), "ep")
    with init_comm(mesh, max_experts=64, **peer_checks.WINDOWS) as comm:
        peer_checks.check_parts(mesh, comm, rng)
        assert comm.failure() is None


@several
@needs_nvshmem
@pytest.mark.parametrize(
    ("transport", "scenario"),
    [
        ("nvshmem", "all"), ("nvshmem", "copies"), ("nvshmem", "killed"),
        ("nvshmem_put", "all"), ("nvshmem_put", "killed"),
    ],
)  # fmt: skip
def test_processes(request, transport, scenario):
    """One per GPU; if one is killed, an error within the timeout, and no garbage."""
    seed = str(request.config.option.seed)
    memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    arguments = seed, scenario, transport
    outputs = processes.run(len(jax.devices()), peer_checks.__file__, *arguments, **memory)
    for process, output in enumerate(outputs):
        if scenario != "killed":
            assert "all passed" in output
        else:
            assert process == 1 or "DEADLINE_EXCEEDED" in output
