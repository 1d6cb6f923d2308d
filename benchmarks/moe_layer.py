"""The value of balance in an expert-parallel layer: step time and memory on all available GPUs.

    python benchmarks/moe_layer.py [--hidden 2048 --width 1024 --experts 64] [--json FILE]
    python benchmarks/moe_layer.py --traces           # the packaged traces as they are
    python benchmarks/moe_layer.py --moving           # different experts are hot in every step
    python benchmarks/moe_layer.py --compile-for 8    # the memory that 8 such GPUs would need
    python benchmarks/moe_layer.py --processes        # one process per GPU
    python benchmarks/moe_layer.py --modes lplb batch # only these, and "none"
    python benchmarks/moe_layer.py --transport ragged peer    # one after the other

The routing is from a packaged trace. The experts are arranged so that the busiest rank has 1.1, 1.3
and 1.6 times the mean load. One run then times a step (forward and backward) without copies
("none"), with copies along a topology and an even split over them ("eplb") or `rebalance` ("lplb"),
with experts and as many copies on any ranks, placed by the loads that arranged the experts ("any"),
and with at most as many copies chosen in the step ("batch"). There are as many copies as balance
needs, and buffers are as small as possible without overflow. Each result is checked. GPUs of one
kind differ in speed by a few per cent, so the busiest rank is the first and the last GPU in turn,
and times are means of both. Within some 0.1 s of GEMMs, a GPU's clock falls to what its power limit
allows, so every kind of step runs for a while before it is timed, and is timed for a while.

With --traces, the experts of every layer of every trace are placed by the loads of an earlier
training step, as in the demo. --moving places them in the same way, but then the loads of the
batches change: every step has different sequences of a trace, one per rank, or loads by Zipf's law
with hot experts drawn anew. Placements are fixed, and only "batch" can follow. Buffers have room
for the worst batch; times and imbalances are means over all batches.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.experimental.topologies
import jax.numpy as jnp
import numpy as np
import record
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from per_gpu import one_per_gpu
from wall import median_seconds

from lplb_jax import (
    Placement,
    init_comm,
    metrics,
    moe,
    place_copies,
    place_experts,
    rebalance,
    solve,
    topologies,
)
from lplb_jax.data import AUX_LOSSES, load_traces
from lplb_jax.topologies import Topology

TOP_K = 8
MODES = "eplb", "lplb", "any", "batch"  # beside "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384, help="per rank")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024, help="of an expert")
    parser.add_argument("--experts", type=int, default=64, help="a divisor of 256")
    parser.add_argument("--redundants", type=int, help="per rank; default: as many as it takes")
    parser.add_argument("--imbalances", type=float, nargs="+", default=[1.1, 1.3, 1.6])
    parser.add_argument(
        "--traces", action="store_true", help="all, with 256 experts, in the place of imbalances"
    )
    parser.add_argument(
        "--moving", action="store_true", help="batches that differ, in the place of imbalances"
    )
    parser.add_argument("--compile-for", type=int, metavar="N", help="GPUs that need not be there")
    parser.add_argument("--processes", action="store_true", help="one per GPU")
    parser.add_argument(
        "--transport", nargs="+", default=["auto"], help="of moe_layer: one or several"
    )
    parser.add_argument(
        "--copies", type=int, default=0, help="with peer: copies that engines move through comm"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help='beside "none"')
    parser.add_argument("--repeats", type=int, default=5, help="of each kind of step, in turn")
    parser.add_argument("--seconds", type=float, default=0.3, help="that a repeat takes at least")
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.processes:
        one_per_gpu()

    devices = jax.devices()
    if options.compile_for:
        absent = {"topology": f"1x1x{options.compile_for}"}
        devices = jax.experimental.topologies.get_topology_desc("", "cuda", **absent).devices
    mesh = Mesh(np.array(devices), "ep")
    r2o = topologies.cube() if len(devices) == 8 else topologies.complete(len(devices))
    columns = r2o.shape[1]
    if options.traces:
        options.experts, options.redundants = 256, options.redundants or 2 * columns
    elif options.moving:
        options.redundants = options.redundants or -(-2 // columns) * columns
    print(f"{len(devices)} × {devices[0].device_kind}, jax {jax.__version__}, {vars(options)}")
    options.comm = None
    if "peer" in options.transport:
        expert_bytes = 2 * 3 * options.hidden * options.width
        room = {"max_tokens": options.tokens, "hidden_bytes": 2 * options.hidden}
        room["copy_bytes"] = options.copies * expert_bytes
        options.comm = init_comm(mesh, max_experts=options.experts, **room)
    sources = traced if options.traces else moving if options.moving else arranged
    turns = []
    for label, of_turns in sources(options, r2o, len(devices)):
        for transport in options.transport:
            named = f"{label}, {transport}" if len(options.transport) > 1 else label
            turns += [(named, [Case(mesh, r2o, options, transport, of) for of in of_turns])]
    cases = [case for _, of_turns in turns for case in of_turns]
    if 0 < options.copies < (most := max(case.n_copies for case in cases)):
        parser.error(
            f"--copies: expected room for the {most} copies of a rank, got {options.copies}"
        )
    with concurrent.futures.ThreadPoolExecutor() as pool:
        wanted = {case.key(name): (case, name) for case in cases for name in case.names}
        print(f"compiling {len(wanted)} programs", flush=True)
        start = time.perf_counter()
        programs = {key: pool.submit(case.compile, name) for key, (case, name) in wanted.items()}
        for done, program in enumerate(concurrent.futures.as_completed(programs.values()), 1):
            program.result()
            print(f"  {done} after {time.perf_counter() - start:.0f} s", flush=True)
    for case in cases:
        case.steps = {name: programs[case.key(name)].result() for name in case.names}
    figures: dict[str, Any] = {
        "device": devices[0].device_kind,
        "ranks": len(devices),
        "jax": jax.__version__,
        "options": {k: v for k, v in vars(options).items() if k not in ("json", "comm")},
    }
    repeats = 0 if options.compile_for else options.repeats
    figures["results"] = results = []

    def write() -> None:
        if options.json and jax.process_index() == 0:
            record.write(options.json, figures)

    for label, of_turns in turns:
        results.append(measure(label, of_turns, repeats, options.seconds))
        write()  # What is measured is kept, whatever comes.
    if repeats:
        figures["forward_ms"] = forward = forward_time(cases[0], repeats)
        for key, copies in (("rebalance_ms", "placement"), ("rebalance_batch_ms", "batch")):
            figures[key] = ms = rebalance_time(mesh, cases[0], copies)
            print(f"rebalance, copies of the {copies}: {ms:.3f} ms, {ms / forward:.1%} of forward")
    write()


class Source(NamedTuple):
    """The choices of all ranks, and what is known before.

    Attributes:
      batches: int32 `[batches, tokens, 8]`, with experts numbered rank by rank and, on each rank,
        slot by slot.
      history: `[n_experts]`, the loads that arranged the experts, in the same order.
    """

    batches: np.ndarray
    history: np.ndarray


# A label, and several arrangements that are timed together.
Sources = Iterator[tuple[str, list[Source]]]


def traced(options: Any, r2o: Topology | np.ndarray, n_ranks: int) -> Sources:
    """Every layer of every trace, with experts placed by the loads of an earlier step."""
    for aux_loss in AUX_LOSSES:
        for layer, (chosen, history) in enumerate(zip(*load_traces(aux_loss), strict=True)):
            order = placed(history, options, r2o, n_ranks)
            ids = np.resize(chosen.astype(np.int32), (n_ranks * options.tokens, TOP_K))
            source = Source(renumbered(ids, order)[None], history[order])
            yield f"balancing loss {aux_loss}, layer {layer}", [source]


def placed(
    history: np.ndarray, options: Any, r2o: Topology | np.ndarray, n_ranks: int
) -> np.ndarray:
    """The experts rank by rank, placed by earlier loads."""
    placement = place_experts(
        history, r2o, n_logical=len(history), ep_size=n_ranks,
        redundants_per_rank=options.redundants,
    )  # fmt: skip
    return placement.phy2log.reshape(n_ranks, -1)[:, : len(history) // n_ranks].ravel()


def moving(options: Any, r2o: Topology | np.ndarray, n_ranks: int) -> Sources:
    """Batches with changing loads, and experts placed by earlier ones."""
    traces = load_traces()
    merged, history = merged_by_load(traces.history[0], options.experts)
    order = placed(history, options, r2o, n_ranks)
    # A step has one sequence of 1,024 tokens per rank, repeated as needed.
    sequences = merged[traces.indices[0]].reshape(-1, n_ranks, 1024, TOP_K)
    batches = [
        np.concatenate([np.resize(sequence, (options.tokens, TOP_K)) for sequence in of_ranks])
        for of_ranks in sequences
    ]
    yield "sequences of a trace", [Source(renumbered(np.stack(batches), order), history[order])]

    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, options.experts + 1)
    batches = []
    for _ in range(8):
        # The TOP_K largest of these are drawn without replacement, by their shares.
        keys = rng.gumbel(size=(n_ranks * options.tokens, options.experts))
        keys += np.log(rng.permutation(share))
        batches.append(np.argpartition(-keys, TOP_K, axis=1)[:, :TOP_K].astype(np.int32))
    yield "Zipf 1, the hot experts drawn anew", [Source(np.stack(batches), history[order])]


def arranged(options: Any, r2o: Topology | np.ndarray, n_ranks: int) -> Sources:
    """One trace, with experts arranged to the given imbalances."""
    ids = routing(n_ranks * options.tokens, options.experts)
    loads = np.bincount(ids.ravel(), minlength=options.experts)
    for imbalance in options.imbalances:
        orders = [arrangement(loads, n_ranks, imbalance, which) for which in ("first", "last")]
        sources = [Source(renumbered(ids, order)[None], loads[order]) for order in orders]
        yield f"arranged to {imbalance}", sources


def renumbered(ids: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The ids after renaming expert order[i] to i."""
    number = np.empty(len(order), np.int32)
    number[order] = np.arange(len(order))
    return number[ids]


