"""Load sync between GPUs, in jitted programs, against lax.psum and lax.all_gather.

    python benchmarks/load_sync.py [--json FILE]                       # one process, all GPUs
    python benchmarks/load_sync.py --transport nvshmem [--json FILE]   # one process per GPU

Wall time per call of a jitted program with many: several runs at a time, without waiting for one
before the next is started, and the ways in turn; medians, warm.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from graph import Graph, pointer
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lplb_jax import Comm, _native, init_comm, place_experts, rebalance, sync_loads, topologies
from lplb_jax.data import load_traces

N_LOGICAL = 256
N_CALLS = 200  # in one program
N_LAYERS = 60
N_INDICES = 32_768  # per rank and layer


def everywhere(mesh: Mesh, array: np.ndarray) -> jax.Array:
    """Row r of `array` on rank r, whatever process that is in."""
    sharding = NamedSharding(mesh, P("ep"))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


Program = Callable[[], Any]


def steady(rank: Callable[..., jax.Array], mesh: Mesh, operands: Any, result: tuple) -> Program:
    """A program whose result is written over that of the run before, as a training step's state.

    `rank(operands)` is what one rank does; XLA launches its recorded kernels again as they are,
    since no address changes.
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
    """Median seconds of each program, of several runs at a time, the programs in turn."""
    times: dict[str, list[float]] = {name: [] for name in programs}
    for repeat in range(repeats + 2):  # The first two warm up.
        for name, run in programs.items():
            jax.block_until_ready(run())
            start = time.perf_counter()
            for _ in range(runs):
                state = run()
            jax.block_until_ready(state)
            if repeat >= 2:
                times[name].append((time.perf_counter() - start) / runs)
    return {name: float(np.median(all_times)) for name, all_times in times.items()}


def after(operand: jax.Array, earlier: jax.Array) -> jax.Array:
    """`operand`, but not before `earlier` is there, as in a model; XLA would merge what it can."""
    return lax.optimization_barrier((operand, earlier))[0]


def sync_programs(mesh: Mesh, comm: Comm) -> dict[str, Program]:
    """N_CALLS of each way, each of what the one before gave: the sum, or one row, in turn."""
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


def kernel_time(mesh: Mesh, comm: Comm) -> float:
    """Seconds of one sync_loads without XLA: CUDA graphs of N_CALLS on all GPUs of a process."""
    native = _native.cuda()
    runs = []
    for rank, device in enumerate(mesh.devices.flat):
        arrays = np.int32(rank), np.arange(N_LOGICAL, dtype=np.int32)
        matrix = np.zeros((mesh.devices.size, N_LOGICAL), np.int32)
        arrays = [jax.device_put(array, device) for array in (*arrays, matrix)]
        claimed, counts, out = [pointer(array) for array in arrays]
        ordinal = device.local_hardware_id

        def launch(stream: int, of=(claimed, counts, N_LOGICAL, out), ordinal=ordinal) -> None:
            native.launch_sync(comm.identifier, ordinal, *of, stream)

        native.comm_use_device(ordinal)
        runs.append((ordinal, arrays, Graph(launch, N_CALLS)))
    times = []
    for _ in range(20):
        for ordinal, _, graph in runs:
            native.comm_use_device(ordinal)
            graph.start()
        times.append(max(graph.seconds() for _, _, graph in runs) / N_CALLS)
    for _, arrays, _ in runs:
        np.testing.assert_array_equal(arrays[2], [np.arange(N_LOGICAL)] * mesh.devices.size)
    return float(np.median(times[2:]))


def layers_programs(mesh: Mesh, comm: Comm) -> dict[str, Program]:
    """N_LAYERS rebalances of real routing, and the same without other ranks or through XLA."""
    size = mesh.devices.size
    r2o = topologies.cube() if size == 8 else topologies.ring(size)
    placement = place_experts(
        None, r2o, n_logical=N_LOGICAL, ep_size=size, redundants_per_rank=r2o.shape[1]
    )
    trace = np.asarray(load_traces().indices).reshape(-1)
    layers = [
        everywhere(mesh, np.resize(np.roll(trace, 7992 * i), (size, N_INDICES)).astype(np.int32))
        for i in range(N_LAYERS)
    ]

    def program(**options: Any) -> Program:
        def rank(layers: list[jax.Array]) -> jax.Array:
            max_loads = []
            for ids in layers:
                ids = after(ids, max_loads[-1]) if max_loads else ids
                options_of_all = {"placement": placement, "positions": True, **options}
                max_loads.append(rebalance(ids, None, r2o, **options_of_all)[1].max_load)
            return jnp.concatenate(max_loads)

        return steady(rank, mesh, layers, (N_LAYERS * size // len(r2o),))

    return {
        "rebalance, no other ranks": program(),
        "rebalance, lax.all_gather": program(axis_name="ep"),
        "rebalance, comm": program(axis_name="ep", comm=comm),
    }


def measure(transport: str) -> dict[str, Any]:
    mesh = Mesh(np.array(jax.devices()), "ep")
    device = jax.devices()[0]
    with init_comm(mesh, max_experts=N_LOGICAL, transport=transport) as comm:
        programs = sync_programs(mesh, comm)
        rows = [np.asarray(run().addressable_shards[0].data) for run in programs.values()][1:]
        np.testing.assert_array_equal(*rows)
        syncs = {name: t / N_CALLS for name, t in medians(programs).items()}
        programs = layers_programs(mesh, comm)
        layers = {name: t / N_LAYERS for name, t in medians(programs).items()}
        if comm.transport == "p2p":
            syncs["sync_loads, kernel in a graph"] = kernel_time(mesh, comm)
        assert comm.failure() is None
        return {
            "device": f"{mesh.devices.size} × {device.device_kind}",
            "jax": jax.__version__,
            "transport": comm.transport,
            "microseconds": {name: t * 1e6 for name, t in {**syncs, **layers}.items()},
        }


def report(figures: dict[str, Any]) -> None:
    print(f"{figures['device']}, jax {figures['jax']}, transport {figures['transport']}")
    print(f"{N_LOGICAL} experts; {N_CALLS} syncs, or {N_LAYERS} layers of {N_INDICES:,}, a program")
    for name, microseconds in figures["microseconds"].items():
        print(f"{name:<32}{microseconds:>9.2f} µs")


def start_processes(arguments: argparse.Namespace) -> int:
    """This program again, one process per GPU."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    n = int(subprocess.check_output(["nvidia-smi", "--list-gpus"], text=True).count("GPU "))
    command = [sys.executable, __file__, "--transport", arguments.transport]
    command += ["--address", address]
    command += ["--json", arguments.json] if arguments.json else []
    processes = [
        subprocess.Popen([*command, "--process", str(i), "--processes", str(n)]) for i in range(n)
    ]
    return max(abs(process.wait()) for process in processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transport", choices=["p2p", "nvshmem", "nvshmem_put"], default="p2p")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    for name in ("--address", "--process", "--processes"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.transport != "p2p" and arguments.process is None:
        sys.exit(start_processes(arguments))
    process = int(arguments.process or 0)
    if arguments.processes:
        jax.distributed.initialize(
            arguments.address, int(arguments.processes), process, local_device_ids=[process]
        )
    figures = measure(arguments.transport)
    if process != 0:
        return
    report(figures)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    main()
