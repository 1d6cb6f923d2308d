"""Trains a byte-level mixture-of-experts language model, and shows what balance does to it.

    python examples/train_moe.py                     # on all GPUs, or 8 virtual CPU devices
    python examples/train_moe.py --balance none      # the same mathematics, another load
    python examples/train_moe.py --help

It learns from text files, by default the Python sources of the standard library. Every --refresh
steps the experts are placed anew from the loads just seen, and their weights and the optimiser's
state move with them. Out come a log (JSON lines), a picture, and, with --traces, the router's
decisions for `lplb-jax demo --traces`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import model
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from lplb_jax import Placement, metrics, moe, place_experts, topologies
from lplb_jax.demo import find_devices


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs the program; returns the records of its log."""
    options = parse(arguments)
    mesh = make_mesh(options.ranks)
    if options.batch % mesh.size:
        raise SystemExit(f"--batch: expected a multiple of {mesh.size} ranks, got {options.batch}")
    training = Training(options, mesh)
    batches = sample(read(options.text), options.batch, options.context, options.seed)
    records = []
    with open(options.log, "w") as log, tqdm(total=options.steps, unit="step") as bar:
        for step in range(options.steps):
            record = training.step(next(batches))
            if (step + 1) % options.refresh == 0:
                training.place()
            records.append({"step": step, **record})
            log.write(json.dumps(records[-1]) + "\n")
            bar.set_postfix(
                bits=f"{record['bits_per_byte']:.3f}",
                busiest=f"{record['imbalance_before']:.2f}→{record['imbalance_after']:.2f}",
                overflow=record["overflow"],
            )
            bar.update()
    report(options, records)
    if options.traces:
        training.write_traces(options.traces)
    return records


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; the model's sizes have the names of `model.Config`."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for field in dataclasses.fields(model.Config):
        choices = {"balance": ["lplb", "eplb", "none"], "dtype": ["float32", "bfloat16"]}
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=type(field.default),
            default=field.default,
            choices=choices.get(field.name),
        )
    parser.add_argument("--ranks", type=int, help="None for all GPUs, or else 8 CPU devices")
    parser.add_argument("--redundants", type=int, help="slots per rank, None for one per column")
    parser.add_argument("--batch", type=int, default=16, help="sequences, over all ranks")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--refresh", type=int, default=20, help="steps between placements")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", default="train_moe.jsonl")
    parser.add_argument("--picture", default="train_moe.png", help="empty for none")
    parser.add_argument("--traces", help="where to write the router's last decisions (.npz)")
    parser.add_argument("text", nargs="*", type=Path, help="None for Python's standard library")
    return parser.parse_args(arguments)


def make_mesh(ranks: int | None) -> Mesh:
    """One axis over GPUs where there are enough, else over virtual CPU devices."""
    # Refused once JAX has been started; what it has may be enough.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", ranks or 8)
    if ranks is None:
        ranks = jax.device_count() if jax.default_backend() == "gpu" else 8
        ranks = max(ranks, 2)
    return Mesh(np.array(find_devices(ranks)), model.AXIS)


def topology(ranks: int) -> np.ndarray:
    """Who holds copies of whose experts."""
    return topologies.cube() if ranks == 8 else topologies.ring(ranks)


def read(paths: list[Path]) -> np.ndarray:
    """The bytes of all files, one after the other: uint8 `[bytes]`."""
    paths = paths or sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return np.concatenate([np.frombuffer(path.read_bytes(), np.uint8) for path in paths])


def sample(text: np.ndarray, batch: int, context: int, seed: int) -> Iterator[np.ndarray]:
    """Random pieces of the text, uint8 `[batch, context + 1]`, forever."""
    if len(text) <= context:
        raise SystemExit(f"text: expected more than {context} bytes, got {len(text)}")
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(text) - context, batch)
        yield text[starts[:, None] + np.arange(context + 1)]


