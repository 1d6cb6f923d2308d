"""Communicators without a GPU: their arguments, agreement, and what they lower to."""

import gc
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import time
import warnings
from typing import Any
from unittest import mock

import comm_process
import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
import sync_checks
from cases import Case, tokens
from jax import export
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from steps import assert_same

import lplb_jax.comm
from lplb_jax import (
    Comm,
    Placement,
    Status,
    _native,
    _nvshmem,
    _rendezvous,
    count_loads,
    export_checks,
    init_comm,
    rebalance,
    reference,
    sync_loads,
    topologies,
)

RANKS = P("ep")
WITHOUT_GPUS = {"JAX_PLATFORMS": "cpu"}
CASE = Case(topologies.cube(), 8)


@pytest.fixture
def mesh(cpu_devices):
    return Mesh(cpu_devices, "ep")


def fake(axis="ep", size=8):
    """As if there were peer memory; enough to trace a program."""
    return Comm("p2p", axis, size, max_experts=64, timeout_s=1.0, identifier=77)


def sharded(function, mesh, out_specs: Any = RANKS, axes: Any = "ep"):
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=P(axes), out_specs=out_specs))


@pytest.mark.parametrize("solver", ["exact", "ipm"])
def test_xla_equals_no_comm(rng, mesh, solver):
    placement = CASE.placement(rng)
    ids = tokens(rng, CASE, 60)

    def run(comm):
        def step(ids):
            options: dict[str, Any] = {"placement": placement, "axis_name": "ep", "positions": True}
            return rebalance(ids, None, CASE.r2o, comm=comm, solver=solver, **options)

        return sharded(step, mesh, (P("ep"), P()))(ids)

    with init_comm(mesh, max_experts=64) as comm:
        assert (comm.transport, comm.size, comm.axis) == ("xla", 8, "ep")
        assert_same(run(comm), run(None))
        assert comm.failure() is None


@pytest.mark.parametrize("axis", ["data", "ep", ("data", "ep"), ("ep", "data")])
def test_groups_are_the_ranks_that_lax_counts(rng, cpu_devices, axis):
    """Every device's place in its group is its axis_index."""
    mesh = Mesh(rng.permutation(cpu_devices).reshape(2, 4), ("data", "ep"))
    groups = lplb_jax.comm._groups(mesh, axis)

    def index(x):
        return x + jax.lax.axis_index(axis)

    ranks = sharded(index, mesh, P(("data", "ep")), ("data", "ep"))(jnp.zeros(8, jnp.int32))
    of_device = {shard.device: int(shard.data[0]) for shard in ranks.addressable_shards}
    expected = [[of_device[device] for device in group] for group in groups]
    np.testing.assert_array_equal(
        expected, np.broadcast_to(np.arange(groups.shape[1]), groups.shape)
    )
    assert set(groups.flat) == set(cpu_devices)


def test_auto_without_gpus_is_xla_and_says_nothing(mesh):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert init_comm(mesh, max_experts=8).transport == "xla"


@pytest.mark.parametrize("transport", ["p2p", "nvshmem"])
def test_an_explicit_transport_raises(mesh, transport):
    with pytest.raises(RuntimeError, match=f"transport: '{transport}' is not available: .*no GPUs"):
        init_comm(mesh, max_experts=8, transport=transport)


def test_auto_falls_back_with_one_warning(mesh, monkeypatch):
    monkeypatch.setattr(lplb_jax.comm, "_on_gpus", lambda groups: True)
    monkeypatch.setattr(lplb_jax.comm, "_probe_p2p", lambda groups: "GPU 1 has no peer access")
    with pytest.warns(UserWarning, match="lax.all_gather.*GPU 1 has no peer access") as caught:
        comm = init_comm(mesh, max_experts=8)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert comm.transport == "xla"
    with pytest.raises(RuntimeError, match="'p2p' is not available: GPU 1 has no peer access"):
        init_comm(mesh, max_experts=8, transport="p2p")


def test_without_nvshmem_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(_nvshmem, "_library", lambda: None)
    assert "pip install nvidia-nvshmem-cu13" in (_nvshmem.missing() or "")


