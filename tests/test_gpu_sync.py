"""Load sync on NVIDIA GPUs: virtual ranks on one, and every transport on as many as there are."""

import importlib.util
import time

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
import sync_checks
from jax.sharding import Mesh

from lplb_jax import Status, _native, init_comm

pytestmark = pytest.mark.gpu

several = pytest.mark.skipif(
    jax.default_backend() != "gpu" or len(jax.devices()) < 2, reason="needs two GPUs"
)


@pytest.fixture(autouse=True)
def on_gpu():
    assert jax.default_backend() == "gpu"


class VirtualRanks:
    """Ranks that share a GPU, each a communicator's only device on a stream of its own."""

    def __init__(self, size, n, timeout_s):
        from cuda.bindings import runtime

        self.runtime, self.native, self.n = runtime, _native.cuda(), n
        self.ids = [10_000 + rank for rank in range(size)]
        n_bytes = self.native.comm_inbox_bytes(size, n)
        self.inboxes = [self.native.comm_allocate(0, n_bytes) for _ in range(size)]
        for rank, identifier in enumerate(self.ids):
            self.native.comm_attach(identifier, 0, rank, self.inboxes, n, timeout_s)
        flag = runtime.cudaStreamNonBlocking
        self.streams = [int(runtime.cudaStreamCreateWithFlags(flag)[1]) for _ in range(size)]

    def sync(self, rank, claimed, counts, matrix):
        pointers = [jax.block_until_ready(a).unsafe_buffer_pointer() for a in (claimed, counts)]
        out = jax.block_until_ready(matrix).unsafe_buffer_pointer()
        self.native.launch_sync(self.ids[rank], 0, *pointers, self.n, out, self.streams[rank])

    def wait(self):
        for stream in self.streams:
            (error,) = self.runtime.cudaStreamSynchronize(stream)
            assert error == self.runtime.cudaError_t.cudaSuccess

    def close(self):
        for identifier in self.ids:
            self.native.comm_detach(identifier)
        for inbox in self.inboxes:
            self.native.comm_free(0, inbox)


@pytest.fixture
def virtual_ranks():
    made = []

    def make(size, n, timeout_s=20.0):
        made.append(VirtualRanks(size, n, timeout_s))
        return made[-1]

    yield make
    for ranks in made:
        ranks.close()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_virtual_ranks(rng, virtual_ranks, size):
    """A thousand calls, each rank launching them in bursts of its own.

    Not more ranks than the GPU has queues: one stream's kernels would wait behind another's.
    """
    n, n_calls = 100, 1000
    ranks = virtual_ranks(size, n)
    counts = rng.integers(0, 2**31, (n_calls, size, n)).astype(np.int32)
    inputs = [[jnp.asarray(row) for row in counts[:, rank]] for rank in range(size)]
    outputs = [[jnp.full((size, n), -7, jnp.int32) for _ in range(n_calls)] for _ in range(size)]
    claimed = [jnp.int32(rank) for rank in range(size)]
    done = [0] * size
    while min(done) < n_calls:
        rank = rng.choice([rank for rank in range(size) if done[rank] < n_calls])
        # No burst so far ahead that the queue of launches is full while others must still come.
        for _ in range(
            min(rng.integers(1, 30), n_calls - done[rank], min(done) + 200 - done[rank])
        ):
            call = done[rank]
            ranks.sync(rank, claimed[rank], inputs[rank][call], outputs[rank][call])
            done[rank] += 1
    ranks.wait()
    for rank in range(size):
        np.testing.assert_array_equal(np.stack(outputs[rank]), counts)
    assert all(ranks.native.comm_failure(identifier) == "" for identifier in ranks.ids)


def test_a_missing_rank_is_reported(virtual_ranks):
    """Within the timeout, by name; afterwards nobody waits any more."""
    ranks = virtual_ranks(3, 5, timeout_s=0.5)
    matrices = [jnp.zeros((3, 5), jnp.int32) for _ in range(4)]
    start = time.perf_counter()
    for rank in (0, 2):
        ranks.sync(rank, jnp.int32(rank), jnp.ones(5, jnp.int32), matrices[rank])
    ranks.wait()
    assert 0.4 < time.perf_counter() - start < 2.5
    for rank in (0, 2):
        message = ranks.native.comm_failure(ranks.ids[rank])
        assert f"rank {rank} waited 500 ms" in message
        assert "counts of rank 1" in message
        assert (np.asarray(matrices[rank]) == -1).all()
    start = time.perf_counter()
    ranks.sync(0, jnp.int32(0), jnp.ones(5, jnp.int32), matrices[3])
    ranks.wait()
    assert time.perf_counter() - start < 0.4
    assert (np.asarray(matrices[3]) == -1).all()


def test_a_wrong_rank_is_reported(virtual_ranks):
    ranks = virtual_ranks(1, 5)
    matrix = jnp.zeros((1, 5), jnp.int32)
    ranks.sync(0, jnp.int32(3), jnp.ones(5, jnp.int32), matrix)
    ranks.wait()
    assert (np.asarray(matrix) == -1).all()
    assert "takes rank 0 for rank 3" in ranks.native.comm_failure(ranks.ids[0])


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
    native = _native.cuda()
    native.comm_use_device(device.local_hardware_id)
    native.launch_sync(comm.identifier, device.local_hardware_id, *pointers[:2], 4, pointers[2], 0)
    time.sleep(2)
    assert "rank 0 waited 1000 ms" in comm.failure()
    error, _ = sync_checks.run_until_error(mesh, comm)
    assert "DEADLINE_EXCEEDED" in error
    assert "counts of rank" in error
    comm.close()
    with init_comm(mesh, max_experts=256) as comm:
        sync_checks.check_sync(mesh, comm, np.random.default_rng())


@several
def test_p2p_other_mesh(mesh):
    """Not the mesh of init_comm: every token gets −1, the status says so, the next use raises."""
    with init_comm(mesh, max_experts=16, timeout_s=1.0) as comm:
        reversed_mesh = Mesh(mesh.devices[::-1], "ep")
        assert sync_checks.failed_status(reversed_mesh, comm) & Status.SYNC_FAILED
        error, _ = sync_checks.run_until_error(mesh, comm)
        assert "use the mesh that the communicator was made with" in error


@several
def test_closed_between_compilation_and_run(mesh):
    comm = init_comm(mesh, max_experts=16)
    step = sync_checks.per_rank(lambda c: sync_checks.sync_loads(c, "ep", comm=comm), mesh)
    counts = sync_checks.everywhere(mesh, np.ones(mesh.devices.size * 4, np.int32))
    jax.block_until_ready(step(counts))
    comm.close()
    with pytest.raises(Exception, match="comm: it was closed"):
        jax.block_until_ready(step(counts))


def run_processes(request, scenario):
    """Outputs of one process per GPU; they begin with the seed."""
    seed = str(request.config.option.seed)
    return processes.run(
        len(jax.devices()),
        sync_checks.__file__,
        seed,
        scenario,
        timeout=150,
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


@several
@needs_nvshmem
def test_nvshmem_killed_rank(request):
    """The others return an error within the timeout plus two seconds."""
    outputs = run_processes(request, "killed")
    assert "DEADLINE_EXCEEDED" in outputs[0]
