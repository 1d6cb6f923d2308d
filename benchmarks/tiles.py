"""Tiles of the busiest rank relative to the fewest possible, and their cost on a GPU.

    python benchmarks/tiles.py [--tile 128] [--ranks 8 32 64] [--tokens 32 128 512 4096]
    python benchmarks/tiles.py --gpu [--tokens 32 128 512]
    python benchmarks/tiles.py --solve [--tokens 32 128 512 4096]
    python benchmarks/tiles.py --step

The table, on any backend, uses the packaged traces, top-8 of 256 experts, placed by the loads of an
earlier step with two redundant slots per rank, on any ranks. Batches consist of consecutive
sequences, repeated if all ranks together have more than the 32,768 available tokens. Columns are
per cent of tiles above the fewest, averaged over batches and layers of both traces:

    none    no copies: every expert at home
    even    every expert's tokens are split evenly over its slots
    tokens  `solve`: the busiest rank has the fewest tokens
    excess  tokens above the fewest, with the fewest tiles

The last column is the busiest rank's tiles per slot with `solve(tile=…)`.

--gpu times the feed-forward networks of that rank's slots (bfloat16) with both quotas, alternating:
median milliseconds. --solve times a `solve` that counts tokens and one that counts tiles, in a
jitted loop over the same loads: microseconds. --step times the kernels of `rebalance` likewise, in
a CUDA graph: of the first 32,768 indices of every layer, with positions.
"""

from __future__ import annotations

import argparse
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lplb_jax import metrics, moe, place_experts, solve
from lplb_jax.data import AUX_LOSSES, load_traces

EXPERTS, REDUNDANTS, MOST_BATCHES = 256, 2, 8
SHAPES = ((4096, 1536), (7168, 2048))  # hidden, width


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--tile", type=int, default=128)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 128, 512, 4096])
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--solve", action="store_true")
    parser.add_argument("--step", action="store_true")
    args = parser.parse_args()
    report = times if args.gpu else solves if args.solve else steps if args.step else table
    report(args.ranks, args.tokens, args.tile)


def table(ranks: list[int], tokens: list[int], tile: int) -> None:
    names = ("none", "even", "tokens", "excess", "tiles/slot")
    print(f"{'ranks':>6}{'tokens':>8}" + "".join(f"{name:>12}" for name in names))
    for n_ranks in ranks:
        for n_tokens in tokens:
            rows = [compare(*one, n_ranks, tile) for one in instances(n_ranks, n_tokens)]
            numbers = "".join(f"{mean:12.1f}" for mean in np.concatenate(rows).mean(axis=0))
            print(f"{n_ranks:6}{n_tokens:8}{numbers}", flush=True)


