"""Load sync between GPUs, in jitted programs, against lax.psum and lax.all_gather.

    python benchmarks/load_sync.py [--json FILE]                       # one process, all GPUs
    python benchmarks/load_sync.py --transport nvshmem [--json FILE]   # one process per GPU

Wall time per call, of programs long enough that their dispatch does not count; medians, warm. All
ways are measured in turn within each repeat.
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
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lplb_jax import Comm, init_comm, place_experts, rebalance, sync_loads, topologies
from lplb_jax.data import load_traces

N_LOGICAL = 256
N_CALLS = 200  # in one program
N_LAYERS = 60
N_INDICES = 32_768  # per rank and layer


def everywhere(mesh: Mesh, array: np.ndarray) -> jax.Array:
    """Row r of `array` on rank r, whatever process that is in."""
    sharding = NamedSharding(mesh, P("ep"))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def per_rank(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    def rank(operand: jax.Array) -> Any:
        return jax.tree.map(lambda result: result[None], function(operand[0]))

    return jax.jit(
        jax.shard_map(rank, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"), check_vma=False)
    )


def medians(programs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each program."""
    for run in programs.values():
        for _ in range(3):
            jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, run in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(all_times)) for name, all_times in times.items()}


def sync_programs(mesh: Mesh, comm: Comm) -> dict[str, Callable[[], Any]]:
    """A chain of N_CALLS, each of which needs the result of the one before.

    psum's result is its next operand; a matrix is summed over the ranks for that, except in the
    chains that take its first row.
    """
    size = mesh.devices.size
    counts = np.random.default_rng().integers(0, 1000, (size, N_LOGICAL)).astype(np.int32)
    counts = everywhere(mesh, counts)

    def chain(step: Callable[[jax.Array], jax.Array]) -> Callable[[], Any]:
        def rank(x: jax.Array) -> jax.Array:
            for _ in range(N_CALLS):
                x = step(x)
            return x

        run = per_rank(rank, mesh)
        return lambda: run(counts)

    return {
        "lax.psum": chain(lambda x: lax.psum(x, "ep")),
        "lax.all_gather + sum": chain(lambda x: lax.all_gather(x, "ep").sum(0)),
        "sync_loads + sum": chain(lambda x: sync_loads(x, "ep", comm=comm).sum(0)),
        "lax.all_gather + row": chain(lambda x: lax.all_gather(x, "ep")[0]),
        "sync_loads + row": chain(lambda x: sync_loads(x, "ep", comm=comm)[0]),
    }


def layers_programs(mesh: Mesh, comm: Comm) -> dict[str, Callable[[], Any]]:
    """N_LAYERS rebalances of real routing, and the same without other ranks or through XLA."""
    size = mesh.devices.size
    r2o = topologies.cube() if size == 8 else topologies.ring(size)
    placement = place_experts(
        None, r2o, n_logical=N_LOGICAL, ep_size=size, redundants_per_rank=r2o.shape[1]
    )
    trace = np.asarray(load_traces().indices).reshape(-1)
    layers = np.stack(
        [np.resize(np.roll(trace, 8 * 999 * i), size * N_INDICES) for i in range(N_LAYERS)]
    )
    layers = layers.reshape(N_LAYERS, size, N_INDICES).swapaxes(0, 1).astype(np.int32)
    layers = everywhere(mesh, layers)

    def program(**options: Any) -> Callable[[], Any]:
        def rank(layers: jax.Array) -> jax.Array:
            splits = [
                rebalance(ids, None, r2o, placement=placement, positions=True, **options)[1]
                for ids in layers
            ]
            return jnp.stack([split.max_load for split in splits])

        run = per_rank(rank, mesh)
        return lambda: run(layers)

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
        expected, got = (
            np.asarray(programs[name]().addressable_shards[0].data)
            for name in ("lax.psum", "sync_loads + sum")
        )
        np.testing.assert_array_equal(got, expected)
        syncs = {name: t / N_CALLS for name, t in medians(programs, repeats=30).items()}
        programs = layers_programs(mesh, comm)
        layers = {name: t / N_LAYERS for name, t in medians(programs, repeats=30).items()}
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
        print(f"{name:<28}{microseconds:>9.2f} µs")


def start_processes(arguments: argparse.Namespace) -> int:
    """This program again, one process per GPU."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    n = int(subprocess.check_output(["nvidia-smi", "--list-gpus"], text=True).count("GPU "))
    command = [sys.executable, __file__, "--transport", "nvshmem", "--address", address]
    command += ["--json", arguments.json] if arguments.json else []
    processes = [
        subprocess.Popen([*command, "--process", str(i), "--processes", str(n)]) for i in range(n)
    ]
    return max(abs(process.wait()) for process in processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transport", choices=["p2p", "nvshmem"], default="p2p")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    for name in ("--address", "--process", "--processes"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.transport == "nvshmem" and arguments.process is None:
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
