"""Trains a byte-level mixture-of-experts language model, and shows the effect of balancing.

    python examples/train_moe.py                     # on all GPUs, or 8 virtual CPU devices
    python examples/train_moe.py --balance none      # the same mathematics, different loads
    python examples/train_moe.py --balance any       # copies of any experts on any ranks
    python examples/train_moe.py --balance batch     # copies chosen in every step, nothing moves
    python examples/train_moe.py --help

It learns from text files, by default the Python sources of the standard library. Every --refresh
steps, `lplb_jax.refresh` decides from recent loads whether to place experts anew; their weights and
optimizer state then move with them. With copies chosen in every step, experts stay in place. The
output is a log (JSON lines), a picture and, with --traces, the router's decisions for
`lplb-jax demo --traces`.
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
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import model
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from lplb_jax import LoadHistory, Placement, metrics, moe, place_experts, refresh, topologies
from lplb_jax.cli import at_least
from lplb_jax.demo import PICTURES, check_output, choose_topology, find_devices

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs the program; returns the records of its log."""
    parser = command_line()
    options = parser.parse_args(arguments)
    mesh = make_mesh(options.ranks)
    try:
        check(options, mesh.size)
        text = read(options.text, options.context)
    except ValueError as error:
        parser.error(f"argument {error}")
    except OSError as error:
        parser.error(f"argument text: {error.strerror}: {error.filename}")
    batches = sample(text, options.batch, options.context, options.seed)
    training = Training(options, mesh)
    records = []
    with open(options.log, "w") as log, tqdm(total=options.steps, unit="step") as bar:
        for step in range(options.steps):
            record = {"step": step, **training.step(next(batches))}
            if (step + 1) % options.refresh == 0 and options.balance != "batch":
                record["refresh"] = training.place()
            records.append(record)
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


def command_line() -> argparse.ArgumentParser:
    """The options; the model's sizes have the names of `model.Config`."""
    parser = argparse.ArgumentParser(
        description=str(__doc__).splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    choices = {
        "balance": ["lplb", "any", "batch", "eplb", "none"],
        "dtype": ["float32", "bfloat16"],
    }
    numbers = {"aux_loss": at_least(0, float), "capacity_factor": at_least(1, float)}
    for field in dataclasses.fields(model.Config):
        kind = at_least(1) if isinstance(field.default, int) else str
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=numbers.get(field.name, kind),
            default=field.default,
            choices=choices.get(field.name),
        )
    count = at_least(1)
    parser.add_argument(
        "--ranks", type=at_least(2), help="None for all GPUs, or else 8 CPU devices"
    )
    parser.add_argument("--redundants", type=count, help="slots per rank, None for one per column")
    parser.add_argument("--batch", type=count, default=16, help="sequences, over all ranks")
    parser.add_argument("--steps", type=count, default=300)
    parser.add_argument(
        "--refresh", type=count, default=20, help="steps between placements, not for batch"
    )
    parser.add_argument("--learning-rate", type=at_least(0, float), default=2e-3)
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--log", default="train_moe.jsonl")
    parser.add_argument("--picture", default="train_moe.png", help="empty for none")
    parser.add_argument("--traces", help="where to write the router's last decisions (.npz)")
    parser.add_argument("text", nargs="*", type=Path, help="None for Python's standard library")
    return parser


def check(options: argparse.Namespace, ranks: int) -> None:
    """Raises `ValueError` with a flag and a reason if options are inconsistent."""
    for flag, value, factor, what in (
        ("--hidden", options.hidden, options.heads, "heads"),
        ("--experts", options.experts, ranks, "ranks"),
        ("--batch", options.batch, ranks, "ranks"),
    ):
        if value % factor:
            raise ValueError(f"{flag}: expected a multiple of the {factor} {what}, got {value}")
    if options.top_k > options.experts:
        raise ValueError(
            f"--top-k: expected at most the {options.experts} experts, got {options.top_k}"
        )
    if options.seed >= 2**32:
        raise ValueError(f"--seed: expected a number below 2³², got {options.seed}")
    try:
        topology(options, ranks)
    except ValueError as error:
        raise ValueError(str(error).replace("redundants_per_rank", "--redundants")) from None
    check_output("--log", options.log)
    if options.picture:
        check_output("--picture", options.picture, PICTURES)
    if options.traces is not None:
        check_output("--traces", options.traces, [".npz"])


