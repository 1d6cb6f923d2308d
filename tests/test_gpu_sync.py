"""Load sync on NVIDIA GPUs: virtual ranks on one and two, every transport on all there are."""

import contextlib
import importlib.util
import threading
import time

import jax
import numpy as np
import processes
import pytest
import sync_checks
from jax.sharding import Mesh
from meshes import everywhere, per_rank
from test_tiles import some_base

from lplb_jax import Status, _native, init_comm, rebalance, topologies

with contextlib.suppress(ModuleNotFoundError):  # cuda.bindings: only where GPUs are
    from virtual_ranks import VirtualRanks

pytestmark = pytest.mark.gpu

several = pytest.mark.usefixtures("two_gpus")


@pytest.fixture(autouse=True)
def on_gpu():
    assert jax.default_backend() == "gpu"


@pytest.fixture
def virtual_ranks():
    """Creates VirtualRanks on the first GPUs, or skips if there are too few."""
    with contextlib.ExitStack() as stack:

        def make(n_gpus, size, n, timeout_s=20.0):
            if len(jax.devices()) < n_gpus:
                pytest.skip(f"needs {n_gpus} GPUs")
            gpus = jax.devices()[:n_gpus]
            return stack.enter_context(VirtualRanks(gpus, size, n, timeout_s))  # pyright: ignore[reportPossiblyUnboundVariable]

        yield make


def launch_in_bursts(rng, size, n_calls, launch):
    """Runs launch(rank, call) for every rank and call, each rank in its own bursts."""
    done = [0] * size
    while min(done) < n_calls:
        rank = rng.choice([rank for rank in range(size) if done[rank] < n_calls])
        # No rank runs so far ahead that its launch queue fills while others have yet to launch.
        for _ in range(
            min(rng.integers(1, 30), n_calls - done[rank], min(done) + 200 - done[rank])
        ):
            launch(rank, done[rank])
            done[rank] += 1


@pytest.mark.parametrize(("n_gpus", "size"), [(1, 1), (1, 2), (1, 4), (2, 2), (2, 4), (2, 8)])
def test_virtual_ranks(rng, virtual_ranks, n_gpus, size):
    """A thousand calls: every count of every rank, also of ranks that share a GPU."""
    n, n_calls = 100, 1000
    ranks = virtual_ranks(n_gpus, size, n)
    counts = rng.integers(0, 2**31, (n_calls, size, n)).astype(np.int32)
    inputs = [[ranks.put(rank, row) for row in counts[:, rank]] for rank in range(size)]
    empty = np.full((size, n), -7, np.int32)
    outputs = [[ranks.put(rank, empty) for _ in range(n_calls)] for rank in range(size)]
    launch_in_bursts(
        rng,
        size,
        n_calls,
        lambda rank, call: ranks.sync(rank, inputs[rank][call], outputs[rank][call]),
    )
    ranks.wait()
    for rank in range(size):
        np.testing.assert_array_equal(np.stack(outputs[rank]), counts)
    assert not any(ranks.failures())


