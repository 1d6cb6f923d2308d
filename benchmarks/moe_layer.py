"""What balance is worth in an expert-parallel layer: step time and memory on all GPUs there are.

    python benchmarks/moe_layer.py [--hidden 2048 --width 1024 --experts 64] [--json FILE]

Routing is that of the packaged traces. The experts are arranged so that the busiest rank has 1.1,
1.3 and 1.6 times the mean load; then, side by side in one run, a step (forward and backward) is
timed without copies ("none"), with an even split over copies ("eplb") and with `rebalance`
("lplb"). There are as many copies as balance needs, and buffers are as small as they can be
without overflow. Each result is checked. GPUs of one kind differ in speed by some per cent: the
busiest rank is the first of them and the last in turn, and times are means of both.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from wall import median_seconds

from lplb_jax import metrics, moe, place_experts, rebalance, solve, topologies
from lplb_jax.data import load_traces

TOP_K = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384, help="per rank")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024, help="of an expert")
    parser.add_argument("--experts", type=int, default=64, help="a divisor of 256")
    parser.add_argument("--redundants", type=int, help="per rank; default: as many as it takes")
    parser.add_argument("--imbalances", type=float, nargs="+", default=[1.1, 1.3, 1.6])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json")
    options = parser.parse_args()

    devices = jax.devices()
    mesh = Mesh(np.array(devices), "ep")
    r2o = topologies.cube() if len(devices) == 8 else topologies.complete(len(devices))
    print(f"{len(devices)} × {devices[0].device_kind}, jax {jax.__version__}, {vars(options)}")
    turns = [
        [Case(mesh, r2o, options, imbalance, busiest) for busiest in ("first", "last")]
        for imbalance in options.imbalances
    ]
    cases = [case for both in turns for case in both]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        wanted = {case.key(name): (case, name) for case in cases for name in case.names}
        programs = {key: pool.submit(case.compile, name) for key, (case, name) in wanted.items()}
    for case in cases:
        case.steps = {name: programs[case.key(name)].result() for name in case.names}
    results = [measure(both, options.repeats) for both in turns]
    of_rebalance = rebalance_time(mesh, r2o, cases[0])
    forward = forward_time(cases[0], options.repeats)
    print(f"rebalance {of_rebalance:.3f} ms, {of_rebalance / forward:.1%} of a forward pass")
    if options.json:
        record = {
            "device": devices[0].device_kind,
            "ranks": len(devices),
            "jax": jax.__version__,
            "options": {key: value for key, value in vars(options).items() if key != "json"},
            "results": results,
            "rebalance_ms": of_rebalance,
            "forward_ms": forward,
        }
        with open(options.json, "w") as file:
            json.dump(record, file, indent=1)


def routing(n_tokens: int, n_experts: int) -> np.ndarray:
    """int32 `[n_tokens, 8]`: the trace's choices, repeated where it is shorter.

    Of its 256 experts, those with similar loads become one, so that the loads keep their skew.
    """
    indices = load_traces().indices[0].astype(np.int32)
    by_load = np.argsort(-np.bincount(indices.ravel(), minlength=256), kind="stable")
    merged = np.empty(256, np.int32)
    merged[by_load] = np.arange(256) // (256 // n_experts)
    return np.resize(merged[indices], (n_tokens, TOP_K))


def arranged(loads: np.ndarray, n_ranks: int, imbalance: float, busiest: str) -> np.ndarray:
    """Order of the experts, rank by rank and heaviest first.

    The first rank, or the last, has `imbalance` times the mean load, and the others alike.
    """
    n_local = len(loads) // n_ranks
    target = imbalance * loads.sum() / n_ranks
    even = place_experts(
        loads, topologies.ring(n_ranks), n_logical=len(loads), ep_size=n_ranks,
        redundants_per_rank=1,
    )  # fmt: skip
    order = even.phy2log.reshape(n_ranks, -1)[:, :n_local].copy()
    for turn in range(1000):
        missing = target - loads[order[0]].sum()
        rank = 1 + turn % (n_ranks - 1)
        change = loads[order[rank]][None] - loads[order[0]][:, None]
        # In small steps, so that all other ranks lose alike.
        step = missing if n_ranks == 2 else missing / (n_ranks - 1)
        i, j = np.unravel_index(np.argmin(np.abs(change - step)), change.shape)
        if abs(missing - change[i, j]) >= abs(missing):
            break
        order[0, i], order[rank, j] = order[rank, j], order[0, i]
    for row in order:
        row[:] = row[np.argsort(-loads[row], kind="stable")]
    return (order if busiest == "first" else order[::-1]).ravel()


class Case:
    """One arrangement of the experts: its three steps, compiled and timed."""

    names = ("none", "eplb", "lplb")

    def __init__(
        self, mesh: Mesh, r2o: np.ndarray, options: Any, imbalance: float, busiest: str
    ) -> None:
        n_ranks, n_experts = mesh.size, options.experts
        ids = routing(n_ranks * options.tokens, n_experts)
        loads = np.bincount(ids.ravel(), minlength=n_experts)
        order = arranged(loads, n_ranks, imbalance, busiest)
        number = np.empty(n_experts, np.int32)
        number[order] = np.arange(n_experts)
        ids = number[ids]  # numbered so that the given order is the arrangement
        self.mesh, self.r2o = mesh, r2o
        loads = loads[order].astype(np.int32)
        columns = r2o.shape[1]
        numbers = range(columns, n_experts // n_ranks + 1, columns)
        for n_copies in [options.redundants] if options.redundants else numbers:
            self.place(loads, n_copies)
            if self.imbalance["lplb"] < 1.001:
                break
        rng = np.random.default_rng(0)
        n_rows = n_ranks * options.tokens
        shared = NamedSharding(mesh, P("ep"))
        self.ids = jax.device_put(ids, shared)
        self.gates = jax.device_put(rng.random((n_rows, TOP_K)).astype(np.float32), shared)
        self.sizes = n_experts // n_ranks, options.hidden, options.width
        self.tokens = self._normal(0, (n_rows, options.hidden), 1)
        self.upstream = self._normal(1, (n_rows, options.hidden), 1)
        self.steps: dict[str, Any] = {}

    def place(self, loads: np.ndarray, n_copies: int) -> None:
        """With so many copies on every rank; what imbalance that leaves."""
        n_ranks = self.mesh.size
        self.n_copies = n_copies
        self.placement = place_experts(
            None, self.r2o, n_logical=len(loads), ep_size=n_ranks, redundants_per_rank=n_copies
        )
        quotas = {
            "none": metrics.home_quota(loads, self.placement),
            "eplb": metrics.even_quota(loads, self.placement),
            "lplb": solve(loads, self.r2o, placement=self.placement).quota,
        }
        self.imbalance = {
            name: float(metrics.rank_loads(quota, n_ranks).max()) * n_ranks / loads.sum()
            for name, quota in quotas.items()
        }

    def _normal(self, seed: int, shape: tuple[int, ...], scale: float) -> jax.Array:
        make = jax.jit(
            lambda key: (scale * jax.random.normal(key, shape)).astype(jnp.bfloat16),
            out_shardings=NamedSharding(self.mesh, P("ep")),
        )
        return make(jax.random.key(seed))

    def experts(self, name: str) -> moe.Experts:
        """The same weights for all; with copies, followed by room for them."""
        n_local, hidden, width = self.sizes
        n_slots = self.mesh.size * (n_local + (self.n_copies if name != "none" else 0))
        own = moe.Experts(
            self._normal(2, (self.mesh.size * n_local, hidden, 2 * width), hidden**-0.5),
            self._normal(3, (self.mesh.size * n_local, width, hidden), width**-0.5),
        )
        if name == "none":
            return own
        room = jax.jit(
            jax.shard_map(
                lambda a: jnp.pad(a, [(0, self.n_copies), (0, 0), (0, 0)]),
                mesh=self.mesh, in_specs=P("ep"), out_specs=P("ep"),
            )
        )  # fmt: skip
        experts = jax.tree.map(room, own)
        assert len(experts.down) == n_slots
        return experts

    def layer(self, name: str, tokens: jax.Array, gates: jax.Array, experts: Any, ids: Any) -> Any:
        """One rank's forward pass: output, and what is left of it."""
        out, traffic, experts = moe.moe_layer(
            tokens, ids, gates, experts, self.r2o, placement=self.placement, axis_name="ep",
            balance=name, capacity_factor=self.key(name)[1], in_place=True,
        )  # fmt: skip
        return out, (experts, traffic)

    def key(self, name: str) -> tuple[str, float, int]:
        """What a step is compiled for: its kind, room over the mean load, and copies."""
        # A little more for eplb, where every source splits its tokens on its own.
        slack = 1.002 if name == "eplb" else 1 + 1e-6
        return name, max(1.0, slack * self.imbalance[name]), self.n_copies

    def compile(self, name: str) -> Any:
        """Compiles forward and backward; the experts' buffers come back with fresh copies."""

        def step(tokens: Any, gates: Any, experts: Any, ids: Any, upstream: Any) -> Any:
            out, pull, (experts, traffic) = jax.vjp(
                lambda *floats: self.layer(name, *floats, ids),
                tokens, gates, experts, has_aux=True,
            )  # fmt: skip
            # In a model, what comes back depends on what went out.
            out, upstream = jax.lax.optimization_barrier((out, upstream))
            slopes = pull(upstream)
            # The experts come first: XLA reuses the donated buffers for the first that fit.
            return experts, slopes, out, traffic

        run = jax.shard_map(
            step, mesh=self.mesh, in_specs=P("ep"), out_specs=(P("ep"), P("ep"), P("ep"), P())
        )
        shapes = jax.eval_shape(lambda: self.experts(name))
        shapes = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(
                s.shape, s.dtype, sharding=NamedSharding(self.mesh, P("ep"))
            ),
            shapes,
        )
        lowered = jax.jit(run, donate_argnums=2, compiler_options=moe.COMPILER_OPTIONS).lower(
            self.tokens, self.gates, shapes, self.ids, self.upstream
        )
        return lowered.compile()

    def run(self, name: str, experts: moe.Experts) -> Any:
        return self.steps[name](self.tokens, self.gates, experts, self.ids, self.upstream)

    def check(self) -> None:
        """All three give the same results, and nothing overflows."""
        want = None
        for name in self.names:
            _, slopes, out, traffic = self.run(name, self.experts(name))
            assert int(traffic.overflow) == 0, name
            assert not np.any(traffic.status), name
            *others, of_experts = slopes
            got = out, *others, *map(self.own, of_experts)
            want = want or got
            assert all(map(close, got, want)), name

    def own(self, of_slots: jax.Array) -> jax.Array:
        """Of the gradients of all slots, those of the ranks' own experts."""
        by_rank = of_slots.reshape(self.mesh.size, -1, *of_slots.shape[1:])
        return by_rank[:, : self.sizes[0]]

    def gib(self, name: str) -> float:
        """Arguments, results and temporaries of a step on one GPU."""
        memory = self.steps[name].memory_analysis()
        return (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        ) / 2**30


