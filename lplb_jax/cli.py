"""The command `lplb-jax`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import lplb_jax
from lplb_jax import demo
from lplb_jax.data import AUX_LOSSES

# Those of 8 ranks: the demonstration's expert-parallel size.
TOPOLOGIES = ("cube", "ring", "torus", "complete")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    Args:
      arguments: those after the program's name; None for the process's own.

    Returns:
      0, or 1 where a result was not what it must be.

    Raises:
      SystemExit: with status 2 where the arguments are wrong, 0 after --help or --version.

    >>> from lplb_jax.cli import main
    >>> main(["--version"])
    Traceback (most recent call last):
    ...
    SystemExit: 0
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return demo.demonstrate(
            topology=options.topology,
            redundants_per_rank=options.redundants,
            aux_loss=options.aux_loss,
            traces=options.traces,
            repeats=options.repeats,
            picture=options.picture,
        )
    except (ValueError, RuntimeError, OSError) as error:
        parser.exit(1, f"lplb-jax {options.command}: {error}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lplb-jax", description=lplb_jax.__doc__)
    parser.add_argument("--version", action="version", version=f"lplb_jax {lplb_jax.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser(
        "demo",
        help="balance the routing of a real model over 8 ranks, and check every result",
        description="Balances the packaged routing of a small language model over 8 "
        "expert-parallel ranks: on 8 GPUs if there are as many, else on 8 virtual CPU devices. "
        "Prints a table, writes a picture, and exits with status 1 if any result misses the bound.",
    )
    command.add_argument(
        "--aux-loss",
        choices=AUX_LOSSES,
        default=AUX_LOSSES[0],
        help="weight of the balancing loss the model was trained with (default: %(default)s)",
    )
    command.add_argument(
        "--traces",
        metavar="PATH",
        help="routing of your own instead, see lplb_jax.data.read_traces",
    )
    command.add_argument(
        "--topology",
        choices=TOPOLOGIES,
        default=TOPOLOGIES[0],
        help="who holds copies of whose experts (default: %(default)s)",
    )
    command.add_argument(
        "--redundants",
        type=_at_least_one,
        metavar="N",
        help="redundant slots per rank, a multiple of the topology's columns (default: two each)",
    )
    command.add_argument(
        "--repeats",
        type=_at_least_one,
        default=30,
        metavar="N",
        help="timed calls per layer (default: %(default)s)",
    )
    command.add_argument(
        "--picture",
        default="lplb_jax_demo.png",
        metavar="PATH",
        help="where to write the picture; its ending is the format (default: %(default)s)",
    )
    return parser


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)