@pytest.mark.parametrize("n_tokens", [1, 1000, 32_768, 200_000])
@pytest.mark.parametrize(("n_gpus", "size"), [(1, 1), (1, 4), (2, 4), (2, 8)])
@pytest.mark.parametrize("where", ["topology", "anywhere", "copies of the batch", "tiles"])
def test_virtual_ranks_rebalance(rng, virtual_ranks, cpu_devices, n_gpus, size, n_tokens, where):
    """As on as many CPUs that exchange counts by lax.all_gather; in one launch and in two."""
    n_logical, n_calls = 16 * size, 5
    ranks = virtual_ranks(n_gpus, size, n_logical)
    anywhere, fan_out = where != "topology", 3 if where == "copies of the batch" else 0
    costs = {"tile": 16, "base_load": some_base(rng, size)} if where == "tiles" else {}
    if anywhere:
        r2o = np.zeros((size, 0), np.int32)
        placement = sync_checks.placed_anywhere(rng, size, n_logical)
    else:
        complete = topologies.complete(size) if size > 1 else np.zeros((1, 1), np.int32)
        r2o = topologies.cube() if size == 8 else complete
        placement = sync_checks.placed(rng, r2o, size, n_logical)
    ids = rng.zipf(1.3, (n_calls, size, n_tokens)) % (n_logical + 1)  # Some name no expert.
    ids = ids.astype(np.int32)
    calls = [
        [
            ranks.call(rank, r2o, placement, ids[call, rank], fan_out, **costs)
            for call in range(n_calls)
        ]
        for rank in range(size)
    ]
    launch_in_bursts(
        rng, size, n_calls, lambda rank, call: ranks.rebalance(rank, calls[rank][call])
    )
    ranks.wait()
    assert not any(ranks.failures())

    def step(ids):
        options = {"placement": placement, "axis_name": "ep", "positions": True} | costs
        if fan_out:
            options |= {"copies": "batch", "fan_out": fan_out}
        return rebalance(ids, None, None if anywhere else r2o, **options)

    on_cpus = per_rank(step, Mesh(cpu_devices[:size], "ep"))
    for call in range(n_calls):
        expected = jax.tree.leaves(on_cpus(ids[call].reshape(-1)))
        for rank in range(size):
            # The workspace is not a result.
            results = [
                *calls[rank][call].results[:-1],
                *(calls[rank][call].tables if fan_out else []),
                *([calls[rank][call].max_tokens] if costs else []),
            ]
            for got, want in zip(results, expected, strict=True):
                np.testing.assert_array_equal(got, want[rank])


@pytest.mark.parametrize("n_gpus", [1, 2])
def test_a_missing_rank_is_reported(virtual_ranks, n_gpus):
    """Named within the timeout; afterwards no rank keeps waiting."""
    ranks = virtual_ranks(n_gpus, 3, 5, timeout_s=2.0)
    ones = [ranks.put(rank, np.ones(5, np.int32)) for rank in range(3)]
    matrices = [[ranks.put(rank, np.zeros((3, 5), np.int32)) for rank in range(3)] for _ in "12"]
    start = time.perf_counter()
    for rank in (0, 2):
        ranks.sync(rank, ones[rank], matrices[0][rank])
    ranks.wait()
    # Other processes may have the GPU in turn.
    assert 1.9 < time.perf_counter() - start < 10
    failures = ranks.failures()
    for rank in (0, 2):
        assert f"rank {rank} waited 2000 ms" in failures[rank]
        assert "counts of rank 1" in failures[rank]
        assert (np.asarray(matrices[0][rank]) == -1).all()
    start = time.perf_counter()
    ranks.sync(0, ones[0], matrices[1][0])
    ranks.wait()
    assert time.perf_counter() - start < 1.9
    assert (np.asarray(matrices[1][0]) == -1).all()


@pytest.mark.parametrize("n_tokens", [1000, 200_000])
@pytest.mark.parametrize("where", ["topology", "anywhere"])
def test_a_missing_rank_is_awaited_once(rng, virtual_ranks, n_tokens, where):
    """Not once for each count that a thread awaits: in one launch, in two, and by sync_loads."""
    size, n_logical = 4, 1024
    ranks = virtual_ranks(1, size, 10_000, timeout_s=1.0)
    r2o = topologies.complete(size) if where == "topology" else np.zeros((size, 0), np.int32)
    placement = sync_checks.placed(rng, topologies.complete(size), size, n_logical)
    if where == "anywhere":
        placement = sync_checks.placed_anywhere(rng, size, n_logical)
    ids = rng.integers(0, n_logical, n_tokens).astype(np.int32)
    calls = {rank: ranks.call(rank, r2o, placement, ids) for rank in (0, 2)}
    counts = ranks.put(1, np.ones(10_000, np.int32))
    matrix = ranks.put(1, np.zeros((size, 10_000), np.int32))
    start = time.perf_counter()
    for rank, call in calls.items():
        ranks.rebalance(rank, call)
    ranks.wait()
    assert 0.9 < time.perf_counter() - start < 3.5  # All blocks but the first wait a second longer.
    for call in calls.values():
        assert (np.asarray(call.results.physical_indices) == -1).all()
        assert (np.asarray(call.results.status) & Status.SYNC_FAILED).all()
    start = time.perf_counter()
    ranks.sync(1, counts, matrix)
    ranks.wait()
    assert 0.9 < time.perf_counter() - start < 3.5
    assert (np.asarray(matrix) == -1).all()


