"""The command `lplb-jax`."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import lplb_jax
from lplb_jax import _cost, demo, topologies
from lplb_jax._models import MODELS
from lplb_jax._progress import Bar
from lplb_jax.data import AUX_LOSSES

TOPOLOGIES = tuple(topologies.named(demo.EP_SIZE))

# Flags of arguments that are named differently.
FLAGS = {
    "redundants_per_rank": "--redundants",
    "workload": "WORKLOAD",
    "ep_size": "--ranks",
    "n_nodes": "--nodes",
    "n_logical": "--experts",
    "most_layers": "--layers",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    Args:
      arguments: those after the program's name; None for the process's own.

    Returns:
      0, or 1 if a result was wrong.

    Raises:
      SystemExit: with status 2 if the arguments are wrong or a file cannot be read or written,
        0 after --help or --version.

    >>> from lplb_jax.cli import main
    >>> main(["--version"])
    Traceback (most recent call last):
    ...
    SystemExit: 0
    """
    parser = argparse.ArgumentParser(prog="lplb-jax", description=lplb_jax.__doc__)
    parser.add_argument("--version", action="version", version=f"lplb_jax {lplb_jax.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_advise(commands)
    options = vars(parser.parse_args(arguments))
    command: argparse.ArgumentParser = options.pop("command")
    run = options.pop("run")
    try:
        return run(**options)
    except BrokenPipeError:  # The reader has closed it; Python must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, RuntimeError, OSError) as error:
        command.error(_with_flags(error, options))


def advise(*, json: bool, picture: str, memory_budget: float | None, **options: Any) -> int:
    """Prints the result of `lplb_jax.advise` and draws it.

    Args:
      json: print JSON instead of a table.
      picture: file to write; empty for none.
      memory_budget: in GiB.
      options: of `lplb_jax.advise`.

    Returns:
      0.

    >>> from lplb_jax.cli import main
    >>> main(["advise", "mixtral-8x7b", "--ranks", "8", "--picture", ""])  # doctest: +SKIP
    0
    """
    if picture:
        demo.check_output("picture", picture, demo.PICTURES)
    budget = None if memory_budget is None else memory_budget * 2**30
    bar = Bar("trying placements")
    try:
        advice = lplb_jax.advise(**options, memory_budget=budget, progress=bar)
    finally:
        bar.close()
    print(advice.to_json() if json else advice)
    if not picture:
        return 0
    try:
        advice.draw(picture)
        said = f"\npicture: {picture}"
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        said = "\npicture: none, since matplotlib is missing; get it with: pip install matplotlib"
    if not json:
        print(said)
    return 0


def _with_flags(error: Exception, options: dict[str, Any]) -> str:
    """The error's message with flags for argument names; raises a ValueError that names none."""
    name, _, text = str(error).partition(": ")
    if isinstance(error, OSError) and error.filename is not None:
        name = next((name for name in options if options[name] == error.filename), "")
        text = f"{error.strerror}: {error.filename!r}"
    if name in options:
        sizes = re.compile(rf"\b({'|'.join(options)})(?= =)")
        return f"argument {_flag(name)}: {sizes.sub(lambda found: _flag(found[0]), text)}"
    if isinstance(error, ValueError):
        raise error
    return str(error)


def _flag(name: str) -> str:
    return FLAGS.get(name, "--" + name.replace("_", "-"))


def _add_demo(commands: Any) -> None:
    """The command `demo`, whose options are the arguments of `demo.demonstrate`."""
    command = commands.add_parser(
        "demo",
        help="balance the routing of a real model over 8 ranks and check every result",
        description="Balances the packaged routing of a small language model over 8 "
        "expert-parallel ranks: on 8 GPUs if available, otherwise on 8 virtual CPU devices. The "
        "copies are along a topology, on any ranks, or chosen for the batch. Prints a table, "
        "writes a picture, and exits with status 1 if any result misses the bound, 2 if it could "
        "not run.",
    )
    command.add_argument(
        "--aux-loss",
        choices=AUX_LOSSES,
        help=f"weight of the balancing loss the model was trained with (default: {AUX_LOSSES[0]})",
    )
    command.add_argument(
        "--traces",
        metavar="PATH",
        help="an .npz file with your own routing, see lplb_jax.data.read_traces",
    )
    command.add_argument(
        "--topology",
        choices=TOPOLOGIES,
        help="which rank copies from which (default: cube, or ring if that does not fit)",
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
        help="file for the picture; the ending sets the format; empty for none "
        "(default: %(default)s)",
    )
    command.set_defaults(command=command, run=demo.demonstrate)


def _add_advise(commands: Any) -> None:
    """The command `advise`, whose options are the arguments of `lplb_jax.advise`."""
    command = commands.add_parser(
        "advise",
        help="recommend a placement and a number of copies for a workload",
        description="Tries placements and numbers of redundant slots on loads or router choices of "
        "your own, or on synthetic ones of a published model; prints a table, a recommendation and "
        "the Python for it, and writes a picture. Exits with status 2 if it cannot.",
    )
    command.add_argument(
        "workload",
        metavar="WORKLOAD",
        help="an .npz file with `loads` [layers, batches, n_experts] or `indices` [layers, tokens, "
        f"top_k], see lplb_jax.advise; or a model, one of {', '.join(MODELS)}",
    )
    count = at_least(1)
    command.add_argument(
        "--ranks", dest="ep_size", type=count, required=True, metavar="N", help="number of GPUs"
    )
    _add_sizes(command)
    command.add_argument(
        "--redundants",
        type=_counts,
        metavar="N,N,…",
        help="redundant slots per rank to try (default: 1,2,4,8, if they fit)",
    )
    command.add_argument(
        "--topology",
        choices=tuple(topologies.NAMED),
        help="try only this one (default: all that fit)",
    )
    command.add_argument(
        "--inference", action="store_true", help="forward only; copies stay in place"
    )
    _add_rates(command)
    command.add_argument(
        "--layers",
        dest="most_layers",
        type=count,
        default=4,
        metavar="N",
        help="layers to consider, evenly spaced (default: %(default)s)",
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.add_argument(
        "--picture",
        default="lplb_jax_advice.png",
        metavar="PATH",
        help="file for the picture; empty for none (default: %(default)s)",
    )
    command.set_defaults(command=command, run=advise)


def _add_sizes(command: argparse.ArgumentParser) -> None:
    """The workload's sizes, and the memory that copies may take."""
    count = at_least(1)
    positive = at_least(0, float)
    for flag, name, kind, metavar, text in (
        ("--nodes", "n_nodes", count, "N", "nodes, with equally many ranks each (default: 1)"),
        ("--experts", "n_logical", count, "N", "experts, for indices (default: largest id + 1)"),
        ("--top-k", "top_k", count, "K", "experts per token, for loads (default: 1)"),
        ("--tokens-per-rank", "tokens_per_rank", count, "N", "tokens per rank and batch"),
        ("--hidden", "hidden", count, "N", "size of a token; with --width, times are estimated"),
        ("--width", "width", count, "N", "inner width of an expert"),
        (
            "--bytes-per-expert",
            "bytes_per_expert",
            positive,
            "N",
            "weights of an expert (default: 16-bit floats)",
        ),
        (
            "--memory-budget",
            "memory_budget",
            positive,
            "GIB",
            "per rank, for the copies of all layers",
        ),
    ):
        default = 1 if name == "n_nodes" else None
        command.add_argument(
            flag, dest=name, type=kind, metavar=metavar, default=default, help=text
        )


def _add_rates(command: argparse.ArgumentParser) -> None:
    """The hardware's rates, for estimates of times."""
    for name, default, text in (
        ("flops", _cost.FLOPS, "floating-point operations per second of the GEMMs"),
        ("link", _cost.LINK, "bytes per second between ranks of a node"),
        ("node_link", _cost.NODE_LINK, "bytes per second and rank between nodes"),
        ("memory_rate", _cost.MEMORY, "bytes per second for reading weights"),
    ):
        measured = "" if name == "node_link" else ", measured on H200s"
        command.add_argument(
            _flag(name),
            type=at_least(0, float),
            default=default,
            metavar="X",
            help=f"{text} (default: {default:g}{measured})",
        )


def _counts(text: str) -> list[int]:
    """The type of an option: a list of whole numbers of at least 1."""
    return [at_least(1)(part) for part in text.split(",")]


def at_least(least: int, kind: type = int) -> Callable[[str], Any]:
    """The type of an option: a finite number of type `kind`, at least `least`.

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


if __name__ == "__main__":
    sys.exit(main())
