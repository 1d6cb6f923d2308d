"""Finds regressions: compares the JSON of a benchmark's run with the committed one.

    python benchmarks/compare.py benchmarks/results/balancer_h200.json new.json [--tolerance 0.15]

Times and memory may exceed the committed ones by the tolerance. Exits with 1 where one does or is
missing, and with 2 where the files are of different GPUs, which do not compare.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

# Paths of what is better where it is smaller, in the JSON of balancer.py, solver.py, load_sync.py,
# moe_layer.py, any_placement.py.
SMALLER = re.compile(
    r"[^:]+/\d+|jit_per_layer(_alone)?|argsort|rebalance|microseconds:.*|kernels:.*"
    r"|results:.*:(ms|gib)|.*:(exact|ipm[^:]*):(mean|p50)|[^:]+/(traces|families|step):mean"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("committed")
    parser.add_argument("new")
    parser.add_argument("--tolerance", type=float, default=0.15, help="a share of the committed")
    options = parser.parse_args()
    committed, new = (read(path) for path in (options.committed, options.new))
    if device(committed) != device(new):
        print(f"not comparable: {device(committed)} and {device(new)}")
        sys.exit(2)
    worse = regressions(committed, new, options.tolerance)
    print("\n".join(worse) or f"no figure is more than {options.tolerance:.0%} above the committed")
    sys.exit(1 if worse else 0)


def read(path: str) -> dict[str, Any]:
    with open(path) as file:
        return json.load(file)


def device(figures: dict[str, Any]) -> str:
    """What the figures were measured on, without versions."""
    return str(figures.get("device") or figures.get("machine")).split(", jax")[0]


def regressions(committed: dict[str, Any], new: dict[str, Any], tolerance: float) -> list[str]:
    """A line for every figure that is missing or too large."""
    expected, got = dict(figures(committed)), dict(figures(new))
    if not expected:
        return ["no figures to compare"]
    lines = []
    for name, before in expected.items():
        after = got.get(name)
        if after is None:
            lines.append(f"{name}: {before:.3f}, now missing")
        elif not after <= before * (1 + tolerance):  # NaN, too.
            lines.append(f"{name}: {before:.3f}, now {after:.3f} ({after / before - 1:+.0%})")
    return lines


def figures(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, float]]:
    """The figures that are better where they are smaller, by their paths."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from figures(value, (*path, key))
    elif isinstance(tree, list):
        for i, value in enumerate(tree):
            yield from figures(value, (*path, str(i)))
    elif isinstance(tree, int | float) and SMALLER.fullmatch(":".join(path)):
        yield ":".join(path), float(tree)


if __name__ == "__main__":
    main()