def measure(turns: list[Case], repeats: int, calls: int = 8) -> dict[str, Any]:
    """Medians of interleaved repeats of a few steps in a row, and their means over the turns."""
    for case in turns:
        case.check()
    experts = {(case, name): case.experts(name) for case in turns for name in case.names}
    times: dict[Any, list[float]] = {key: [] for key in experts}
    for _ in range(repeats):
        for case, name in experts:
            start = time.perf_counter()
            for _ in range(calls):
                experts[case, name], *_ = case.run(name, experts[case, name])
            jax.block_until_ready(experts[case, name])
            times[case, name].append((time.perf_counter() - start) / calls * 1e3)
    case, result = turns[0], {}
    for name in case.names:
        of_turns = [float(np.median(times[turn, name])) for turn in turns]
        ms = float(np.mean(of_turns))
        gain, possible = result.get("none", {"ms": ms})["ms"] / ms, case.imbalance["none"]
        result[name] = {
            "imbalance": case.imbalance[name],
            "copies": case.n_copies if name != "none" else 0,
            "ms": ms,
            "ms_of_turns": of_turns,
            "gain": gain,
            "share": (gain - 1) / (possible - 1),
            "gib": case.gib(name),
        }
        turns_ms = " and ".join(f"{value:.2f}" for value in of_turns)
        print(
            f"{name}: imbalance {case.imbalance[name]:.3f}, {result[name]['copies']} copies, "
            f"{ms:.2f} ms ({turns_ms}), gain {gain:.3f} ({result[name]['share']:.0%} of the "
            f"possible), {result[name]['gib']:.2f} GiB",
            flush=True,
        )
    return result


