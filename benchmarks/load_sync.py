"""Load sync between GPUs, in jitted programs, compared with lax.psum and lax.all_gather.

    python benchmarks/load_sync.py [--gpus N] [--json FILE]            # one process, all GPUs
    python benchmarks/load_sync.py --transport nvshmem [--json FILE]   # one process per GPU

Wall time per call, in a jitted program of many: several runs are queued back to back, and methods
alternate; warm medians. In one process also the kernels alone, with as many ranks as GPUs, and with
four and eight ranks that share them.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import record
from graph import Graph
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from per_gpu import one_per_gpu
from rebalance_call import RebalanceCall
from virtual_ranks import VirtualRanks

from lplb_jax import (
    Comm,
    Placement,
    init_comm,
    place_experts,
    rebalance,
    sync_loads,
    topologies,
)
from lplb_jax.comm import Transport
from lplb_jax.data import load_traces
from lplb_jax.topologies import Topology

N_LOGICAL = 256
N_CALLS = 200  # in one program
N_LAYERS = 60
N_INDICES = 32_768  # per rank and layer


def everywhere(mesh: Mesh, array: np.ndarray) -> jax.Array:
    """Row r of `array` on rank r, in whichever process it is."""
    sharding = NamedSharding(mesh, P("ep"))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


Program = Callable[[], Any]


def steady(rank: Callable[..., jax.Array], mesh: Mesh, operands: Any, result: tuple) -> Program:
    """A program whose result overwrites that of the previous run, like a training step's state.

    `rank(operands)` runs on every rank. Since no address changes, XLA replays its command buffer.
    """

    def body(operands: Any, state: jax.Array) -> jax.Array:
        return rank(jax.tree.map(lambda x: x[0], operands))[None] + 0 * state

    sharded = jax.shard_map(
        body, mesh=mesh, in_specs=(P("ep"), P("ep")), out_specs=P("ep"), check_vma=False
    )
    program = jax.jit(sharded, donate_argnums=1)
    state = everywhere(mesh, np.zeros((mesh.devices.size, *result), np.int32))

    def run() -> jax.Array:
        nonlocal state
        state = program(operands, state)
        return state

    return run


def medians(programs: dict[str, Program], runs: int = 10, repeats: int = 20) -> dict[str, float]:
    """Median seconds of each program, with several runs queued, alternating programs."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for repeat in range(repeats + 2):  # The first two warm up.
        for name, run in programs.items():
            jax.block_until_ready(run())
            start = time.perf_counter()
            jax.block_until_ready([run() for _ in range(runs)][-1])
            if repeat >= 2:
                times[name].append((time.perf_counter() - start) / runs)
    return {name: float(np.median(all_times)) for name, all_times in times.items()}


def after(operand: jax.Array, earlier: jax.Array) -> jax.Array:
    """`operand` once `earlier` is available, as in a model; XLA would otherwise merge calls."""
    return lax.optimization_barrier((operand, earlier))[0]


def sync_programs(mesh: Mesh, comm: Comm) -> dict[str, Program]:
    """N_CALLS of each method, each on the previous result: the sum, or one row after another."""
    size = mesh.devices.size
    counts = np.random.default_rng().integers(0, 1000, (size, N_LOGICAL)).astype(np.int32)
    counts = everywhere(mesh, counts)

    def chain(step: Callable[[jax.Array, int], jax.Array]) -> Program:
        def rank(x: jax.Array) -> jax.Array:
            for i in range(N_CALLS):
                x = step(x, i % size)
            return x

        return steady(rank, mesh, counts, (N_LOGICAL,))

    return {
        "lax.psum": chain(lambda x, _: lax.psum(x, "ep")),
        "lax.all_gather, a row": chain(lambda x, i: lax.all_gather(x, "ep")[i]),
        "sync_loads, a row": chain(lambda x, i: sync_loads(x, "ep", comm=comm)[i]),
    }


def kernel_times(ranks: VirtualRanks) -> dict[str, float]:
    """Median seconds of a call without XLA, all ranks in step, in CUDA graphs of N_CALLS."""
    size = len(ranks.ids)
    counts = [ranks.put(rank, np.arange(N_LOGICAL, dtype=np.int32)) for rank in range(size)]
    matrix = np.full((size, N_LOGICAL), -7, np.int32)
    matrices = [ranks.put(rank, matrix) for rank in range(size)]
    ids = routing(size, 0)

    def sync(rank: int, stream: int) -> None:
        ranks.sync(rank, counts[rank], matrices[rank], stream)

    def whole(calls: list[RebalanceCall], rank: int, stream: int) -> None:
        ranks.rebalance(rank, calls[rank], stream)

    ways: dict[str, Callable[[int, int], None]] = {"sync_loads": sync}
    balanced = []
    for name, (r2o, placement) in placements(size).items():
        r2o = np.zeros((size, 0), np.int32) if r2o is None else r2o
        balanced.append([ranks.call(rank, r2o, placement, ids[rank]) for rank in range(size)])
        ways[f"rebalance, {name}"] = functools.partial(whole, balanced[-1])
    seconds = {}
    for name, launch in ways.items():
        graphs = []
        for rank in range(size):
            ranks.use_device(rank)
            graphs.append(Graph(functools.partial(launch, rank), N_CALLS))
        times = []
        for _ in range(22):  # The first two warm up.
            for rank, graph in enumerate(graphs):
                ranks.use_device(rank)
                graph.start()
            # The rank that started last did not wait for others to start.
            times.append(min([graph.seconds() for graph in graphs]) / N_CALLS)
        seconds[name] = float(np.median(times[2:]))
        for rank, graph in enumerate(graphs):
            ranks.use_device(rank)
            graph.close()
    for of_rank in matrices:
        np.testing.assert_array_equal(of_rank, [np.arange(N_LOGICAL)] * size)
    for calls in balanced:
        got = calls[0].results
        of_slots = sum(np.asarray(call.results.counts) for call in calls)
        np.testing.assert_array_equal(of_slots, np.asarray(got.quota))
        assert got.max_load == got.lower_bound
    assert not any(ranks.failures()), ranks.failures()
    return seconds