@pytest.mark.parametrize(
    ("built", "host", "runs"),
    [
        ((3, 4, 5), (3, 4, 5), True),
        ((3, 4, 5), (3, 4, 0), True),
        ((3, 4, 5), (3, 10, 0), True),
        ((3, 8, 0), (3, 4, 5), False),
        ((3, 4, 5), (3, 3, 24), False),
        ((3, 4, 5), (4, 4, 5), False),
        ((3, 4, 5), (2, 11, 0), False),
    ],
)
def test_nvshmem_versions(monkeypatch, built, host, runs):
    """A host library runs older device code of its major version; else both are named."""
    monkeypatch.setattr(_nvshmem, "_library", lambda: Host(host))
    file = pathlib.Path("lplb_jax") / f"put-nvshmem-{'.'.join(map(str, built))}.fatbin"
    monkeypatch.setattr(_nvshmem, "_put_file", lambda: file)
    reason = _nvshmem.missing_put()
    assert (reason is None) == runs
    if reason is not None:
        for version in (built, host):
            assert ".".join(map(str, version)) in reason
        assert f"nvidia-nvshmem-cu13>={built[0]}.{built[1]},<{built[0] + 1}" in reason
        assert "pip install --no-build-isolation ." in reason


class Host:
    """A host library that reports its version."""

    def __init__(self, version):
        self._version = version

    def nvshmemx_vendor_get_version_info(self, *parts):
        for part, number in zip(parts, self._version, strict=True):
            part._obj.value = number


def test_ibgda_needs_the_same_side_of_3_5(monkeypatch):
    """The layout of its queue pairs changed then, which the host library does not check."""
    for value, runs in {"1": False, "true": False, "0": True, "false": True, "": True}.items():
        monkeypatch.setenv("NVSHMEM_IB_ENABLE_IBGDA", value)
        reason = _nvshmem.incompatible((3, 4, 5), (3, 6, 5))
        assert (reason is None) == runs, value
        assert reason is None or "while NVSHMEM_IB_ENABLE_IBGDA is set" in reason
        assert _nvshmem.incompatible((3, 4, 5), (3, 4, 6)) is None
        assert _nvshmem.incompatible((3, 6, 5), (3, 8, 0)) is None


HOST_LIBRARY = """
import ctypes, sys
from lplb_jax import _nvshmem
class Version(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("major", "minor", "patch")]
initialise = _nvshmem._library().nvshmemid_hostlib_init_attr
initialise.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, Version,
                       ctypes.c_void_p]
host = _nvshmem.host_version()
built = (host[0] + int(sys.argv[1]), host[1] + int(sys.argv[2]), host[2])
print("host", host, "runs" if _nvshmem.incompatible(built, host) is None else "refuses", flush=True)
initialise(0, ctypes.byref(ctypes.c_int()), 0, None, Version(*built), None)
"""


@pytest.mark.skipif(_nvshmem.missing() is not None, reason="needs nvidia-nvshmem-cu13")
@pytest.mark.parametrize("major", [-1, 0, 1])
@pytest.mark.parametrize("minor", [-1, 0, 1])
def test_the_host_library_says_the_same(major, minor):
    """It compares the versions first, and prints a mismatch."""
    code = [sys.executable, "-P", "-c", HOST_LIBRARY, str(major), str(minor)]
    done = subprocess.run(code, capture_output=True, text=True)
    (number,) = re.findall(r"host \((.*?)\)", done.stdout)
    assert number.replace(", ", ".") == importlib.metadata.version("nvidia-nvshmem-cu13")
    refuses = "does not match with NVSHMEM host library version" in done.stdout
    assert ("refuses" in done.stdout) == refuses, done.stdout