@jax.jit
def close(got: jax.Array, want: jax.Array) -> jax.Array:
    """Equal up to bfloat16's rounding of sums in another order."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return jnp.sqrt(((got - want) ** 2).sum() / (want**2).sum()) < 1e-2


def rebalance_time(mesh: Mesh, r2o: np.ndarray, case: Case, n_layers: int = 50) -> float:
    """ms of one `rebalance`, the exchange of loads included: of many layers in one program."""

    def rank(ids: jax.Array) -> jax.Array:
        def layer(shift: jax.Array, _: Any) -> Any:
            assigned, split = rebalance(
                (ids + shift) % case.placement.n_logical, None, r2o, placement=case.placement,
                axis_name="ep", positions=True,
            )  # fmt: skip
            return split.max_load[0] % 2 + shift, assigned.position[0, 0]

        return jax.lax.scan(layer, jnp.int32(0), None, length=n_layers)[1]

    run = jax.jit(jax.shard_map(rank, mesh=mesh, in_specs=P("ep"), out_specs=P("ep")))
    return median_seconds(run, case.ids, repeats=10) * 1e3 / n_layers


def forward_time(case: Case, repeats: int) -> float:
    """ms of the layer's forward pass with "lplb", copies in place."""
    run = jax.jit(
        jax.shard_map(
            lambda *arguments: case.layer("lplb", *arguments)[0],
            mesh=case.mesh, in_specs=P("ep"), out_specs=P("ep"),
        ),
        compiler_options=moe.COMPILER_OPTIONS,
    )  # fmt: skip
    arguments = case.tokens, case.gates, case.experts("lplb"), case.ids
    four = median_seconds(lambda: [run(*arguments) for _ in range(4)], repeats=repeats)
    return four * 1e3 / 4


if __name__ == "__main__":
    main()
