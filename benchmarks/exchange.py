"""Tokens to the peers and back, by SM count, beside XLA's ways.

    python benchmarks/exchange.py [--json FILE]     # one process, all GPUs

16,384 tokens of 4,096 bfloat16 a rank, each to another rank (top-1), and top-8 of all ranks, from
where they lie to their rows, and sums of rows back. Kernels without XLA, in step; medians. Then
small batches of 7,168, and as many ranks as share the GPUs.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import record
from exchange_batch import ExchangeBatch
from graph import Graph
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from virtual_ranks import VirtualRanks

from lplb_jax.comm import Windows
from lplb_jax.moe.collectives import SendLists, exchange
from lplb_jax.moe.ragged import Ragged

N_TOKENS, HIDDEN = 16_384, 4096
SMS = (8, 16, 32, 64, 132)
SMALL, SMALL_HIDDEN = (32, 128, 512, 2048), 7168
N_CALLS = 10  # in one graph or program


def milliseconds(ranks: VirtualRanks, batch: ExchangeBatch) -> dict[str, float]:
    """Of a call there, and of one back, all ranks in step: CUDA graphs of N_CALLS, medians."""
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
            # The rank that was started last has waited for none to be started.
            of_way.append(min([graph.seconds() for graph in graphs]) / N_CALLS)
        times[way] = float(np.median(of_way[2:])) * 1e3
        for rank, graph in enumerate(graphs):
            ranks.use_device(rank)
            graph.close()
    return times


def by_kernels(n_gpus: int, size: int, n_tokens: int, hidden: int, top_k: int, sms: Any) -> Any:
    """Times of `size` ranks that share n_gpus; of top-1 every token goes to another rank."""
    rng = np.random.default_rng(0)
    windows = Windows(size, n_tokens * min(size - 1, top_k), top_k, 2 * hidden)
    figures = {}
    with VirtualRanks(jax.devices()[:n_gpus], size, 8, windows=windows) as ranks:
        ranks_of = rng.integers(0, size, (size, n_tokens, top_k))
        if top_k == 1:
            ranks_of = (ranks_of % (size - 1) + 1 + np.arange(size)[:, None, None]) % size
        capacity = int(np.bincount(ranks_of.ravel()).max())
        batch = ExchangeBatch(ranks.put, ranks_of, capacity, hidden, rng)
        megabytes = batch.sent.sum() / size * hidden * 2 / 1e6
        for n in sms:
            batch.blocks = [n, (n + 1) // 2]
            times = milliseconds(ranks, batch)
            figures[str(n)] = {way: {"ms": ms, "GB/s": megabytes / ms} for way, ms in times.items()}
        if n_tokens * top_k <= SMALL[-1] * 8:
            batch.check()
        assert not any(ranks.failures()), ranks.failures()
    return figures


def by_xla(mesh: Mesh) -> dict[str, float]:
    """Milliseconds of XLA's ways for as many bytes to one peer, without rows and sums."""
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
        ("all_to_all", padded, N_TOKENS * size // (size - 1)),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    arguments = parser.parse_args()
    devices = jax.devices()
    n = len(devices)
    figures: dict[str, Any] = {"device": f"{n} × {devices[0].device_kind}", "jax": jax.__version__}
    for top_k in (1, 8):
        figures[f"top-{top_k}"] = by_kernels(n, n, N_TOKENS, HIDDEN, top_k, SMS)
    figures["xla, ms"] = by_xla(Mesh(np.array(devices), "ep"))
    figures["small"] = {str(t): by_kernels(n, n, t, SMALL_HIDDEN, 8, (32, 132)) for t in SMALL}
    figures["ranks that share"] = {
        str(size): by_kernels(n, size, 2048, HIDDEN, 8, (16,)) for size in (2 * n, 4 * n)
    }
    print(json.dumps(figures, indent=1))
    if arguments.json:
        record.write(arguments.json, figures)


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    main()