def instances(n_ranks: int, n_tokens: int):
    """Placements, and loads `[batches, experts]` to balance on them."""
    for aux_loss in AUX_LOSSES:
        traces = load_traces(aux_loss)
        for indices, history in zip(traces.indices, traces.history, strict=True):
            n_batches = max(min(len(indices) // (n_ranks * n_tokens), MOST_BATCHES), 1)
            taken = np.resize(indices, (n_batches, n_ranks * n_tokens * indices.shape[1]))
            loads = np.stack([np.bincount(batch, minlength=EXPERTS) for batch in taken])
            yield placed(history, n_ranks), loads.astype(np.int32)


def placed(history: np.ndarray, n_ranks: int):
    sizes: dict[str, Any] = {
        "n_logical": EXPERTS,
        "ep_size": n_ranks,
        "redundants_per_rank": REDUNDANTS,
    }
    return place_experts(history, **sizes)


@functools.partial(jax.jit, static_argnames="tile")
@functools.partial(jax.vmap, in_axes=(0, None, None))
def splits(loads, placement, tile):
    by_tokens = solve(loads, placement=placement)
    by_tiles = solve(loads, placement=placement, tile=tile)
    return by_tokens, by_tiles


def compare(placement, loads: np.ndarray, n_ranks: int, tile: int) -> np.ndarray:
    by_tokens, by_tiles = splits(loads, placement, tile)
    fewest = np.asarray(by_tiles.lower_bound)[:, 0]

    def over(quota) -> np.ndarray:
        tiles = metrics.rank_loads(-(-jnp.asarray(quota) // tile), n_ranks)
        return 100 * (np.asarray(tiles).max(axis=1) / fewest - 1)

    assert (over(by_tiles.quota) == 0).all(), "solve(tile=…) missed its bound"
    homes, even = (
        np.stack([of(jnp.asarray(row), placement) for row in loads])
        for of in (metrics.home_quota, metrics.even_quota)
    )
    excess = 100 * (np.asarray(by_tiles.max_tokens) / np.asarray(by_tokens.max_load) - 1)[:, 0]
    per_slot = fewest / (placement.n_physical // n_ranks)
    columns = over(homes), over(even), over(by_tokens.quota), excess, per_slot
    return np.stack(columns, axis=1)


def times(ranks: list[int], tokens: list[int], tile: int) -> None:
    print(f"device: {jax.devices()[0].device_kind}; tiles of {tile} rows")
    names = ("tiles", "by tokens", "by tiles")
    print(f"{'hidden x width':>16}{'slots':>7}{'tokens':>8}" + "".join(f"{n:>12}" for n in names))
    for hidden, width in SHAPES:
        for n_ranks in ranks:
            slots = EXPERTS // n_ranks + REDUNDANTS
            keys = jax.random.split(jax.random.key(0), 3)
            experts = moe.Experts(
                jax.random.normal(keys[0], (slots, hidden, 2 * width), jnp.bfloat16) * 0.02,
                jax.random.normal(keys[1], (slots, width, hidden), jnp.bfloat16) * 0.02,
            )
            for n_tokens in tokens:
                sizes = [busiest(*one, n_ranks, tile) for one in instances(n_ranks, n_tokens)]
                sizes = np.array(sizes)  # [instances, by tokens or by tiles, slots]
                most = -(-sizes.sum(axis=2).max() // tile) * tile
                rows = jax.random.normal(keys[2], (most, hidden), jnp.bfloat16)
                tiles = (-(-sizes // tile)).sum(axis=2).mean(axis=0)
                of_both = measure(rows, experts, sizes)
                name, counted = f"{hidden} x {width}", f"{tiles[0]:.1f}/{tiles[1]:.1f}"
                numbers = "".join(f"{ms:12.4f}" for ms in of_both)
                print(f"{name:>16}{slots:7}{n_tokens:8}{counted:>12}{numbers}", flush=True)


def solves(ranks: list[int], tokens: list[int], tile: int) -> None:
    print(f"device: {jax.devices()[0].device_kind}; tiles of {tile} rows, µs of a solve")
    print(f"{'ranks':>6}{'tokens':>8}{'by tokens':>12}{'by tiles':>12}{'times':>8}")
    for n_ranks in ranks:
        for n_tokens in tokens:
            of_both = np.mean([solve_times(*one, tile) for one in instances(n_ranks, n_tokens)], 0)
            by_tokens, by_tiles = of_both
            numbers = f"{by_tokens:12.2f}{by_tiles:12.2f}{by_tiles / by_tokens:8.2f}"
            print(f"{n_ranks:6}{n_tokens:8}{numbers}", flush=True)


def solve_times(placement, loads: np.ndarray, tile: int, n: int = 512) -> list[float]:
    batch = jnp.asarray(np.resize(loads, (n, EXPERTS)))
    placement = jax.tree.map(jnp.asarray, placement)

    @functools.partial(jax.jit, static_argnames="tile")
    def run(loads, placement, tile):
        return jax.lax.map(lambda row: solve(row, placement=placement, tile=tile), loads)

    medians = []
    for which in (None, tile):
        taken = []
        for _ in range(12):
            start = time.perf_counter()
            jax.block_until_ready(run(batch, placement, which))
            taken.append(time.perf_counter() - start)
        medians.append(float(np.median(taken[2:])) / n * 1e6)
    return medians


def steps(ranks: list[int], tokens: list[int], tile: int) -> None:
    from rebalance_call import RebalanceCall  # only with a GPU

    print(f"device: {jax.devices()[0].device_kind}; tiles of {tile} rows, µs of a rebalance")
    print(f"{'ranks':>6}{'by tokens':>12}{'by tiles':>12}{'more':>8}")
    for n_ranks in ranks:
        taken = []
        for aux_loss in AUX_LOSSES:
            traces = load_traces(aux_loss)
            for indices, history in zip(traces.indices, traces.history, strict=True):
                ids = indices.ravel()[:32768].astype(np.int32)
                no_topology = np.zeros((n_ranks, 0), np.int32)
                step = functools.partial(RebalanceCall, no_topology, placed(history, n_ranks), ids)
                taken.append([step(tile=which).time(replays=5) for which in (None, tile)])
        by_tokens, by_tiles = np.mean(taken, axis=0)
        more = by_tiles - by_tokens
        print(f"{n_ranks:6}{by_tokens:12.2f}{by_tiles:12.2f}{more:8.2f}", flush=True)


def busiest(placement, loads: np.ndarray, n_ranks: int, tile: int) -> list[np.ndarray]:
    """Slot quotas of the rank with the most tiles, by balancing tokens and by balancing tiles."""
    quotas = []
    for split in splits(loads[:1], placement, tile):
        of_rank = np.asarray(split.quota)[0].reshape(n_ranks, -1)
        quotas.append(of_rank[(-(-of_rank // tile)).sum(axis=1).argmax()])
    return quotas


def measure(rows, experts, sizes: np.ndarray, repeats: int = 20) -> np.ndarray:
    """Milliseconds, medians over the runs and means over the instances."""

    @jax.jit
    def run(rows, experts, group_sizes):
        def again(rows, _):
            return moe.expert_ffn(rows, experts, group_sizes), None

        return jax.lax.scan(again, rows, None, length=10)[0]

    taken = np.zeros((repeats, *sizes.shape[:2]))
    for repeat in range(-1, repeats):  # The first run compiles.
        for i, which in np.ndindex(sizes.shape[:2]):
            group_sizes = jax.block_until_ready(jnp.asarray(sizes[i, which], jnp.int32))
            start = time.perf_counter()
            jax.block_until_ready(run(rows, experts, group_sizes))
            if repeat >= 0:
                taken[repeat, i, which] = time.perf_counter() - start
    return np.median(taken, axis=0).mean(axis=0) * 1e3 / 10


if __name__ == "__main__":
    main()