def test_a_failed_rank_sends_no_counts(virtual_ranks):
    """What it sent before is right; who awaits more of it fails at once, too."""
    ranks = virtual_ranks(1, 3, 5, timeout_s=2.0)
    ones = [ranks.put(rank, np.ones(5, np.int32)) for rank in range(3)]
    matrices = [[ranks.put(rank, np.zeros((3, 5), np.int32)) for rank in range(3)] for _ in "12"]
    for of_call in ((0,), (1, 2)):
        for rank in of_call:
            ranks.sync(rank, ones[rank], matrices[0][rank])
        ranks.wait()
    assert [np.unique(matrix).tolist() for matrix in matrices[0]] == [[-1], [1], [1]]
    start = time.perf_counter()
    for rank in range(3):
        ranks.sync(rank, ones[rank], matrices[1][rank])
    ranks.wait()
    assert time.perf_counter() - start < 1.9
    assert [np.unique(matrix).tolist() for matrix in matrices[1]] == [[-1]] * 3
    failures = ranks.failures()
    assert "rank 0 waited 2000 ms" in failures[0]
    for rank in (1, 2):
        assert f"rank {rank} needs" in failures[rank]
        assert "of rank 0, which has failed" in failures[rank]


@pytest.mark.parametrize("n_tokens", [1000, 200_000])
def test_a_failed_rank_is_in_no_split(rng, virtual_ranks, n_tokens):
    """The same for rebalance: its status tells on all ranks, and no token has a slot."""
    size, n_logical = 3, 48
    ranks = virtual_ranks(1, size, n_logical, timeout_s=2.0)
    r2o = topologies.ring(size)
    placement = sync_checks.placed(rng, r2o, size, n_logical)
    ids = rng.integers(0, n_logical, n_tokens).astype(np.int32)
    calls = [[ranks.call(rank, r2o, placement, ids) for rank in range(size)] for _ in "12"]
    for of_call in ((0,), (1, 2)):
        for rank in of_call:
            ranks.rebalance(rank, calls[0][rank])
        ranks.wait()
    start = time.perf_counter()
    for rank in range(size):
        ranks.rebalance(rank, calls[1][rank])
    ranks.wait()
    assert time.perf_counter() - start < 1.9
    for call, failing in ((0, (0,)), (1, (0, 1, 2))):
        for rank in range(size):
            results = calls[call][rank].results
            failed = np.asarray(results.status) & Status.SYNC_FAILED != 0
            assert failed.all() if rank in failing else not failed.any()
            lost = np.asarray(results.physical_indices) == -1
            assert lost.all() if rank in failing else not lost.any()


def test_a_wrong_rank_is_reported(virtual_ranks):
    ranks = virtual_ranks(1, 1, 5)
    counts, matrix = np.ones(5, np.int32), np.zeros((1, 5), np.int32)
    counts, matrix = ranks.put(0, counts), ranks.put(0, matrix)
    ranks.sync(0, counts, matrix, claimed=ranks.put(0, np.int32(3)))
    ranks.wait()
    assert (np.asarray(matrix) == -1).all()
    assert "takes rank 0 for rank 3" in ranks.failures()[0]


