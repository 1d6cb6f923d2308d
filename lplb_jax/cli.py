"""The command `lplb-jax`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

import lplb_jax
from lplb_jax import demo, topologies
from lplb_jax.data import AUX_LOSSES

TOPOLOGIES = tuple(topologies.named(demo.EP_SIZE))

# Of arguments of `demo.demonstrate` whose flag is not their name.
FLAGS = {"aux_loss": "--aux-loss", "redundants_per_rank": "--redundants"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    Args:
      arguments: those after the program's name; None for the process's own.

    Returns:
      0, or 1 where a result was not what it must be.

    Raises:
      SystemExit: with status 2 where the arguments are wrong or a file cannot be read or written,
        0 after --help or --version.

    >>> from lplb_jax.cli import main
    >>> main(["--version"])
    Traceback (most recent call last):
    ...
    SystemExit: 0
    """
    parser, command = _parsers()
    options = vars(parser.parse_args(arguments))
    del options["command"]
    try:
        return demo.demonstrate(**options)
    except (ValueError, RuntimeError, OSError) as error:
        command.error(_with_flags(error, options))


def _with_flags(error: Exception, options: dict[str, Any]) -> str:
    """What is wrong, by the names that the command line has; raises what is no user's fault."""
    name, _, text = str(error).partition(": ")
    if isinstance(error, OSError) and error.filename is not None:
        name = next((name for name in options if options[name] == error.filename), "")
        text = f"{error.strerror}: {error.filename!r}"
    if name in options:
        return f"argument {FLAGS.get(name, f'--{name}')}: {text}"
    if isinstance(error, ValueError):
        raise error
    return str(error)


def _parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The command line, and that of its one command; names as `demo.demonstrate` has them."""
    parser = argparse.ArgumentParser(prog="lplb-jax", description=lplb_jax.__doc__)
    parser.add_argument("--version", action="version", version=f"lplb_jax {lplb_jax.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser(
        "demo",
        help="balance the routing of a real model over 8 ranks, and check every result",
        description="Balances the packaged routing of a small language model over 8 "
        "expert-parallel ranks: on 8 GPUs if there are as many, else on 8 virtual CPU devices. It "
        "does so on copies along a topology, and on as many of any experts on any ranks. Prints a "
        "table, writes a picture, and exits with status 1 if any result misses the bound, 2 if it "
        "could not run.",
    )
    command.add_argument(
        "--aux-loss",
        choices=AUX_LOSSES,
        help=f"weight of the balancing loss the model was trained with (default: {AUX_LOSSES[0]})",
    )
    command.add_argument(
        "--traces",
        metavar="PATH",
        help="an .npz file with routing of your own instead, see lplb_jax.data.read_traces",
    )
    command.add_argument(
        "--topology",
        choices=TOPOLOGIES,
        help="who holds copies of whose experts (default: cube, or ring where it does not fit)",
    )
    command.add_argument(
        FLAGS["redundants_per_rank"],
        dest="redundants_per_rank",
        type=at_least(1),
        metavar="N",
        help="redundant slots per rank, a multiple of the topology's columns (default: two each)",
    )
    command.add_argument(
        "--repeats",
        type=at_least(1),
        default=30,
        metavar="N",
        help="timed calls per layer (default: %(default)s)",
    )
    command.add_argument(
        "--picture",
        default="lplb_jax_demo.png",
        metavar="PATH",
        help="where to write the picture; its ending is the format, empty is none "
        "(default: %(default)s)",
    )
    return parser, command


def at_least(least: int, kind: type = int) -> Callable[[str], Any]:
    """Type of an option that is a finite number, in `kind`, of at least `least`.

    >>> from lplb_jax.cli import at_least
    >>> at_least(1)("30"), at_least(0, float)("2e-3")
    (30, 0.002)
    """
    what = "whole number" if kind is int else "number"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a {what} of at least {least}, got {text!r}")
        return value

    return parse