def make_mesh(ranks: int | None) -> Mesh:
    """One axis over GPUs if there are enough, otherwise over virtual CPU devices."""
    # JAX refuses it once initialized, but may already have enough devices.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", ranks or 8)
    if ranks is None:
        ranks = jax.device_count() if jax.default_backend() == "gpu" else 8
        ranks = max(ranks, 2)
    return Mesh(np.array(find_devices(ranks)), model.AXIS)


def topology(options: argparse.Namespace, ranks: int) -> tuple[topologies.Topology, int]:
    """The topology, which says whose experts a rank copies, and the number of copies per rank."""
    _, r2o, _ = choose_topology(
        ranks, options.experts // ranks, redundants_per_rank=options.redundants
    )
    return r2o, options.redundants or r2o.shape[1]


def read(paths: list[Path], context: int = 0) -> np.ndarray:
    """The concatenated bytes of all files: uint8 `[bytes]`, more than `context`."""
    paths = paths or sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = np.concatenate([np.frombuffer(path.read_bytes(), np.uint8) for path in paths])
    if len(text) <= context:
        raise ValueError(f"text: expected more than {context} bytes, got {len(text)}")
    return text


def sample(text: np.ndarray, batch: int, context: int, seed: int) -> Iterator[np.ndarray]:
    """An endless stream of random pieces of the text, uint8 `[batch, context + 1]`."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(text) - context, batch)
        yield text[starts[:, None] + np.arange(context + 1)]


class Training:
    """Weights, optimizer state and placements, and the steps that change them."""

    def __init__(self, options: argparse.Namespace, mesh: Mesh) -> None:
        names = [field.name for field in dataclasses.fields(model.Config)]
        self.config = model.Config(**{name: getattr(options, name) for name in names})
        self.mesh = mesh
        self.r2o, self.redundants = topology(options, mesh.size)
        self.tokens_per_step = options.batch * options.context
        # Fresh weights are in the order of expert ids.
        self.placements = self.config.layers * [self._placed(None, self.r2o)]
        self.optimizer = optax.adamw(
            optax.warmup_cosine_decay_schedule(
                0, options.learning_rate, min(20, options.steps // 5), options.steps
            )
        )
        weights = model.init(jax.random.key(options.seed), self.config)
        self.weights = self._spread(weights)
        self.state = self._spread(self.optimizer.init(weights))
        history = LoadHistory.empty(
            n_layers=self.config.layers, n_logical=self.config.experts, n_batches=options.refresh
        )
        self.history = jax.device_put(history, NamedSharding(mesh, P()))
        self.steps_between, self.last_indices = options.refresh, None
        self._step = self._compiled_step()
        if self.config.balance == "any":
            self.move(self.config.layers * [self._placed(None, None)])

    def step(self, text: np.ndarray) -> dict[str, Any]:
        """Learns from one batch, uint8 `[sequences, context + 1]`; returns the log record."""
        start = time.perf_counter()
        text = jax.device_put(text, NamedSharding(self.mesh, P(model.AXIS)))
        self.weights, self.state, self.history, seen = self._step(
            self.weights, self.state, self.history, text, self.placements
        )
        traffic = jax.tree.map(np.asarray, seen["traffic"])  # waits for the step
        seconds = time.perf_counter() - start
        before, after, overflow = [], [], 0
        for of_layer, placement in zip(traffic, self.placements, strict=True):
            home = metrics.home_quota(of_layer.expert_loads, placement)
            home = metrics.rank_loads(home, self.mesh.size)
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

    def place(self) -> str:
        """Places experts anew in layers that benefit from it; returns the decision in words."""
        parameters = 3 * self.config.hidden * self.config.width
        found = refresh(
            self.history,
            jax.tree.map(lambda *layers: np.stack(layers), *self.placements),
            steps=self.steps_between,
            row_s=6 * parameters / 5.5e14,  # measured FLOP/s of an H200
            bytes_per_expert=12 * parameters,  # weights and both moments of Adam, 32-bit floats
        )
        if found.moved.any():
            self.move([jax.tree.map(lambda leaf, i=i: leaf[i], found.placement)
                       for i in range(self.config.layers)])  # fmt: skip
        return found.reason

    def move(self, new: list[Placement]) -> None:
        """Moves the experts' weights and optimizer state to their new placements."""
        self.weights = self._moved(self.weights, new)
        self.state = self._moved(self.state, new)
        self.placements = new

    def write_traces(self, path: str) -> None:
        """Writes the last batch's router decisions, and the loads of the steps until then."""
        indices = np.asarray(self.last_indices).astype(np.uint16)
        history = self.history.batches().sum(axis=1, dtype=np.int32)
        np.savez_compressed(path, indices=indices, history=history)

    def _placed(self, history: np.ndarray | None, r2o: Any) -> Placement:
        return place_experts(
            history,
            r2o,
            n_logical=self.config.experts,
            ep_size=self.mesh.size,
            redundants_per_rank=self.redundants,
        )

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
            functools.partial(model.loss, config=self.config),
            mesh=self.mesh,
            in_specs=(of_weights, P(model.AXIS), P()),
            out_specs=(P(), seen),
        )

        @functools.partial(jax.jit, donate_argnums=(0, 1, 2), compiler_options=moe.COMPILER_OPTIONS)
        def step(
            weights: Any, state: Any, history: LoadHistory, text: Any, placements: Any
        ) -> tuple[Any, Any, LoadHistory, Any]:
            slopes, seen = jax.grad(loss, has_aux=True)(weights, text, placements)
            updates, state = self.optimizer.update(slopes, state, weights)
            loads = [traffic.expert_loads for traffic in seen["traffic"]]
            history = history.update(jnp.stack(loads))
            return optax.apply_updates(weights, updates), state, history, seen

        return step


