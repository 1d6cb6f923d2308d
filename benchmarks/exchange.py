"""Times sending tokens to peers and back, by SM count, compared with XLA's collectives.

    python benchmarks/exchange.py [--json FILE]     # one process, all GPUs
    python benchmarks/exchange.py --processes       # one process per GPU

Each rank sends 16,384 tokens of 4,096 bfloat16 to another rank (top-1) or to top-8 of all ranks,
from their place in memory to their rows, and sums of rows back. Kernels run without XLA, ranks in
step; times are medians. Next come small batches of 7,168, and several ranks per GPU. The last
figure is a layer's forward pass on such batches minus its GEMMs, with copies already fetched;
--layers measures only this, --kernels only our kernels.

Between processes XLA launches the kernels: `dispatch` and `combine` of the same tokens, many times
in a row. Their times are the medians of a profile, of the process with the longest.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import os
import pathlib
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import record
from exchange_batch import ExchangeBatch
from graph import Graph
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from per_gpu import one_per_gpu
from virtual_ranks import VirtualRanks

from lplb_jax import Placement, init_comm, moe, place_experts, rebalance, topologies
from lplb_jax.comm import Comm, Windows
from lplb_jax.moe.collectives import SendLists, exchange
from lplb_jax.moe.ragged import Ragged

N_TOKENS, HIDDEN = 16_384, 4096
SMS = (8, 16, 32, 64, 132)
SMALL, SMALL_HIDDEN = (32, 128, 512, 2048), 7168
N_CALLS = 10  # in one graph or program


def milliseconds(ranks: VirtualRanks, batch: ExchangeBatch) -> dict[str, float]:
    """Median ms of a call there and of one back, all ranks in step, in CUDA graphs of N_CALLS."""
    size = len(ranks.ids)
    times = {}
    for way in ("there", "back"):
        graphs = []
        for rank in range(size):
            ranks.use_device(rank)
            launch = functools.partial(getattr(ranks, way), rank, batch)
            graphs.append(Graph(launch, N_CALLS))
        of_way = []
        for _ in range(9):  # The first two warm up.
            for rank, graph in enumerate(graphs):
                ranks.use_device(rank)
                graph.start()
            # The rank that started last did not wait for others to start.
            of_way.append(min([graph.seconds() for graph in graphs]) / N_CALLS)
        times[way] = float(np.median(of_way[2:])) * 1e3
        for rank, graph in enumerate(graphs):
            ranks.use_device(rank)
            graph.close()
    return times


def by_kernels(n_gpus: int, size: int, n_tokens: int, hidden: int, top_k: int, sms: Any) -> Any:
    """Times of `size` ranks that share n_gpus; with top-1 every token goes to another rank."""
    rng = np.random.default_rng(0)
    ranks_of = rng.integers(0, size, (size, n_tokens, top_k))
    if top_k == 1:
        ranks_of = (ranks_of % (size - 1) + 1 + np.arange(size)[:, None, None]) % size
    # A rank may receive more tokens than it sends.
    windows = Windows(size, n_tokens * (size - 1), top_k, 2 * hidden)
    figures = {}
    with VirtualRanks(jax.devices()[:n_gpus], size, 8, windows=windows) as ranks:
        capacity = int(np.bincount(ranks_of.ravel()).max())
        batch = ExchangeBatch(ranks.put, ranks_of, capacity, hidden, rng)
        megabytes = batch.sent.sum() / size * hidden * 2 / 1e6
        for n in sms:
            batch.blocks = [n, 0]
            times = milliseconds(ranks, batch)
            figures[str(n)] = {way: {"ms": ms, "GB/s": megabytes / ms} for way, ms in times.items()}
        if n_tokens * top_k <= SMALL[-1] * 8:
            batch.check()
        assert not any(ranks.failures()), ranks.failures()
    return figures


def by_xla(mesh: Mesh) -> dict[str, float]:
    """Milliseconds of XLA's collectives for as many bytes to one peer, without rows and sums."""
    size = mesh.size
    here = np.arange(size)
    sizes = np.zeros((size, size), np.int32)
    sizes[here, (here + 1) % size] = N_TOKENS

    def ragged(x: jax.Array) -> jax.Array:
        lists = SendLists(jnp.asarray(sizes), N_TOKENS, N_TOKENS, "ep", Ragged())
        return exchange(x, lists, "there")

    def padded(x: jax.Array) -> jax.Array:
        return lax.all_to_all(x, "ep", 0, 0, tiled=True)

    figures = {}
    for name, step, n_rows in (
        ("ragged_all_to_all", ragged, N_TOKENS),
        ("all_to_all", padded, N_TOKENS // (size - 1) * size),
    ):

        def chain(x: jax.Array, step: Any = step) -> jax.Array:
            for _ in range(N_CALLS):
                x = step(x)
            return x

        run = jax.jit(jax.shard_map(chain, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))
        x = jnp.zeros((size * n_rows, HIDDEN), jnp.bfloat16)
        x = jax.device_put(x, NamedSharding(mesh, P("ep")))
        times = []
        for _ in range(9):
            start = time.perf_counter()
            jax.block_until_ready(run(x))
            times.append((time.perf_counter() - start) / N_CALLS)
        figures[name] = float(np.median(times[2:])) * 1e3
    return figures


def by_processes(mesh: Mesh) -> dict[str, Any]:
    """Times of the kernels between processes, by top-k and SMs; megabytes as `by_kernels` counts.

    With top-1 every token goes to another rank.
    """
    size = mesh.size
    rng = np.random.default_rng(0)
    sharding = NamedSharding(mesh, P("ep"))
    tokens = rng.normal(0, 1, (size * N_TOKENS, HIDDEN)).astype(jnp.bfloat16)
    tokens = jax.device_put(tokens, sharding)
    figures: dict[str, Any] = {}
    for top_k, n_logical in ((1, size), (8, 8 * size)):
        if top_k == 1:
            sources = np.repeat(np.arange(size), N_TOKENS)[:, None]
            ids = (sources + rng.integers(1, size, sources.shape)) % size
        else:
            ids = rng.random((size * N_TOKENS, n_logical)).argsort(axis=1)[:, :top_k]
        ranks = ids // (n_logical // size)
        own = np.repeat(np.arange(size), N_TOKENS)
        sent = sum(((ranks == rank).any(axis=1) & (own != rank)).sum() for rank in range(size))
        megabytes = sent / size * HIDDEN * 2 / 1e6
        capacity = -(-int(np.bincount(ranks.ravel()).max()) // 8) * 8
        given = tokens, jax.device_put(ids.astype(np.int32), sharding)
        figures[f"top-{top_k}"] = of_top_k = {}
        for sms in SMS[1:]:
            room: dict[str, Any] = {"max_tokens": N_TOKENS, "hidden_bytes": 2 * HIDDEN}
            with init_comm(mesh, "ep", max_experts=n_logical, sms=sms, **room) as comm:
                times = profiled(there_and_back(mesh, comm, n_logical, capacity), given)
            of_top_k[str(sms)] = {
                way: {"ms": ms, "GB/s": megabytes / ms} for way, ms in times.items()
            }
    return figures


def there_and_back(mesh: Mesh, comm: Any, n_logical: int, capacity: int) -> Any:
    """A program that sends tokens to their experts and back, N_CALLS times in a row."""
    slots = np.arange(n_logical).reshape(mesh.size, -1)
    placement = Placement.from_phy2log(slots, ep_size=mesh.size)

    def chain(tokens: jax.Array, ids: jax.Array) -> jax.Array:
        gates = jnp.ones(ids.shape, jnp.float32)
        assigned, _ = rebalance(
            ids, None, placement=placement, axis_name="ep", positions=True, comm=comm
        )
        for _ in range(N_CALLS):
            rows, _, plan = moe.dispatch(
                tokens, gates, assigned, axis_name="ep", capacity=capacity, transport="peer",
                comm=comm,
            )  # fmt: skip
            tokens = moe.combine(rows, plan) / ids.shape[1]
        return tokens

    return jax.jit(jax.shard_map(chain, mesh=mesh, in_specs=(P("ep"), P("ep")), out_specs=P("ep")))


def profiled(run: Any, given: Any) -> dict[str, float]:
    """Median ms of the kernels there and back in one call, of the process where it is longest."""
    for _ in range(2):
        jax.block_until_ready(run(*given))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run(*given))
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        events = [
            event
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes
            for line in plane.lines
            for event in line.events
        ]
    times = {}
    for way, kernel in (("there", "ThereKernel"), ("back", "BackKernel")):
        taken = [event.duration_ns / 1e6 for event in events if kernel in event.name]
        assert len(taken) >= N_CALLS, (kernel, len(taken))
        of_all = multihost_utils.process_allgather(np.float32(np.median(taken)))
        times[way] = float(np.max(of_all))
    return times


class SmallLayer:
    """moe_layer's forward pass on a small batch: 32 experts of 7,168 × 2,048, top-8, some copies.

    Attributes:
      programs: compiled programs by name: the layer N_CALLS times in a row, and its GEMMs.
    """

    experts, width, top_k = 32, 2048, 8

    def __init__(self, mesh: Mesh, comm: Comm, n_tokens: int, weights: moe.Experts) -> None:
        size = mesh.size
        self.sharding = NamedSharding(mesh, P("ep"))
        self.placement = place_experts(
            None, topologies.complete(size), n_logical=self.experts, ep_size=size,
            redundants_per_rank=self.copies(size),
        )  # fmt: skip
        rng = np.random.default_rng(0)
        share = np.log(1 / np.arange(1, self.experts + 1))
        keys = rng.gumbel(size=(size * n_tokens, self.experts)) + rng.permutation(share)
        ids = np.argpartition(-keys, self.top_k, axis=1)[:, : self.top_k].astype(np.int32)
        tokens = rng.normal(0, 1, (size * n_tokens, SMALL_HIDDEN)).astype(jnp.bfloat16)
        gates = rng.random(ids.shape).astype(np.float32) / self.top_k
        self.batch = jax.device_put((tokens, gates, ids), self.sharding)
        self.weights = weights
        capacity = moe.capacity_for(n_tokens * self.top_k, size, 1.25)

        @functools.partial(jax.jit, static_argnums=0)  # Lowered once, not N_CALLS times.
        def layer(transport: Any, tokens: jax.Array, gates: Any, ids: Any, weights: Any) -> Any:
            return moe.moe_layer(
                tokens, ids, gates, weights, placement=self.placement, axis_name="ep", comm=comm,
                transport=transport,
            )  # fmt: skip

        def layers(transport: str, tokens: jax.Array, *given: Any) -> jax.Array:
            for _ in range(N_CALLS):
                tokens = layer(transport, tokens, *given).out
            return tokens

        def products(tokens: jax.Array, gates: Any, ids: Any, weights: Any) -> jax.Array:
            loads = layer("peer", tokens, gates, ids, weights).traffic.slot_loads
            sizes = loads.reshape(size, -1)[lax.axis_index("ep")]
            rows = jnp.resize(tokens, (capacity, SMALL_HIDDEN))
            row_gates = jnp.resize(gates, (capacity,))
            network = jax.jit(moe.expert_ffn)
            for _ in range(N_CALLS):
                rows = network(rows, weights, sizes, gates=row_gates)
            return rows

        ways = {name: functools.partial(layers, name) for name in ("peer", "ragged")}
        self.programs = {name: self._compiled(mesh, way) for name, way in ways.items()}
        self.programs["products"] = self._compiled(mesh, products)

    @staticmethod
    def copies(size: int) -> int:
        """Copies on each rank: at least two, a multiple of the topology's columns."""
        return 2 if size == 2 else size - 1

    def _compiled(self, mesh: Mesh, function: Any) -> Any:
        run = jax.shard_map(function, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
        run = jax.jit(run, compiler_options=moe.COMPILER_OPTIONS)
        return run.lower(*self.batch, self.weights).compile()

    def microseconds(self) -> dict[str, float]:
        """One call of each, medians of interleaved repeats; and a layer minus its GEMMs."""
        times: dict[str, list[float]] = {name: [] for name in self.programs}
        for _ in range(25):  # The first five warm up.
            for name, run in self.programs.items():
                start = time.perf_counter()
                jax.block_until_ready(run(*self.batch, self.weights))
                times[name].append((time.perf_counter() - start) / N_CALLS * 1e6)
        medians = {name: float(np.median(of_name[5:])) for name, of_name in times.items()}
        rest = {f"{n} − products": medians[n] - medians["products"] for n in ("peer", "ragged")}
        return medians | rest


def by_layers(mesh: Mesh) -> dict[str, Any]:
    """Small layers' times, by tokens per rank."""
    sharding = NamedSharding(mesh, P("ep"))
    n = mesh.size * (SmallLayer.experts // mesh.size + SmallLayer.copies(mesh.size))

    def normal(*shape: int) -> jax.Array:
        make = jax.jit(
            lambda key: jax.random.normal(key, shape, jnp.bfloat16) / shape[1] ** 0.5,
            out_shardings=sharding,
        )
        return make(jax.random.key(len(shape)))

    width = SmallLayer.width
    weights = moe.Experts(normal(n, SMALL_HIDDEN, 2 * width), normal(n, width, SMALL_HIDDEN))
    room: dict[str, Any] = {"max_tokens": SMALL[-1], "hidden_bytes": 2 * SMALL_HIDDEN}
    with init_comm(mesh, "ep", max_experts=SmallLayer.experts, **room) as comm:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            layers = list(pool.map(lambda t: SmallLayer(mesh, comm, t, weights), SMALL))
        return {str(t): layer.microseconds() for t, layer in zip(SMALL, layers, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--layers", action="store_true", help="only the layers of small batches")
    only.add_argument("--kernels", action="store_true", help="only our kernels, which is quick")
    only.add_argument("--processes", action="store_true", help="our kernels, a process per GPU")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    arguments = parser.parse_args()
    if arguments.processes:
        one_per_gpu()
    devices = jax.devices()
    n = len(devices)
    figures: dict[str, Any] = {"device": f"{n} × {devices[0].device_kind}", "jax": jax.__version__}
    mesh = Mesh(np.array(devices), "ep")
    if arguments.processes:
        figures["processes"] = by_processes(mesh)
    elif not arguments.kernels:
        figures["layers, µs"] = by_layers(mesh)
    if not arguments.layers and not arguments.processes:
        for top_k in (1, 8):
            figures[f"top-{top_k}"] = by_kernels(n, n, N_TOKENS, HIDDEN, top_k, SMS)
        if not arguments.kernels:
            figures["xla, ms"] = by_xla(mesh)
        small = {str(t): by_kernels(n, n, t, SMALL_HIDDEN, 8, (32, 132)) for t in SMALL}
        figures["small"] = small
        figures["ranks that share"] = {
            str(size): by_kernels(n, size, 2048, HIDDEN, 8, (16,)) for size in (2 * n, 4 * n)
        }
    print(json.dumps(figures, indent=1))
    if arguments.json and jax.process_index() == 0:
        record.write(arguments.json, figures)


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    main()