def routing(n_tokens: int, n_experts: int) -> np.ndarray:
    """int32 `[n_tokens, 8]`: the trace's choices, repeated if it is shorter."""
    indices = load_traces().indices[0]
    merged, _ = merged_by_load(np.bincount(indices.ravel(), minlength=256), n_experts)
    return np.resize(merged[indices], (n_tokens, TOP_K))


def merged_by_load(loads: np.ndarray, n_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """A new id below n_experts for each of 256 experts, and the loads by new id.

    Experts with similar loads are merged, so that the loads keep their skew.
    """
    by_load = np.argsort(-loads, kind="stable")
    merged = np.empty(256, np.int32)
    merged[by_load] = np.arange(256) // (256 // n_experts)
    return merged, np.bincount(merged, loads, n_experts)


def arrangement(loads: np.ndarray, n_ranks: int, imbalance: float, busiest: str) -> np.ndarray:
    """Order of the experts, rank by rank and heaviest first.

    The first or the last rank has `imbalance` times the mean load; the others have equal loads.
    """
    n_local = len(loads) // n_ranks
    target = imbalance * loads.sum() / n_ranks
    even = place_experts(
        loads, topologies.ring(n_ranks), n_logical=len(loads), ep_size=n_ranks,
        redundants_per_rank=1,
    )  # fmt: skip
    order = even.phy2log.reshape(n_ranks, -1)[:, :n_local].copy()
    failed = 0
    for turn in range(1000):
        missing = target - loads[order[0]].sum()
        rank = 1 + turn % (n_ranks - 1)
        change = loads[order[rank]][None] - loads[order[0]][:, None]
        # In small steps, so that all other ranks lose equally.
        step = missing if n_ranks == 2 else missing / (n_ranks - 1)
        i, j = np.unravel_index(np.argmin(np.abs(change - step)), change.shape)
        if abs(missing - change[i, j]) < abs(missing):
            order[0, i], order[rank, j] = order[rank, j], order[0, i]
            failed = 0
        elif (failed := failed + 1) == n_ranks - 1:
            break
    for row in order:
        row[:] = row[np.argsort(-loads[row], kind="stable")]
    return (order if busiest == "first" else order[::-1]).ravel()


class Batch(NamedTuple):
    """A step's arguments besides the experts: arrays over all ranks."""

    tokens: jax.Array
    gates: jax.Array
    ids: jax.Array
    upstream: jax.Array


class Case:
    """One arrangement of the experts, with its compiled and timed steps.

    Attributes:
      imbalance: by the name of a step, the remaining imbalance of each batch.
    """

    def __init__(
        self, mesh: Mesh, r2o: Topology | np.ndarray, options: Any, transport: str, source: Source
    ) -> None:
        self.mesh, self.r2o, self.ids = mesh, r2o, source.batches
        self.names = ["none", *(name for name in MODES if name in options.modes)]
        self.sharding = NamedSharding(mesh, P("ep"))
        self.replicated = NamedSharding(mesh, P())
        n_local, columns = options.experts // mesh.size, r2o.shape[1]
        self.sizes = n_local, options.hidden, options.width
        loads = [np.bincount(ids.ravel(), minlength=options.experts) for ids in source.batches]
        loads = np.stack(loads).astype(np.int32)
        numbers = range(columns, n_local + 1, columns)
        for n_copies in [options.redundants] if options.redundants else numbers:
            self.place(loads, source.history, n_copies)
            if max(self.imbalance["lplb"]) < 1.001:
                break
        if not options.compile_for:
            self.anywhere = jax.device_put(self.anywhere, self.replicated)
        comm = options.comm if transport == "peer" else None
        self.transport = {"transport": transport, "comm": comm}
        self.steps: dict[str, Any] = {}

    def place(self, loads: np.ndarray, history: np.ndarray, n_copies: int) -> None:
        """Places `n_copies` copies on every rank, and computes the remaining imbalance."""
        n_ranks, n_logical = self.mesh.size, loads.shape[1]
        self.n_copies = n_copies
        self.placement = place_experts(
            None, self.r2o, n_logical=n_logical, ep_size=n_ranks, redundants_per_rank=n_copies
        )
        self.anywhere = place_experts(
            history, n_logical=n_logical, ep_size=n_ranks, redundants_per_rank=n_copies
        )
        chosen = [place_copies(of_batch, self.placement) for of_batch in loads]
        solved = jax.jit(functools.partial(solve, r2o=self.r2o, placement=self.placement))
        solved_anywhere = jax.jit(lambda loads, placement: solve(loads, placement=placement))
        quotas = {
            "none": [metrics.home_quota(of_batch, self.placement) for of_batch in loads],
            "eplb": [metrics.even_quota(of_batch, self.placement) for of_batch in loads],
            "lplb": [solved(of_batch).quota for of_batch in loads],
            "any": [solved_anywhere(of_batch, self.anywhere).quota for of_batch in loads],
            "batch": [solved_anywhere(*both).quota for both in zip(loads, chosen, strict=True)],
        }
        # Copies of all ranks that a step moves.
        along = float(n_ranks * n_copies)
        self.copies = {"none": 0.0, "eplb": along, "lplb": along}
        self.copies |= {"any": n_copies_of([self.anywhere]), "batch": n_copies_of(chosen)}
        self.imbalance = {
            name: [float(metrics.imbalance(metrics.rank_loads(quota, n_ranks))) for quota in each]
            for name, each in quotas.items()
        }

    def batches(self) -> list[Batch]:
        """The batches, which differ only in their choices."""
        rng = np.random.default_rng(0)
        n_rows, hidden = self.ids.shape[1], self.sizes[1]
        gates = rng.random((n_rows, TOP_K)).astype(np.float32)
        gates, *ids = (jax.device_put(array, self.sharding) for array in (gates, *self.ids))
        shape = n_rows, hidden
        tokens, upstream = (normal(self.sharding, seed, shape, 1) for seed in (0, 1))
        return [Batch(tokens, gates, of_batch, upstream) for of_batch in ids]

    def experts(self, name: str) -> moe.Experts:
        """Every rank's own experts, with room for copies except for "none".

        An expert has the same weights in all kinds of steps.
        """
        n_local, hidden, width = self.sizes
        n_slots = self.mesh.size * (n_local + self.n_copies)
        own = moe.Experts(
            normal(self.sharding, 2, (self.mesh.size * n_local, hidden, 2 * width), hidden**-0.5),
            normal(self.sharding, 3, (self.mesh.size * n_local, width, hidden), width**-0.5),
        )
        own = jax.device_put(moe.to_home_order(own, self.placed(name)), self.sharding)
        if name == "none":
            return own
        experts = jax.tree.map(with_room(self.mesh, self.n_copies), own)
        assert len(experts.down) == n_slots
        return experts

    def placed(self, name: str) -> Placement:
        """The placement of the experts."""
        return self.anywhere if name == "any" else self.placement

    def layer(
        self, name: str, placement: Placement, tokens: Any, gates: Any, experts: Any, ids: Any
    ) -> Any:
        """One rank's forward pass."""
        result = moe.moe_layer(
            tokens, ids, gates, experts, placement=placement, axis_name="ep",
            balance=name if name in ("none", "eplb") else "lplb",
            copies="batch" if name == "batch" else "placement",
            capacity_factor=self.key(name)[2], in_place=True, **self.transport,
        )  # fmt: skip
        return result.out, (result.experts, result.traffic)

    def key(self, name: str) -> tuple[str, str, float, int, tuple[int, ...]]:
        """Identifies a program: transport, kind of step, room over the mean load, copies, shape.

        The placement of "any" is an argument of its program, so only its shape matters.
        """
        # A little more for eplb, where every source splits its own tokens.
        slack = 1.002 if name == "eplb" else 1 + 1e-6
        shape = self.anywhere.log2phy.shape if name == "any" else ()
        room = max(1.0, slack * max(self.imbalance[name]))
        return self.transport["transport"], name, room, self.n_copies, shape

    def compile(self, name: str) -> Any:
        """Compiles forward and backward; the experts' buffers come back with fresh copies."""

        def step(experts: moe.Experts, batch: Batch, anywhere: Placement) -> Any:
            layer = functools.partial(
                self.layer, name, anywhere if name == "any" else self.placement, ids=batch.ids
            )
            out, pull, (experts, traffic) = jax.vjp(
                layer, batch.tokens, batch.gates, experts, has_aux=True
            )
            # In a model, the cotangents depend on the output.
            out, upstream = jax.lax.optimization_barrier((out, batch.upstream))
            slopes = pull(upstream)
            # The experts come first: XLA reuses donated buffers for the first results that fit.
            return experts, slopes, out, traffic

        run = jax.shard_map(
            step, mesh=self.mesh, in_specs=(P("ep"), P("ep"), P()),
            out_specs=(P("ep"), P("ep"), P("ep"), P()),
        )  # fmt: skip
        experts, batch = jax.eval_shape(lambda: (self.experts(name), self.batches()[0]))
        shapes = *shaped((experts, batch), self.sharding), shaped(self.anywhere, self.replicated)
        run = jax.jit(run, donate_argnums=0, compiler_options=moe.COMPILER_OPTIONS)
        return run.lower(*shapes).compile()

    def step(self, name: str, experts: moe.Experts, batch: Batch) -> Any:
        """The experts' buffers, gradients, outputs and traffic; the experts are donated."""
        return self.steps[name](experts, batch, self.anywhere)

    def check(self, batch: Batch) -> None:
        """All kinds of steps must give the same results, without overflow."""
        want = None
        for name in self.names:
            _, slopes, out, traffic = self.step(name, self.experts(name), batch)
            assert int(traffic.overflow) == 0, name
            assert not np.any(traffic.status), name
            *others, of_experts = slopes
            got = out, *others, *(self.by_id(name, leaf) for leaf in of_experts)
            want = want or got
            assert all(map(close, got, want)), name

    def by_id(self, name: str, of_slots: jax.Array) -> jax.Array:
        """The gradients of the ranks' own experts, among those of all slots, by expert id."""
        by_rank = of_slots.reshape(self.mesh.size, -1, *of_slots.shape[1:])
        own = by_rank[:, : self.sizes[0]].reshape(-1, *of_slots.shape[1:])
        return moe.to_id_order(own, self.placed(name))

    def gib(self, name: str) -> float:
        """GiB of a step's arguments, results and temporaries on one GPU."""
        memory = self.steps[name].memory_analysis()
        return (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        ) / 2**30


def shaped(tree: Any, sharding: Any) -> Any:
    """The arrays' shapes and types only, with that sharding."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree)


def normal(sharding: Any, seed: int, shape: tuple[int, ...], scale: float) -> jax.Array:
    """bfloat16 normal numbers, of standard deviation `scale`."""
    return _normal(sharding, shape, scale)(jax.random.key(seed))


# Cached, so that every case compiles them once.
@functools.cache
def _normal(sharding: Any, shape: tuple[int, ...], scale: float) -> Any:
    return jax.jit(
        lambda key: (scale * jax.random.normal(key, shape)).astype(jnp.bfloat16),
        out_shardings=sharding,
    )


@functools.cache
def with_room(mesh: Mesh, n_copies: int) -> Any:
    """A program that leaves every rank room for copies behind its experts."""
    return jax.jit(
        jax.shard_map(
            lambda own: jnp.pad(own, [(0, n_copies), (0, 0), (0, 0)]),
            mesh=mesh, in_specs=P("ep"), out_specs=P("ep"),
        )
    )  # fmt: skip


def n_copies_of(placements: list[Placement]) -> float:
    """The copies of all ranks, on average."""
    each = [np.sum(np.asarray(p.phy2log) >= 0) - p.n_logical for p in placements]
    return float(np.mean(each))


def measure(label: str, turns: list[Case], repeats: int, seconds: float) -> dict[str, Any]:
    """Memory of a step, and its time, averaged over the turns; no time without repeats."""
    times = step_times(turns, repeats, seconds) if repeats else {}
    case, result = turns[0], dict[str, Any](case=label)
    print(label)
    for name in case.names:
        imbalance, possible = (float(np.mean(case.imbalance[key])) for key in (name, "none"))
        row = {
            "imbalance": imbalance,
            "imbalances": case.imbalance[name],
            "copies": case.copies[name] / case.mesh.size,
            "gib": case.gib(name),
        }
        line = f"  {name}: imbalance {imbalance:.3f}, {row['copies']:.3g} copies, "
        line += f"{row['gib']:.2f} GiB"
        if times:
            of_turns = [times[turn, name] for turn in turns]
            ms = float(np.mean(of_turns))
            gain = result.get("none", {"ms": ms})["ms"] / ms
            share = (gain - 1) / (possible - 1)
            row |= {"ms": ms, "ms_of_turns": of_turns, "gain": gain, "share": share}
            each = " and ".join(f"{value:.2f}" for value in of_turns)
            line += f", {ms:.2f} ms ({each}), gain {gain:.3f} ({share:.0%} of the possible)"
        result[name] = row
        print(line, flush=True)
    return result


def step_times(turns: list[Case], repeats: int, seconds: float) -> dict[Any, float]:
    """ms of every case and kind of step: medians of interleaved repeats.

    A repeat lasts at least `seconds`, after half that time in which the GPUs' clocks settle.
    """
    batches = {case: case.batches() for case in turns}
    for case, each in batches.items():
        for batch in each:
            case.check(batch)
    experts = {(case, name): case.experts(name) for case in turns for name in case.names}

    def run(case: Case, name: str, rounds: int) -> float:
        """ms of a step, in as many rounds over all batches."""
        start = time.perf_counter()
        for batch in rounds * batches[case]:
            experts[case, name], *_ = case.step(name, experts[case, name], batch)
        jax.block_until_ready(experts[case, name])
        return (time.perf_counter() - start) * 1e3 / (rounds * len(batches[case]))

    rounds = {}
    for case, name in experts:
        run(case, name, 1)
        ms = run(case, name, 1) * len(batches[case])
        rounds[case, name] = agreed(math.ceil(seconds * 1e3 / ms))
    times: dict[Any, list[float]] = {key: [] for key in experts}
    for _ in range(repeats):
        for case, name in experts:
            run(case, name, -(-rounds[case, name] // 2))
            times[case, name].append(run(case, name, rounds[case, name]))
    return {key: float(np.median(of_key)) for key, of_key in times.items()}


def agreed(number: int) -> int:
    """The first process's number: all must make the same calls."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


@jax.jit
def close(got: jax.Array, want: jax.Array) -> jax.Array:
    """Whether results are equal up to bfloat16 rounding of sums in a different order."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return jnp.sqrt(((got - want) ** 2).sum() / (want**2).sum()) < 1e-2


def rebalance_time(mesh: Mesh, case: Case, copies: Any, n_layers: int = 50) -> float:
    """ms of one `rebalance`, including the exchange of loads, in a program of many layers."""

    def rank(ids: jax.Array) -> jax.Array:
        def layer(shift: jax.Array, _: Any) -> Any:
            assigned, split, *_ = rebalance(
                (ids + shift) % case.placement.n_logical, None, placement=case.placement,
                axis_name="ep", positions=True, copies=copies,
            )  # fmt: skip
            return split.max_load[0] % 2 + shift, assigned.position[0, 0]

        return jax.lax.scan(layer, jnp.int32(0), None, length=n_layers)[1]

    run = jax.jit(jax.shard_map(rank, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))
    return median_seconds(run, case.batches()[0].ids, repeats=10) * 1e3 / n_layers


def forward_time(case: Case, repeats: int) -> float:
    """ms of the layer's forward pass with "lplb", copies in place."""
    run = jax.jit(
        jax.shard_map(
            lambda *arguments: case.layer("lplb", case.placement, *arguments)[0],
            mesh=case.mesh, in_specs=P("ep"), out_specs=P("ep"),
        ),
        compiler_options=moe.COMPILER_OPTIONS,
    )  # fmt: skip
    batch = case.batches()[0]
    arguments = batch.tokens, batch.gates, case.experts("lplb"), batch.ids
    four = median_seconds(lambda: [run(*arguments) for _ in range(4)], repeats=repeats)
    return four * 1e3 / 4


if __name__ == "__main__":
    main()