class Training:
    """Weights, optimiser and placements, and the steps that change them."""

    def __init__(self, options: argparse.Namespace, mesh: Mesh) -> None:
        names = [field.name for field in dataclasses.fields(model.Config)]
        self.config = model.Config(**{name: getattr(options, name) for name in names})
        self.mesh, self.r2o = mesh, topology(mesh.size)
        self.redundants = options.redundants or self.r2o.shape[1]
        self.tokens_per_step = options.batch * options.context
        self.placements = self._placed(None)
        self.optimizer = optax.adamw(
            optax.warmup_cosine_decay_schedule(
                0, options.learning_rate, min(20, options.steps // 5), options.steps
            )
        )
        weights = model.init(jax.random.key(options.seed), self.config)
        self.weights = self._spread(weights)
        self.state = self._spread(self.optimizer.init(weights))
        self.loads = np.zeros((self.config.layers, self.config.experts), np.int64)
        self.last_loads, self.last_indices = self.loads, None
        self._step = self._compiled_step()

    def step(self, text: np.ndarray) -> dict[str, Any]:
        """Learns from one batch, uint8 `[sequences, context + 1]`; returns what to log."""
        start = time.perf_counter()
        text = jax.device_put(text, NamedSharding(self.mesh, P(model.AXIS)))
        self.weights, self.state, seen = self._step(self.weights, self.state, text, self.placements)
        traffic = jax.tree.map(np.asarray, seen["traffic"])  # waits for the step
        seconds = time.perf_counter() - start
        before, after, overflow = [], [], 0
        for layer, (of_layer, placement) in enumerate(zip(traffic, self.placements, strict=True)):
            loads = np.zeros(self.config.experts, np.int32)
            np.add.at(loads, placement.phy2log, of_layer.slot_loads)
            self.loads[layer] += loads
            home = metrics.rank_loads(metrics.home_quota(loads, placement), self.mesh.size)
            received = metrics.rank_loads(of_layer.slot_loads, self.mesh.size)
            before.append(float(metrics.imbalance(home)))
            after.append(float(metrics.imbalance(received)))
            overflow += int(of_layer.overflow)
        self.last_indices = seen["indices"]
        return {
            "bits_per_byte": float(seen["nats"]) / np.log(2),
            "imbalance_before": float(np.mean(before)),
            "imbalance_after": float(np.mean(after)),
            "overflow": overflow,
            "tokens_per_second": self.tokens_per_step / seconds,
        }

    def place(self) -> None:
        """Places the experts by the loads since the last time, and moves what belongs to them."""
        new = self._placed(self.loads)
        self.weights = self._moved(self.weights, new)
        self.state = self._moved(self.state, new)
        self.placements, self.last_loads = new, self.loads
        self.loads = np.zeros_like(self.loads)

    def write_traces(self, path: str) -> None:
        """The last batch's router decisions, and loads of steps before it."""
        history = self.last_loads if self.last_loads.any() else self.loads
        indices = np.asarray(self.last_indices).astype(np.uint16)
        np.savez_compressed(path, indices=indices, history=history.astype(np.int32))

    def _placed(self, history: np.ndarray | None) -> list[Placement]:
        place = functools.partial(
            place_experts,
            r2o=self.r2o,
            n_logical=self.config.experts,
            ep_size=self.mesh.size,
            redundants_per_rank=self.redundants,
        )
        rows = [None] * self.config.layers if history is None else history
        return [place(row) for row in rows]

    def _moved(self, tree: Any, new: list[Placement]) -> Any:
        def move(path: tuple[Any, ...], array: jax.Array) -> jax.Array:
            if not model.is_expert(path):
                return array
            layer = path[path.index(jax.tree_util.DictKey("blocks")) + 1].idx
            return moe.move_experts(array, self.placements[layer], new[layer])

        return jax.tree_util.tree_map_with_path(move, tree)

    def _spread(self, tree: Any) -> Any:
        shardings = jax.tree.map(
            functools.partial(NamedSharding, self.mesh), model.specs(tree),
            is_leaf=lambda leaf: isinstance(leaf, P),
        )  # fmt: skip
        return jax.device_put(tree, shardings)

    def _compiled_step(self) -> Any:
        of_weights = model.specs(self.weights)
        seen = {"nats": P(), "traffic": P(), "indices": P(None, model.AXIS)}
        loss = jax.shard_map(
            lambda *arguments: model.loss(*arguments, self.r2o, self.config),
            mesh=self.mesh,
            in_specs=(of_weights, P(model.AXIS), P()),
            out_specs=(P(), seen),
        )

        @functools.partial(jax.jit, donate_argnums=(0, 1), compiler_options=moe.COMPILER_OPTIONS)
        def step(weights: Any, state: Any, text: Any, placements: Any) -> tuple[Any, Any, Any]:
            slopes, seen = jax.grad(loss, has_aux=True)(weights, text, placements)
            updates, state = self.optimizer.update(slopes, state, weights)
            return optax.apply_updates(weights, updates), state, seen

        return step


def report(options: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    """Says how it ended, and draws how it went."""
    last = records[-min(20, len(records)) :]
    mean = {key: float(np.mean([record[key] for record in last])) for key in last[0]}
    print(
        f"{options.balance}: {mean['bits_per_byte']:.3f} bits per byte, busiest rank "
        f"{mean['imbalance_before']:.3f} → {mean['imbalance_after']:.3f} times the mean, "
        f"{mean['tokens_per_second']:,.0f} tokens/s (means of the last {len(last)} steps)"
    )
    overflow = sum(record["overflow"] for record in records)
    print(f"{overflow:,} rows found no room" + (": raise --capacity-factor" if overflow else ""))
    print(f"log: {options.log}")
    if options.picture:
        draw(options, records)
        print(f"picture: {options.picture}")


def draw(options: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    """Two curves over one another: what is learnt, and how loaded the busiest rank is."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    steps = [record["step"] for record in records]
    figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(7, 6), layout="constrained")
    top.plot(steps, [record["bits_per_byte"] for record in records], color="black")
    top.set_ylabel("bits per byte")
    top.set_title("What it has learnt", loc="left")
    lines = [
        ("imbalance_before", "tab:red", "without copies"),
        ("imbalance_after", "tab:blue", f"with {options.balance}"),
    ]
    for key, color, label in lines[: 1 if options.balance == "none" else 2]:
        curve = [record[key] for record in records]
        bottom.plot(steps, curve, color=color)
        bottom.annotate(
            label, (steps[-1], np.mean(curve[-20:])), (6, 0), textcoords="offset points",
            color=color, va="center", annotation_clip=False,
        )  # fmt: skip
    for step in range(options.refresh, options.steps, options.refresh):
        bottom.axvline(step, color="lightgray", linewidth=1, zorder=0)
    bottom.axhline(1, color="gray", linewidth=1)
    bottom.set_ylabel("busiest rank's tokens / mean")
    bottom.set_title("Load, mean over layers; experts placed anew at the gray lines", loc="left")
    bottom.set_xlabel("step")
    figure.savefig(options.picture, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
