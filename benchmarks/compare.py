"""Finds regressions: compares the JSON of a benchmark run with the committed JSON.

    python benchmarks/compare.py benchmarks/results/balancer_h200.json new.json [--tolerance 0.15]
    python benchmarks/compare.py benchmarks/results build/benchmarks   # every file of a folder

Times and memory may exceed the committed figures by the tolerance. Exits with 1 if one exceeds it
or is missing, and with 2 if the files come from different GPUs, whose times are not comparable. In
a folder, files without a committed counterpart are listed and skipped.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

# Paths of the figures for which smaller is better, in the JSON of balancer.py, solver.py,
# load_sync.py, exchange.py, moe_layer.py and any_placement.py.
SMALLER = re.compile(
    r"[^:]+/\d+|jit_per_layer(_alone)?|argsort|rebalance|microseconds:.*|kernels:.*"
    r"|.*:(ms|gib)|xla, ms:.*|.*:(exact|ipm[^:]*):(mean|p50)"
    r"|[^:]+/(traces|families|step)[^:]*:mean"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("committed", type=pathlib.Path, help="a file, or a folder of them")
    parser.add_argument("new", type=pathlib.Path, help="likewise")
    parser.add_argument("--tolerance", type=float, default=0.15, help="a share of the committed")
    options = parser.parse_args()
    pairs = [(options.committed, options.new)]
    if options.new.is_dir():
        pairs = [(options.committed / new.name, new) for new in sorted(options.new.glob("*.json"))]
    sys.exit(max([compare(*pair, options.tolerance) for pair in pairs], default=1))


def compare(committed_path: pathlib.Path, new_path: pathlib.Path, tolerance: float) -> int:
    """Prints the regressions; returns the exit status for these two files."""
    if not committed_path.exists():
        print(f"{new_path.name}: no committed figures")
        return 0
    committed, new = read(committed_path), read(new_path)
    if device(committed) != device(new):
        print(f"{new_path.name}: not comparable: {device(committed)} and {device(new)}")
        return 2
    worse = regressions(committed, new, tolerance)
    good = [f"no figure is more than {tolerance:.0%} above the committed"]
    print("\n".join(f"{new_path.name}: {line}" for line in worse or good))
    return 1 if worse else 0


def read(path: str | pathlib.Path) -> dict[str, Any]:
    return json.loads(pathlib.Path(path).read_text())


def device(figures: dict[str, Any]) -> str:
    """The device that the figures were measured on, without versions."""
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
        elif not after <= before * (1 + tolerance):  # Includes NaN.
            lines.append(f"{name}: {before:.3f}, now {after:.3f} ({after / before - 1:+.0%})")
    return lines


def figures(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, float]]:
    """The figures for which smaller is better, by path.

    Elements of lists are identified by "case", so that runs with other cases stay comparable.
    """
    if isinstance(tree, list):
        tree = {case_of(element, i): element for i, element in enumerate(tree)}
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from figures(value, (*path, key))
    elif isinstance(tree, int | float) and SMALLER.fullmatch(":".join(path)):
        yield ":".join(path), float(tree)


def case_of(element: Any, index: int) -> str:
    return str(element.get("case", index)) if isinstance(element, dict) else str(index)


if __name__ == "__main__":
    main()