def report(options: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    """Prints the final figures, and draws the course of the training."""
    last = records[-min(20, len(records)) :]
    keys = ("bits_per_byte", "imbalance_before", "imbalance_after", "tokens_per_second")
    mean = {key: float(np.mean([record[key] for record in last])) for key in keys}
    answers = [record["refresh"] for record in records if "refresh" in record]
    moved = sum(not answer.startswith("no") for answer in answers)
    print(f"experts placed anew {moved} of {len(answers)} times; the log says why")
    print(
        f"{options.balance}: {mean['bits_per_byte']:.3f} bits per byte, busiest rank "
        f"{mean['imbalance_before']:.3f} → {mean['imbalance_after']:.3f} times the mean, "
        f"{mean['tokens_per_second']:,.0f} tokens/s (means of the last {len(last)} steps)"
    )
    overflow = sum(record["overflow"] for record in records)
    print(f"{overflow:,} rows found no room" + (": raise --capacity-factor" if overflow else ""))
    print(f"log: {options.log}")
    if options.picture:
        draw(options, records).savefig(options.picture, dpi=150)
        print(f"picture: {options.picture}")


def draw(options: argparse.Namespace, records: list[dict[str, Any]]) -> Figure:
    """Two plots, one above the other: the loss, and the busiest rank's load."""
    from matplotlib.figure import Figure

    steps = [record["step"] for record in records]
    few = "." if len(steps) < 20 else None  # a single step has no visible line
    figure = Figure(figsize=(7, 6), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)
    top.plot(steps, [record["bits_per_byte"] for record in records], color="black", marker=few)
    top.set_ylabel("bits per byte")
    top.set_title("What it has learnt", loc="left")
    # Labels are beside the frame: the upper curve's above its end, the lower curve's below.
    lines = [
        ("imbalance_before", "tab:red", "without copies", "bottom", 1),
        ("imbalance_after", "tab:blue", f"with {options.balance}", "top", -1),
    ]
    for key, color, label, va, up in lines[: 1 if options.balance == "none" else 2]:
        curve = [record[key] for record in records]
        bottom.plot(steps, curve, color=color, marker=few)
        bottom.annotate(
            label, (1, float(np.mean(curve[-20:]))), xycoords=bottom.get_yaxis_transform(),
            xytext=(6, up), textcoords="offset points", color=color, va=va, annotation_clip=False,
        )  # fmt: skip
    title = "Load, mean over layers"
    if options.balance != "batch":
        title += "; gray: placed anew, dotted: not worth it"
        for record in records[:-1]:
            if "refresh" in record:
                style = ":" if record["refresh"].startswith("no") else "-"
                at = record["step"] + 1
                bottom.axvline(at, color="lightgray", linewidth=1, linestyle=style, zorder=0)
    bottom.axhline(1, color="gray", linewidth=1)
    bottom.set_ylabel("busiest rank's tokens / mean")
    bottom.set_title(title, loc="left")
    bottom.set_xlabel("step")
    bottom.set_xlim(-0.5, steps[-1] + 0.5)
    bottom.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    return figure


if __name__ == "__main__":
    main()
