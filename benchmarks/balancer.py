"""The whole step on one GPU: count, solve and assign, including positions.

    python benchmarks/balancer.py [--json FILE]

Kernels are timed in a CUDA graph (see graph.py), with inputs in the L2 cache if they fit; the
jitted program is timed by wall time. The routing is from the packaged traces.
"""

from __future__ import annotations

import argparse
import functools
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import record
from graph import check, microseconds, pointer, runtime
from rebalance_call import RebalanceCall

from lplb_jax import place_experts, rebalance, topologies
from lplb_jax.data import load_traces
from lplb_jax.topologies import Topology

N_LOGICAL = 256

TARGETS = {  # µs on an H200: (topology, indices) -> at most
    ("cube", 1024): 5.2,
    ("cube", 8192): 5.5,
    ("cube", 32768): 7.5,
    ("cube", 131072): 10.5,
    ("hypercube", 32768): 7.5,
    ("torus 8×4", 32768): 8.0,
}
TOPOLOGIES = {
    "ring 8": topologies.ring(8),
    "cube": topologies.cube(),
    "hypercube": topologies.hypercube(),
    "torus 8×4": topologies.torus(8, 4),
    "torus 8×8": topologies.torus(8, 8),
}


def kernel_time(r2o: Topology | np.ndarray, indices: np.ndarray) -> float:
    """µs of one rebalance of int32 `indices`; the result must reach its bound."""
    ep_size, n_columns = r2o.shape
    placement = place_experts(
        None, r2o, n_logical=N_LOGICAL, ep_size=ep_size, redundants_per_rank=n_columns
    )
    return RebalanceCall(r2o, placement, indices).time()


def copy_bandwidth(n_bytes: int = 1 << 30) -> float:
    """Bytes read and written per second by a copy on the device."""
    source, target = jnp.ones(n_bytes // 4, jnp.int32), jnp.zeros(n_bytes // 4, jnp.int32)
    kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    read, written = pointer(source), pointer(target)

    def launch(stream: int) -> None:
        check(runtime.cudaMemcpyAsync(written, read, n_bytes, kind, stream))

    return 2 * n_bytes / (microseconds(launch, launches=4) * 1e-6)


def routing(n_tokens: int, layer: int = 0) -> np.ndarray:
    """`n_tokens` real indices, repeated if the trace is shorter."""
    trace = load_traces().indices
    return np.resize(np.asarray(trace[layer % len(trace)]).reshape(-1), n_tokens).astype(np.int32)


def layers_times(
    step: Callable[[jax.Array], jax.Array], n_layers: int = 60, n_tokens: int = 32768
) -> tuple[float, float]:
    """Wall time of a step in a jitted program of one per layer, in µs: queued back to back, and
    alone.

    A step returns a number. The result overwrites that of the previous run, like the state of a
    training step: if addresses change, XLA re-records its command buffer, 20 µs per kernel.
    """
    indices = [jnp.asarray(np.roll(routing(n_tokens, i), 8 * i)) for i in range(n_layers)]

    @functools.partial(jax.jit, donate_argnums=1)
    def program(layers: list[jax.Array], state: jax.Array) -> jax.Array:
        return jnp.stack([step(ids) for ids in layers]) + 0 * state

    state = jnp.zeros(n_layers, jnp.int32)
    times: dict[int, list[float]] = {10: [], 1: []}
    for _ in range(30):
        for runs, measured in times.items():
            jax.block_until_ready(state := program(indices, state))
            start = time.perf_counter()
            for _ in range(runs):
                state = program(indices, state)
            jax.block_until_ready(state)
            measured.append((time.perf_counter() - start) / runs)
    in_a_row, alone = (float(np.median(each)) * 1e6 / n_layers for each in times.values())
    return in_a_row, alone


def rebalanced(ids: jax.Array) -> jax.Array:
    """The whole step; returns the busiest rank's load."""
    r2o = topologies.cube()
    placement = place_experts(None, r2o, n_logical=N_LOGICAL, ep_size=8, redundants_per_rank=2)
    return rebalance(ids, None, r2o, placement=placement, positions=True)[1].max_load[0]


def sorted_places(ids: jax.Array) -> jax.Array:
    """Finds tokens' places among those of their expert by argsort; returns the last token's."""
    order = jnp.argsort(ids, stable=True)
    first = jnp.searchsorted(ids[order], jnp.arange(N_LOGICAL))
    place = jnp.arange(ids.size) - first[ids[order]]
    return jnp.zeros_like(ids).at[order].set(place)[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    bandwidth = copy_bandwidth()
    figures: dict[str, Any] = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "copy_bytes_per_second": bandwidth,
    }
    print(f"{device.device_kind}, jax {jax.__version__}; copy {bandwidth / 1e12:.2f} TB/s")
    print(f"\n{N_LOGICAL} experts, kernels in a CUDA graph, positions included, median µs")
    print(f"{'topology':<12}{'indices':>12}{'µs':>10}{'at most':>10}")
    curve = [1024, 8192, 32768, 65536, 131072, 262144, 1 << 20, 1 << 22, 1 << 24]
    cases = [("cube", n) for n in curve] + [(name, 32768) for name in TOPOLOGIES if name != "cube"]
    for name, n_tokens in cases:
        median = kernel_time(TOPOLOGIES[name], routing(n_tokens))
        target = TARGETS.get((name, n_tokens))
        if n_tokens == 1 << 24:
            target = 3 * 4 * n_tokens / (bandwidth / 2) * 1e6
        figures[f"{name}/{n_tokens}"] = median
        shown = "" if target is None else f"{target:.1f}"
        print(f"{name:<12}{n_tokens:>12,}{median:>10.2f}{shown:>10}", flush=True)
    figures["jit_per_layer"], figures["jit_per_layer_alone"] = layers_times(rebalanced)
    print(
        f"\n60 layers of 32,768 in one jitted program, µs a layer: {figures['jit_per_layer']:.2f} "
        f"in a row of runs, {figures['jit_per_layer_alone']:.2f} waiting for each"
    )
    figures["argsort"], _ = layers_times(sorted_places)
    print(f"the tokens' places by argsort instead: {figures['argsort']:.1f} in a row of runs")
    if arguments.json:
        record.write(arguments.json, figures)


if __name__ == "__main__":
    main()
