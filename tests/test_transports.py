"""The layer's choice of transport, by available libraries and number of processes."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from moe_checks import AnyCase

from lplb_jax import moe, rebalance
from lplb_jax._native import warn_once
from lplb_jax.moe import transports
from lplb_jax.moe.collectives import Padded
from lplb_jax.moe.ragged import Ragged


@pytest.fixture
def between(monkeypatch):
    """Several processes."""

    def make(*, backend="gpu", here=1):
        monkeypatch.setattr(jax, "process_count", lambda: 4)
        monkeypatch.setattr(jax, "local_device_count", lambda: here)
        monkeypatch.setattr(jax, "default_backend", lambda: backend)

    return make


def test_between_processes_it_is_padded(between):
    between()
    words = "XLA may hang or give wrong gradients"
    with pytest.raises(ValueError, match=f"^transport: .*got 'ragged'.*: .*{words}"):
        transports.choose("ragged", 4)
    warn_once.cache_clear()
    with pytest.warns(UserWarning, match=f"lax.all_to_all and not .*{words}.*; init_comm with"):
        assert transports.choose("auto", 4) == Padded()
    with warnings.catch_warnings():  # The warning appears only once.
        warnings.simplefilter("error")
        assert transports.choose("auto", 4) == transports.choose("padded", 4) == Padded()


def test_on_cpus_it_is_padded(between):
    between(backend="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert transports.choose("auto", 4) == Padded()
    with pytest.raises(ValueError, match=r"got 'ragged'.*for GPUs"):
        transports.choose("ragged", 4)


def test_a_process_with_all_ranks_needs_nothing(between, monkeypatch):
    """Of several processes, only on request: JAX does not tell which processes an axis spans."""
    between(here=4)
    assert transports.choose("ragged", 4) == Ragged()
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    assert transports.choose("auto", 4) == Ragged()


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
