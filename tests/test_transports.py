"""The layer's choice of transport, by available libraries and number of processes."""

import types
import warnings

import jax
import jax.numpy as jnp
import jaxlib.version
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from moe_checks import AnyCase

from lplb_jax import moe, rebalance
from lplb_jax._native import warn_once
from lplb_jax.moe import ragged, transports
from lplb_jax.moe.collectives import Padded
from lplb_jax.moe.ragged import Ragged

HOSTS_OF_ONE = [types.SimpleNamespace(slice_index=0)] * 4
HOSTS_OF_TWO = [types.SimpleNamespace(slice_index=i // 2) for i in range(4)]


@pytest.fixture
def between(monkeypatch):
    """Several processes that meet all requirements of ragged_all_to_all, except those given."""
    for name in (*ragged._WITHOUT_WINDOWS, *ragged._WITHOUT_POOL):
        monkeypatch.delenv(name, raising=False)

    def make(*, backend="gpu", jaxlib_="0.11.1", nccl=(2, 29, 7), devices=HOSTS_OF_ONE, here=1):
        monkeypatch.setattr(jax, "process_count", lambda: 4)
        monkeypatch.setattr(jax, "local_device_count", lambda: here)
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        monkeypatch.setattr(jaxlib.version, "__version__", jaxlib_)
        monkeypatch.setattr(ragged, "nccl_version", lambda: nccl)
        monkeypatch.setattr(jax, "devices", lambda: devices)

    return make


REASONS = {
    "jaxlib": ({"jaxlib_": "0.11.0"}, 4, "jaxlib 0.11.1 or newer, and this is 0.11.0"),
    "NCCL": ({"nccl": (2, 28, 9)}, 4, r"NCCL 2\.29\.7 or newer, and 2\.28\.9 is.*pip install"),
    "no NCCL": ({"nccl": None}, 4, "and none is loaded.*nvidia-nccl-cu13>=2.29.7"),
    "ranks": ({}, 33, "at most 32 ranks"),
    "hosts": ({"devices": HOSTS_OF_TWO}, 4, "several hosts"),
}


@pytest.mark.parametrize("name", REASONS)
def test_without_something_it_is_refused(between, name):
    given, n_ranks, words = REASONS[name]
    between(**given)
    with pytest.raises(ValueError, match=f"^transport: .*got 'ragged'.*: .*{words}"):
        transports.choose("ragged", n_ranks)
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match=f"lax.all_to_all, which is slower .*since .*{words}"):
        assert transports.choose("auto", n_ranks) == Padded()
    with warnings.catch_warnings():  # The warning appears only once.
        warnings.simplefilter("error")
        assert transports.choose("auto", n_ranks) == Padded()


@pytest.mark.parametrize(
    ("name", "value", "runs"),
    [
        ("NCCL_HOSTID", "rank 1", False),
        ("NCCL_P2P_DISABLE", "1", False),
        ("NCCL_P2P_DISABLE", "0", True),
        ("NCCL_CUMEM_ENABLE", "0", False),
        ("NCCL_CUMEM_ENABLE", "1", True),
        ("NCCL_WIN_ENABLE", "0", False),
        ("XLA_PYTHON_CLIENT_PREALLOCATE", "false", False),
        ("XLA_PYTHON_CLIENT_PREALLOCATE", "0", False),
        ("XLA_PYTHON_CLIENT_PREALLOCATE", "true", True),
        ("XLA_PYTHON_CLIENT_ALLOCATOR", "cuda_async", False),
        ("XLA_PYTHON_CLIENT_ALLOCATOR", "default", True),
    ],
)
def test_settings_of_nccl_and_xla(between, monkeypatch, name, value, runs):
    between()
    monkeypatch.setenv(name, value)
    reason = Ragged().why_not_over(4)
    assert (reason is None) == runs
    assert reason is None or f"{name}={value}" in reason


@pytest.mark.parametrize("version", ["0.11.1", "0.12.0.1", "1.0.0"])
@pytest.mark.parametrize("nccl", [(2, 29, 7), (2, 32, 3), (3, 0, 0)])
def test_with_everything_it_is_ragged(between, version, nccl):
    between(jaxlib_=version, nccl=nccl)
    assert transports.choose("ragged", 32) == Ragged()
    assert transports.choose("padded", 4) == Padded()
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match="since .*asked for .transport='ragged'.*may hang"):
        assert transports.choose("auto", 32) == Padded()