@pytest.fixture
def mesh():
    return Mesh(np.array(jax.devices()), "ep")


def test_one_gpu_is_a_mesh_too(rng):
    mesh = Mesh(np.array(jax.devices()[:1]), "ep")
    with init_comm(mesh, max_experts=512) as comm:
        assert comm.transport == "p2p"
        sync_checks.check_sync(mesh, comm, rng)
        assert comm.failure() is None


@several
@pytest.mark.parametrize("check", sync_checks.CHECKS, ids=lambda check: check.__name__)
def test_p2p(rng, mesh, check):
    with init_comm(mesh, max_experts=512) as comm:
        assert comm.transport == "p2p"
        check(mesh, comm, rng)


@several
def test_p2p_sub_axis(rng):
    sync_checks.check_sub_axis(jax.devices(), "p2p", rng)


@several
def test_p2p_missing_rank(mesh):
    """One device's kernel runs alone; the programs after it raise, and a new comm works."""
    comm = init_comm(mesh, max_experts=16, timeout_s=1.0)
    device = mesh.devices[0]
    rank, counts, matrix = (
        jax.device_put(a, device)
        for a in (np.int32(0), np.ones(4, np.int32), np.zeros((mesh.devices.size, 4), np.int32))
    )
    pointers = [a.unsafe_buffer_pointer() for a in jax.block_until_ready([rank, counts, matrix])]
    from lplb_jax import _bench

    _native.built_cuda().comm_use_device(device.local_hardware_id)
    _bench.launch_sync(comm.identifier, device.local_hardware_id, *pointers[:2], 4, pointers[2], 0)
    time.sleep(2)
    assert "rank 0 waited 1000 ms" in (comm.failure() or "")
    error, _ = sync_checks.run_until_error(mesh, comm)
    assert "DEADLINE_EXCEEDED" in error
    assert "counts of rank" in error
    comm.close()
    with init_comm(mesh, max_experts=256) as comm:
        sync_checks.check_sync(mesh, comm, np.random.default_rng())


@several
def test_p2p_other_mesh(mesh):
    """A mesh other than init_comm's: every token gets −1, with a status bit; the next use raises.

    The same holds for a device that starts after another one has failed.
    """
    remedy = "use the mesh that the communicator was made with"
    with init_comm(mesh, max_experts=16, timeout_s=1.0) as comm:
        reversed_mesh = Mesh(mesh.devices[::-1], "ep")
        raised = None
        try:
            assert sync_checks.failed_status(reversed_mesh, comm) & Status.SYNC_FAILED
        except jax.errors.JaxRuntimeError as error:
            raised = str(error)
        assert raised is None or remedy in raised
        error, _ = sync_checks.run_until_error(mesh, comm)
        assert remedy in error


@several
def test_closed_between_compilation_and_run(mesh):
    comm = init_comm(mesh, max_experts=16)
    step = per_rank(lambda c: sync_checks.sync_loads(c, "ep", comm=comm), mesh)
    counts = everywhere(mesh, np.ones(mesh.devices.size * 4, np.int32))
    jax.block_until_ready(step(counts))
    comm.close()
    with pytest.raises(Exception, match="comm: it was closed"):
        jax.block_until_ready(step(counts))


@pytest.mark.parametrize("n_gpus", [1, None])
def test_closed_before_a_recorded_program_runs(n_gpus):
    """XLA records long programs, and replays them without calling the handlers again."""
    mesh = Mesh(np.array(jax.devices()[:n_gpus]), "ep")
    comm = init_comm(mesh, max_experts=512)

    def calls(counts):
        for _ in range(20):
            counts = counts + sync_checks.sync_loads(counts, "ep", comm=comm).max(axis=0) % 3
        return counts

    run = per_rank(calls, mesh)
    counts = everywhere(mesh, np.ones(mesh.devices.size * 4, np.int32))
    for _ in range(4):
        jax.block_until_ready(run(counts))
    comm.close()
    for _ in range(2):
        with pytest.raises(Exception, match="comm: it was closed"):
            jax.block_until_ready(run(counts))
    with init_comm(mesh, max_experts=512) as comm:
        sync_checks.check_sync(mesh, comm, np.random.default_rng())