def placements(size: int) -> dict[str, tuple[Topology | None, Placement]]:
    """Placements along a topology, in the given order, and on any ranks, by the routing's loads."""
    r2o = topologies.cube() if size == 8 else topologies.ring(size)
    sizes: dict[str, Any] = {
        "n_logical": N_LOGICAL,
        "ep_size": size,
        "redundants_per_rank": r2o.shape[1],
    }
    loads = np.bincount(routing(size, 0).ravel(), minlength=N_LOGICAL)
    return {
        "topology": (r2o, place_experts(None, r2o, **sizes)),
        "any placement": (None, place_experts(loads, **sizes)),
    }


def routing(size: int, layer: int) -> np.ndarray:
    """int32 `[size, N_INDICES]`: real choices of every rank."""
    trace = np.asarray(load_traces().indices).reshape(-1)
    return np.resize(np.roll(trace, 7992 * layer), (size, N_INDICES)).astype(np.int32)


def layers_programs(mesh: Mesh, comm: Comm) -> dict[str, Program]:
    """N_LAYERS rebalances of real routing, and the same on single ranks or through XLA."""
    size = mesh.devices.size
    placed = placements(size)
    layers = [everywhere(mesh, routing(size, i)) for i in range(N_LAYERS)]

    def program(name: str, **options: Any) -> Program:
        r2o, placement = placed[name]

        def rank(layers: list[jax.Array]) -> jax.Array:
            max_loads = []
            for ids in layers:
                ids = after(ids, max_loads[-1]) if max_loads else ids
                options_of_all = {"placement": placement, "positions": True, **options}
                max_loads.append(rebalance(ids, None, r2o, **options_of_all)[1].max_load)
            return jnp.concatenate(max_loads)

        n_groups = 1 if r2o is None else size // len(r2o)
        return steady(rank, mesh, layers, (N_LAYERS * n_groups,))

    among_ranks = {"axis_name": "ep", "comm": comm}
    return {
        "rebalance, no other ranks": program("topology"),
        "rebalance, lax.all_gather": program("topology", axis_name="ep"),
        "rebalance, comm": program("topology", **among_ranks),
        "rebalance, comm, any placement": program("any placement", **among_ranks),
        "rebalance, comm, copies of the batch": program(
            "any placement", copies="batch", **among_ranks
        ),
    }


def measure(transport: Transport, n_gpus: int | None) -> dict[str, Any]:
    mesh = Mesh(np.array(jax.devices()[:n_gpus]), "ep")
    size = mesh.devices.size
    with init_comm(mesh, max_experts=N_LOGICAL, transport=transport) as comm:
        programs = sync_programs(mesh, comm)
        rows = [np.asarray(run().addressable_shards[0].data) for run in programs.values()][1:]
        np.testing.assert_array_equal(rows[0], rows[1])
        syncs = {name: t / N_CALLS for name, t in medians(programs).items()}
        programs = layers_programs(mesh, comm)
        layers = {name: t / N_LAYERS for name, t in medians(programs).items()}
        assert comm.failure() is None
    figures = {
        "device": f"{size} × {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "transport": comm.transport,
        "microseconds": {name: t * 1e6 for name, t in {**syncs, **layers}.items()},
    }
    if comm.transport == "p2p":
        figures["kernels"] = {}
        for n_ranks in sorted({size, *(n for n in (4, 8) if size < n <= 4 * size)}):
            with VirtualRanks(mesh.devices.ravel().tolist(), n_ranks, N_LOGICAL) as ranks:
                figures["kernels"][f"{n_ranks} ranks"] = {
                    name: t * 1e6 for name, t in kernel_times(ranks).items()
                }
    return figures


def report(figures: dict[str, Any]) -> None:
    print(f"{figures['device']}, jax {figures['jax']}, transport {figures['transport']}")
    print(f"{N_LOGICAL} experts; {N_CALLS} syncs, or {N_LAYERS} layers of {N_INDICES:,}, a program")
    for name, microseconds in figures["microseconds"].items():
        print(f"{name:<40}{microseconds:>9.2f} µs")
    for n_ranks, kernels in figures.get("kernels", {}).items():
        for name, microseconds in kernels.items():
            label = f"kernel of {name}, {n_ranks}"
            print(f"{label:<40}{microseconds:>9.2f} µs")


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    transports: list[Transport] = ["p2p", "nvshmem", "nvshmem_put"]
    parser.add_argument("--transport", choices=transports, default="p2p")
    parser.add_argument("--gpus", type=int, metavar="N", help="the first N only")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    arguments = parser.parse_args()
    if arguments.transport != "p2p":
        one_per_gpu(arguments.gpus)
    figures = measure(arguments.transport, arguments.gpus)
    report(figures)
    if arguments.json and jax.process_index() == 0:
        record.write(arguments.json, figures)


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    main()