def test_on_cpus_it_is_padded(between):
    between(backend="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert transports.choose("auto", 4) == Padded()
    with pytest.raises(ValueError, match=r"got 'ragged'.*for GPUs"):
        transports.choose("ragged", 4)


def test_a_process_with_all_ranks_needs_nothing(between, monkeypatch):
    """Of several processes, only on request: JAX does not tell which processes an axis spans."""
    between(nccl=(2, 28, 9), here=4)
    assert transports.choose("ragged", 4) == Ragged()
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    assert transports.choose("auto", 4) == Ragged()


def test_version_of_nccl(monkeypatch):
    """NCCL's single-number encoding since 2.9."""

    def get(code):
        code._obj.value = 23203
        return 0

    library = types.SimpleNamespace(ncclGetVersion=get)
    monkeypatch.setattr(ragged._libraries, "find", lambda *_: library)
    assert ragged.nccl_version.__wrapped__() == (2, 32, 3)
    monkeypatch.setattr(ragged._libraries, "find", lambda *_: None)
    assert ragged.nccl_version.__wrapped__() is None


def test_another_transport(between):
    with pytest.raises(ValueError, match="transport: expected one of auto, padded, ragged, got 1"):
        transports.choose(1, 4)


def of_layer(copies):
    def run(x, ids, weights, placement):
        return moe.moe_layer(
            x, ids, jnp.ones(ids.shape), weights, placement=placement, axis_name="ep",
            ffn=lambda rows, experts, sizes: moe.grouped_dot(rows, experts, sizes, gemm="xla"),
            copies=copies, transport="ragged",
        ).out  # fmt: skip

    return run


def of_dispatch(x, ids, weights, placement):
    assigned, _ = rebalance(ids, None, placement=placement, axis_name="ep", positions=True)
    rows, _, plan = moe.dispatch(
        x, jnp.ones(ids.shape), assigned, axis_name="ep", capacity=64, transport="ragged"
    )
    return moe.combine(rows, plan) + weights.sum()


def of_weights(x, ids, weights, placement):
    return (
        x
        + ids.sum()
        + moe.replicate_weights(
            weights, axis_name="ep", placement=placement, transport="ragged"
        ).sum()
    )


CALLS = {
    "layer": of_layer("placement"),
    "layer, batch": of_layer("batch"),
    "dispatch": of_dispatch,
    "replicate_weights": of_weights,
}


@pytest.mark.parametrize("slopes", [True, False])
@pytest.mark.parametrize("name", CALLS)
def test_ragged_on_cpus_is_told_before_the_program_runs(rng, cpu_devices, name, slopes):
    """A program traced here may still be compiled for GPUs that are elsewhere."""
    mesh, placement = Mesh(cpu_devices[:4], "ep"), AnyCase(4, 9, 30).placement(rng)
    specs = (P("ep"), P("ep"), P("ep"), P())
    run = jax.shard_map(CALLS[name], mesh=mesh, in_specs=specs, out_specs=P("ep"))
    step = jax.grad(lambda *operands: run(*operands).sum(), (0, 2)) if slopes else run
    operands = jnp.ones((16, 8)), jnp.zeros((16, 2), jnp.int32), jnp.ones((32, 8, 8)), placement
    traced = jax.jit(step).trace(*operands)
    words = "^transport: expected 'padded' or 'auto' on CPUs, got 'ragged', which is for GPUs"
    for call in (traced.lower, lambda: jax.jit(step)(*operands)):
        with pytest.raises(ValueError, match=words):
            call()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no CUDA module where none was built
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "ragged_all_to_all" in text