BAD = {
    "mesh": (lambda mesh: {"mesh": [1, 2]}, TypeError, "mesh: .*Mesh, got list"),
    "axis": (lambda mesh: {"axis": "tp"}, ValueError, r"axis: .*\('ep',\), got 'tp'"),
    "no axis": (lambda mesh: {"axis": ()}, ValueError, "axis: "),
    "axis twice": (lambda mesh: {"axis": ("ep", "ep")}, ValueError, "axis: "),
    "experts": (lambda mesh: {"max_experts": 0}, ValueError, "max_experts: .*got 0"),
    "transport": (lambda mesh: {"transport": "ib"}, ValueError, "transport: .*p2p.*got 'ib'"),
    "timeout": (lambda mesh: {"timeout_s": 0}, ValueError, "timeout_s: .*positive.*got 0"),
    "no timeout": (lambda mesh: {"timeout_s": float("inf")}, ValueError, "timeout_s: .*inf"),
    "too patient": (lambda mesh: {"timeout_s": 1e10}, ValueError, r"timeout_s: .*1e\+09, got 1000"),
    "no number": (lambda mesh: {"timeout_s": "1"}, ValueError, "timeout_s: .*'1'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_of_init(mesh, name):
    arguments, error, words = BAD[name]
    with pytest.raises(error, match=words):
        init_comm(**{"mesh": mesh, "max_experts": 8, **arguments(mesh)})


def closed():
    comm = fake()
    comm.failure = lambda: None
    comm.close()
    return comm


BAD_CALLS = {
    "closed": (closed, {}, ValueError, "comm: it is closed"),
    "another axis": (lambda: fake("tp"), {}, ValueError, "axis_name: expected 'tp'.*got 'ep'"),
    "no axis": (fake, {"axis_name": None}, ValueError, "axis_name: expected 'ep'.*got None"),
    "no comm": (lambda: "p2p", {}, TypeError, "comm: expected a Comm from init_comm, got str"),
    "loads": (fake, {"loads": np.ones((8, 64), np.int32)}, ValueError, "comm: expected None"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(mesh, name):
    comm, options, error, words = BAD_CALLS[name]
    options: dict[str, Any] = {
        "loads": None,
        "axis_name": "ep",
        "placement": CASE.placement(),
        **options,
    }

    def step(ids):
        loads = options.pop("loads")
        return rebalance(ids, loads, CASE.r2o, comm=comm(), **options)[0]

    with pytest.raises(error, match=words):
        sharded(step, mesh)(jnp.zeros(8, jnp.int32))


def test_too_many_experts(mesh):
    with pytest.raises(ValueError, match="max_experts = 64, got 65 experts"):
        sharded(lambda x: sync_loads(x, "ep", comm=fake()), mesh)(jnp.zeros(8 * 65, jnp.int32))


@pytest.mark.parametrize("bad", [np.zeros(8, np.float32), np.zeros((8, 2), np.int32)])
def test_counts_of_another_type_or_shape(mesh, bad):
    with pytest.raises(TypeError, match=r"counts: expected int32 \[n\]"):
        sharded(lambda x: sync_loads(x, "ep", comm=fake()), mesh)(bad)


@pytest.mark.parametrize("jitted", [False, True])
def test_vmap_raises(mesh, jitted):
    def one(ids):
        return sync_loads(count_loads(ids, 8), "ep", comm=fake())

    one = jax.jit(one) if jitted else one
    with pytest.raises(ValueError, match=r"cannot be mapped by vmap .*over 3 elements"):
        sharded(lambda ids: jax.vmap(one)(ids.reshape(3, -1)), mesh)(jnp.zeros(24, jnp.int32))


def test_vmap_over_placements_alone_raises(mesh, rng):
    """What is mapped need not be the tokens."""
    placements = [CASE.placement(rng) for _ in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *placements)

    def step(ids):
        def one(placement):
            options: dict[str, Any] = {"placement": placement, "axis_name": "ep", "comm": fake()}
            return rebalance(ids, None, CASE.r2o, **options)[0]

        return jax.vmap(one)(stacked)

    with pytest.raises(ValueError, match=r"cannot be mapped by vmap .*over 3 elements"):
        sharded(step, mesh)(jnp.zeros(24, jnp.int32))


def exported(function, mesh, out_specs: Any = RANKS):
    """The program for CUDA, made on the CPU's devices, with or without the CUDA module."""
    targets = {"CUDA": tuple(f"lplb_{name}" for name in TARGETS)}
    with mock.patch.dict(_native.AVAILABLE, targets):
        made = export.export(
            sharded(function, mesh, out_specs), platforms=["cuda"], disabled_checks=export_checks()
        )
        return made(jnp.zeros(8 * 30, jnp.int32)).mlir_module()


TARGETS = ["sync", "synced_rebalance", "count", "solve", "assign", "ipm", "rebalance"]


def test_rebalance_lowers_to_one_call(mesh):
    """Count, sync, solve and assign at once; the Split is known to be the same everywhere."""
    placement = CASE.placement()

    def step(ids):
        return rebalance(ids, None, CASE.r2o, placement=placement, axis_name="ep", comm=fake())

    text = exported(step, mesh, (P("ep"), P()))
    assert text.count("custom_call @lplb_") == 1
    assert "custom_call @lplb_synced_rebalance" in text
    assert "comm = 77" in text
    assert "stablehlo.all_gather" not in text
    with pytest.raises(ValueError, match="out_specs"):
        exported(step, mesh, (P(), P()))


def test_invalid_ids_of_more_ranks_than_experts(mesh):
    """In the fused kernels, those who await experts' counts await the invalid ids; here are too few
    of them."""
    table = np.array([0, 1, 2, 3, 0, 1, 2, 3])[:, None]
    placement = Placement.from_phy2log(table, ep_size=8, n_logical=4)

    def step(ids):
        return rebalance(ids, None, placement=placement, axis_name="ep", comm=fake())

    text = exported(step, mesh, (P("ep"), P()))
    assert "custom_call @lplb_synced_rebalance" not in text
    assert text.count("custom_call @lplb_sync(") == 1


@pytest.mark.parametrize("solver", ["exact", "ipm"])
def test_the_status_tells_missing_counts(rng, mesh, monkeypatch, solver):
    """Also where counts are exchanged by a kernel of their own, which leaves −1."""
    comm = Comm("nvshmem_put", "ep", 8, max_experts=64, timeout_s=1.0, identifier=77)
    failed = mock.Mock(side_effect=lambda counts, *_, **__: -jnp.ones((8, counts.size), jnp.int32))
    monkeypatch.setattr(reference, "sync", failed)

    def step(ids):
        options: dict[str, Any] = {"placement": CASE.placement(rng), "axis_name": "ep"}
        return rebalance(ids, None, CASE.r2o, comm=comm, solver=solver, **options)[1]

    split = sharded(step, mesh, P())(tokens(rng, CASE, 60))
    assert failed.called
    np.testing.assert_array_equal(split.status, Status.SYNC_FAILED)
    np.testing.assert_array_equal(split.quota, 0)


def test_ipm_and_the_pieces_lower_to_sync(mesh):
    placement = CASE.placement()

    def step(ids):
        options: dict[str, Any] = {
            "placement": placement,
            "axis_name": "ep",
            "comm": fake(),
            "solver": "ipm",
        }
        physical, split = rebalance(ids, None, CASE.r2o, **options)
        return physical, (split, sync_loads(count_loads(ids, 64), "ep", comm=fake()))

    text = exported(step, mesh, (P("ep"), P()))
    assert text.count("custom_call @lplb_sync(") == 2
    assert "stablehlo.all_gather" not in text


def test_scan_checkpoint_and_grad_can_hold_it(mesh):
    placement = CASE.placement()

    def step(ids):
        @jax.checkpoint
        def layer(x, _):
            options: dict[str, Any] = {"placement": placement, "axis_name": "ep", "comm": fake()}
            physical, _ = rebalance(ids + x[0].astype(jnp.int32), None, CASE.r2o, **options)
            return x * physical.sum(), None

        return jax.grad(lambda x: jax.lax.scan(layer, x, None, length=3)[0].sum())(
            jax.lax.pcast(jnp.ones(2), "ep", to="varying")
        )

    text = exported(step, mesh)
    assert text.count("custom_call @lplb_synced_rebalance") == 2  # Forward, and replayed.


class Mapped:
    """A stand-in for the CUDA module where GPUs map each other's memory."""

    def __init__(self, windows: int = 100):
        self.windows = windows  # that there is memory for
        self.held: list[str] = []
        self.routes = 0

    def __getattr__(self, name):
        return lambda *_: 16 if name.endswith("_bytes") else True

    def comm_failure(self, comm):
        return ""

    def comm_attach(self, comm, ordinal, *_):
        self.held.append(f"state {comm}")

    def comm_detach(self, comm):
        self.held[:] = [one for one in self.held if one != f"state {comm}"]

    def comm_add_route(self, comm, device, to, origin):
        self.routes += 1
        return self.routes - 1

    @property
    def Window(self):
        held, windows = self.held, self.windows

        class Window:
            address = 1

            def __init__(self, ordinal, n_bytes):
                if held.count("window") == windows:
                    raise MemoryError("cudaMalloc")
                held.append("window")

            def __del__(self):
                if "window" in held:
                    held.remove("window")

        return Window


ROOM: dict[str, Any] = {"max_tokens": 16, "hidden_bytes": 64, "copy_bytes": 128}


@pytest.fixture
def one_gpu(mesh, monkeypatch):
    """Makes communicators of a mesh of one GPU, with this module."""
    mesh = Mesh(mesh.devices[:1], "ep")
    monkeypatch.setattr(lplb_jax.comm, "_on_gpus", lambda groups: True)

    def connect(native, **options):
        monkeypatch.setattr(_native, "cuda", lambda: native)
        monkeypatch.setattr(_native, "built_cuda", lambda: native)
        return init_comm(mesh, max_experts=8, transport="p2p", **options)

    return connect


def test_memory_lives_until_it_is_closed(one_gpu):
    """Compiled programs hold nothing but the identifier, and may run when `comm` is forgotten."""
    native = Mapped()
    comm = one_gpu(native, **ROOM)
    name = f"state {comm.identifier}"
    connected = lplb_jax.comm._connected[comm.identifier]
    del comm
    gc.collect()
    assert sorted(native.held) == [name, "window", "window", "window"]
    connected.close()
    assert native.held == []
    assert connected.identifier not in lplb_jax.comm._connected


@pytest.mark.parametrize("windows", [0, 1, 2])
def test_nothing_is_left_where_connecting_fails(one_gpu, windows):
    native, connected = Mapped(windows), len(lplb_jax.comm._connected)
    with pytest.raises(MemoryError):
        one_gpu(native, **ROOM)
    gc.collect()
    assert native.held == []
    assert len(lplb_jax.comm._connected) == connected


def test_memory_is_freed_where_closing_fails(one_gpu):
    native = Mapped()
    comm = one_gpu(native, **ROOM)
    native.comm_detach = mock.Mock(side_effect=RuntimeError("an illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal"):
        comm.close()
    gc.collect()
    assert native.held == [f"state {comm.identifier}"]
    assert comm.closed


def test_routes_are_numbered_as_the_module_numbers_them(one_gpu):
    native = Mapped()
    with one_gpu(native, **ROOM) as comm:
        one, wide, two = [[[0] * n_columns] for n_columns in (1, 33, 2)]
        assert comm.route(one, one) == 0
        for _ in range(2):
            with pytest.raises(ValueError, match=r"r2o: expected at most 32 columns .*got 33"):
                comm.route(wide, wide)
        assert [comm.route(two, two), comm.route(one, one)] == [1, 0]
        assert native.routes == 2


def test_processes_are_awaited_once(monkeypatch):
    """Not each of them for the whole timeout."""
    given = []

    class Client:
        def key_value_set(self, key, value):
            pass

        def blocking_key_value_get(self, key, timeout_ms):
            given.append(timeout_ms)
            time.sleep(0.1)
            return key

    monkeypatch.setattr(_rendezvous, "_client", Client)
    values = _rendezvous.Rendezvous("name", [0, 1, 2, 3], 0.25).exchange("hello", "")
    assert [value[-1] for value in values] == list("0123")
    assert given[0] <= 250
    assert given[1] <= 150
    assert given[2] <= 50
    assert given[3] == 1


@pytest.mark.parametrize(
    ("scenario", "n"),
    [
        ("agreement", 4),
        ("init", 2),
        ("versions", 2),
        ("windows", 2),
        ("identifiers", 2),
        ("closing", 2),
        ("late", 3),
    ],
)
def test_processes(scenario, n):
    for output in processes.run(n, comm_process.__file__, scenario, **WITHOUT_GPUS):
        assert "done" in output


def test_every_check_between_processes(request):
    """The checks for GPUs, including the layer, without one; loads by lax.all_gather."""
    arguments = "0", str(request.config.option.seed), "xla"
    for output in processes.run(2, sync_checks.__file__, *arguments, **WITHOUT_GPUS):
        assert "all passed" in output


def test_the_example_of_several_processes():
    example = pathlib.Path(__file__).parent.parent / "examples" / "processes.py"
    outputs = processes.run(2, str(example), **WITHOUT_GPUS)
    assert "2 ranks, counts by xla: busiest 4096, bound 4096" in outputs[0]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["host:1"], "go together"),
        (["host:1", "2"], "go together"),
        (["host:1", "1", "0"], "argument n_processes: .*at least 2, got '1'"),
        (["host:1", "2", "x"], "argument process: .*at least 0, got 'x'"),
        (["host:1", "2", "2"], "argument process: .*less than 2 processes, got 2"),
    ],
)
def test_bad_arguments_of_the_example(given, words):
    example = pathlib.Path(__file__).parent.parent / "examples" / "processes.py"
    run = subprocess.run([sys.executable, "-P", example, *given], capture_output=True, text=True)
    assert run.returncode == 2
    assert re.search(words, run.stderr.splitlines()[-1]), run.stderr
    assert "Traceback" not in run.stderr
