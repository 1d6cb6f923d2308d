"""Trains one model with each kind of balance: its loss, the balance of ranks, and its speed.

    python benchmarks/training.py --json out.json         # on all GPUs, or 8 virtual CPU devices
    python benchmarks/training.py -- --hidden 256 …       # options of examples/train_moe.py

The model, the batches and the seed are those of examples/train_moe.py. The trainings alternate step
by step, so that other work on the machine affects all of them alike. On virtual devices all ranks
share the same cores, and an even load saves no time.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import record

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent / "examples"))
import train_moe

BALANCES = ("none", "eplb", "lplb", "batch")
KEYS = ("bits_per_byte", "imbalance_after", "tokens_per_second")
COMPILING = 2  # steps that are not timed


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--every", type=int, default=2, help="steps whose mean is written")
    parser.add_argument(
        "--capacity-factors", type=float, nargs=len(BALANCES), metavar="F",
        help=f"of {', '.join(BALANCES)}: a GEMM's time is that of the whole buffer",
    )  # fmt: skip
    parser.add_argument("--json")
    parser.add_argument("options", nargs="*", help="of examples/train_moe.py, after --")
    args = parser.parse_args()
    options = train_moe.command_line().parse_args(args.options)
    mesh = train_moe.make_mesh(options.ranks)
    train_moe.check(options, mesh.size)
    text = train_moe.read(options.text, options.context)

    trainings = {}
    factors = args.capacity_factors or len(BALANCES) * [options.capacity_factor]
    for balance, options.capacity_factor in zip(BALANCES, factors, strict=True):
        options.balance = balance
        trainings[balance] = train_moe.Training(options, mesh)
    batches = train_moe.sample(text, options.batch, options.context, options.seed)
    steps: dict[str, list[dict[str, Any]]] = {balance: [] for balance in BALANCES}
    for step in range(options.steps):
        batch = next(batches)
        for balance, training in trainings.items():
            steps[balance].append(training.step(batch))
            if balance not in ("none", "batch") and (step + 1) % options.refresh == 0:
                training.place()
        if step % 10 == 0:
            last = {balance: done[-1] for balance, done in steps.items()}
            print(step, *(f"{one['bits_per_byte']:.4f} {one['imbalance_after']:.3f}"
                          for one in last.values()), flush=True)  # fmt: skip

    curves = {balance: of_steps(done, args.every) for balance, done in steps.items()}
    for balance, done in steps.items():
        times = [one["tokens_per_second"] for one in done[COMPILING:]]
        curves[balance]["tokens_per_second"] = float(np.median(times).round())
        curves[balance]["overflow"] = sum(one["overflow"] for one in done)
    if args.json:
        kind = jax.devices()[0].device_kind if jax.default_backend() == "gpu" else "virtual CPU"
        record.write(
            args.json,
            {
                "device": kind,
                "ranks": mesh.size,
                "options": args.options,
                "capacity_factors": dict(zip(BALANCES, factors, strict=True)),
                "every": args.every,
                "results": curves,
            },
        )


def of_steps(done: list[dict[str, Any]], every: int) -> dict[str, Any]:
    """Means over every `every` steps."""
    kept = len(done) // every * every
    return {
        key: np.array([one[key] for one in done[:kept]])
        .reshape(-1, every)
        .mean(1)
        .round(5)
        .tolist()
        for key in KEYS[:2]
    }


if __name__ == "__main__":
    main()