def test_a_rank_is_connected_once(virtual_ranks):
    """With one communicator; the first connection still works."""
    ranks = virtual_ranks(1, 2, 5)
    native, ordinal = _native.built_cuda(), ranks.devices[0].local_hardware_id
    window = native.Window(ordinal, native.comm_inbox_bytes(2, 6))
    for rank in range(2):
        words = f"device {ordinal} is already rank 0 of communicator {ranks.ids[0]}"
        with pytest.raises(RuntimeError, match=words):
            native.comm_attach(ranks.ids[0], ordinal, rank, [window.address] * 2, 6, 1.0)
    counts = [ranks.put(rank, np.full(5, rank, np.int32)) for rank in range(2)]
    matrices = [ranks.put(rank, np.zeros((2, 5), np.int32)) for rank in range(2)]
    for rank in range(2):
        ranks.sync(rank, counts[rank], matrices[rank])
    ranks.wait()
    for matrix in matrices:
        np.testing.assert_array_equal(matrix, [[0] * 5, [1] * 5])


def test_other_threads_run_while_cuda_waits(virtual_ranks):
    """A rank waits, and a thread for its device; this one must be able to launch the other rank."""
    ranks = virtual_ranks(1, 2, 5, timeout_s=3.0)
    native, ordinal = _native.built_cuda(), ranks.devices[0].local_hardware_id
    window = native.Window(ordinal, 1024)
    ones = [ranks.put(rank, np.ones(5, np.int32)) for rank in range(2)]
    matrices = [ranks.put(rank, np.zeros((2, 5), np.int32)) for rank in range(2)]
    ranks.sync(0, ones[0], matrices[0])
    waits = threading.Thread(target=native.comm_clear, args=(ordinal, window.address, 1024))
    waits.start()
    time.sleep(0.2)
    ranks.sync(1, ones[1], matrices[1])
    waits.join()
    ranks.wait()
    assert not any(ranks.failures())
    for matrix in matrices:
        np.testing.assert_array_equal(matrix, 1)


def run_processes(request, scenario, n_processes=None):
    """Outputs of one process per GPU, or of `n_processes` that share the GPUs; with the seed."""
    n_gpus = len(jax.devices())
    seed = str(request.config.option.seed)
    return processes.run(
        n_processes or n_gpus,
        sync_checks.__file__,
        str(n_gpus),
        seed,
        scenario,
        XLA_PYTHON_CLIENT_PREALLOCATE="false",
    )


needs_nvshmem = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None, reason="needs nvidia-nvshmem-cu13"
)


@several
@needs_nvshmem
@pytest.mark.parametrize("transport", ["auto", "nvshmem_put"])
def test_nvshmem(request, transport):
    for output in run_processes(request, transport):
        assert "all passed" in output


@pytest.fixture
def n_processes(request):
    """One process per GPU, or more that share them."""
    if request.param is not None and request.param <= len(jax.devices()):
        pytest.skip("there are as many GPUs")
    return request.param


@several
@needs_nvshmem
@pytest.mark.parametrize("n_processes", [4, 8], indirect=True)
def test_processes_that_share_gpus(request, n_processes):
    for output in run_processes(request, "auto", n_processes):
        assert "all passed" in output


@several
@needs_nvshmem
@pytest.mark.parametrize("n_processes", [None, 8], indirect=True)
def test_nvshmem_killed_rank(request, n_processes):
    """The others return an error within the timeout plus two seconds."""
    outputs = run_processes(request, "killed", n_processes)
    for process, output in enumerate(outputs):
        assert process == 1 or "DEADLINE_EXCEEDED" in output
