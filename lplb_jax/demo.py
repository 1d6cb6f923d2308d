"""The demonstration: real routing through `rebalance` on 8 ranks, every result checked.

Each layer is balanced three times, with equally many slots: on copies along a topology, on copies
on any ranks, and on copies chosen for the batch.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.extend.backend
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lplb_jax import (
    Comm,
    Placement,
    init_comm,
    metrics,
    place_copies,
    place_experts,
    rebalance,
    solve,
    topologies,
    verify,
)
from lplb_jax._problem import check_count
from lplb_jax._report import Layer, Run
from lplb_jax.batch_copies import CopiesFrom
from lplb_jax.data import AUX_LOSSES, Traces, load_traces, read_traces

EP_SIZE = 8
MANY_RANKS, FEW_SLOTS = 64, 2  # balanced by `solve` alone, which needs no devices
PICTURES = (".png", ".pdf", ".svg", ".eps", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")


def demonstrate(
    *,
    topology: str | None = None,
    redundants_per_rank: int | None = None,
    aux_loss: str | None = None,
    traces: str | None = None,
    repeats: int = 30,
    picture: str | None = "lplb_jax_demo.png",
) -> int:
    """Runs the demonstration: prints a table, writes a picture, checks every result.

    Args:
      topology: "cube", "ring", "torus" or "complete", see `choose_topology`.
      redundants_per_rank: redundant slots, see `choose_topology`.
      aux_loss: which of the packaged traces, see `lplb_jax.data.load_traces`; None for "1e-3".
      traces: a file with other traces, see `lplb_jax.data.read_traces`; the numbers of tokens and
        experts are multiples of 8.
      repeats: timed calls per layer.
      picture: file to write, with one of the `PICTURES` endings; None or empty for none.

    Returns:
      0, or 1 if a result misses its bound or is otherwise wrong; the output says which.

    Raises:
      OSError: a file cannot be read or written.
      ValueError: the arguments are inconsistent; the message begins with the name of one.
      RuntimeError: JAX is already running with fewer than 8 devices.

    >>> from lplb_jax.demo import demonstrate
    >>> demonstrate(repeats=1, picture=None)  # doctest: +SKIP
    0
    """
    check_count("repeats", repeats)
    if picture:
        check_output("picture", picture, PICTURES)
    indices, history = _routing(aux_loss, traces)
    n_layers, n_tokens, top_k = indices.shape
    n_logical = history.shape[1]
    topology, r2o, redundants_per_rank = choose_topology(
        EP_SIZE,
        n_logical // EP_SIZE,
        topology=topology,
        redundants_per_rank=redundants_per_rank,
    )
    placements = [
        place_experts(
            history,
            along,
            n_logical=n_logical,
            ep_size=EP_SIZE,
            redundants_per_rank=redundants_per_rank,
        )
        for along in (r2o, None)
    ]

    devices = find_devices(EP_SIZE)
    mesh = Mesh(np.array(devices), ("ep",))
    print(f"{EP_SIZE} ranks on {_describe(devices)}, jax {jax.__version__}")
    source = f"balancing loss {aux_loss or AUX_LOSSES[0]}" if traces is None else traces
    print(f"{n_tokens:,} tokens, top-{top_k} of {n_logical} experts, {source}")
    print(f"{topology} topology, {redundants_per_rank} redundant slots per rank", end="")
    when = "step 300, routed at step 1200" if traces is None else "loads before these"
    print(f"; experts placed from {when}\n", flush=True)

    with init_comm(mesh, "ep", max_experts=n_logical) as comm:
        layers = _balance(mesh, comm, indices, placements, topology, repeats)
    _progress("")
    print(table(layers, topology))
    print(_legend(layers, topology, repeats, comm.transport))
    if n_logical % MANY_RANKS == 0:
        print(_on_many_ranks(indices, history))
    faults = [f"layer {i}: {fault}" for i, layer in enumerate(layers) for fault in layer.faults]
    if faults:
        print("\nWRONG RESULTS\n" + "\n".join(faults))
    else:
        print(
            f"All {n_layers} layers reach their lower bounds, counted from the slots the tokens "
            f"were sent to."
        )
    if picture:
        _write_picture(picture, layers, topology)
    return 1 if faults else 0


def find_devices(n: int) -> list[Any]:
    """`n` GPUs if available, otherwise `n` virtual CPU devices. Call it before JAX is used.

    Args:
      n: number of devices.

    Returns:
      `n` devices of one kind, of the default backend.

    Raises:
      RuntimeError: JAX is already running with fewer CPU devices.

    >>> from lplb_jax.demo import find_devices
    >>> len(find_devices(1))
    1
    """
    # Raises once JAX runs, which may have enough devices already.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", max(n, jax.config.jax_num_cpu_devices))  # pyright: ignore[reportAttributeAccessIssue]
    devices = jax.devices()
    if devices[0].platform == "gpu" and len(devices) >= n:
        return devices[:n]
    if devices[0].platform != "cpu":
        # The default backend selects the native code, so it has to be the CPU.
        jax.config.update("jax_platforms", "cpu")
        jax.extend.backend.clear_backends()
        devices = jax.devices()
    if len(devices) < n:
        raise RuntimeError(
            f"expected {n} devices, got {len(devices)}: JAX was started before; set "
            f'jax.config.update("jax_num_cpu_devices", {n}) right after importing it'
        )
    return devices[:n]


def choose_topology(
    n_ranks: int,
    n_local: int,
    *,
    topology: str | None = None,
    redundants_per_rank: int | None = None,
) -> tuple[str, topologies.Topology, int]:
    """A topology and a number of redundant slots that fit each other and the experts.

    Args:
      n_ranks: ranks of a group, at least 2.
      n_local: experts of a rank.
      topology: a name in `topologies.named(n_ranks)`. None for the cube if it exists and fits,
        otherwise the ring.
      redundants_per_rank: redundant slots, a multiple of the topology's columns and at most
        `n_local`. None for two per column, or one if `n_local` is too small for two.

    Returns:
      `(topology, r2o, redundants_per_rank)`.

    Raises:
      ValueError: none fits; the message begins with the name of the argument to change.

    >>> from lplb_jax.demo import choose_topology
    >>> choose_topology(8, 4)[::2], choose_topology(8, 1)[::2]
    (('cube', 4), ('ring', 1))
    """
    named = topologies.named(n_ranks)
    if topology is not None and topology not in named:
        raise ValueError(f"topology: expected one of {', '.join(named)}, got {topology!r}")
    problems = []
    for name in [topology] if topology else [name for name in ("cube", "ring") if name in named]:
        r2o, slots = named[name], redundants_per_rank
        n_columns = r2o.shape[1]
        if n_columns > n_local:
            problems.append(
                f"topology: expected one with at most as many columns as a rank has experts, "
                f"{n_local}, got {name} with {n_columns}"
            )
            continue
        if slots is None:
            slots = n_columns * (2 if 2 * n_columns <= n_local else 1)
        if 1 <= slots <= n_local and slots % n_columns == 0:
            return name, r2o, slots
        problems.append(
            f"redundants_per_rank: expected a multiple of the columns of the {name}, {n_columns}, "
            f"and at most the experts of a rank, {n_local}, got {slots}"
        )
    raise ValueError(problems[-1])


def check_output(name: str, path: str, endings: Sequence[str] = ()) -> None:
    """Raises `ValueError` if `path` cannot be written, before the work that ends with writing it.

    Args:
      name: the argument's name, for the message.
      path: a file, which may exist already.
      endings: allowed endings of its name, in lower case; none for any.

    >>> from lplb_jax.demo import check_output
    >>> check_output("picture", "loads", (".png", ".pdf"))
    Traceback (most recent call last):
    ...
    ValueError: picture: expected a file name that ends in .png or .pdf, got 'loads'
    """
    file = Path(path)
    if endings and file.suffix.lower() not in endings:
        expected = " or ".join(filter(None, [", ".join(endings[:-1]), endings[-1]]))
        raise ValueError(f"{name}: expected a file name that ends in {expected}, got {path!r}")
    if not file.parent.is_dir():
        raise ValueError(f"{name}: expected a file in a folder that exists, got {path!r}")
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ValueError(f"{name}: expected a file that can be written, got {path!r}")


def table(layers: list[Layer], topology: str) -> str:
    """The results as text, at most 100 columns wide.

    >>> from lplb_jax.demo import Layer, Run, table
    >>> loads = np.array([30, 10]), np.array([25, 15]), np.array([20, 20])
    >>> runs = [Run(name, loads[2], 20, 1, 10, 1e-3, []) for name in ("ring", "any", "batch")]
    >>> print(table([Layer(*loads[:2], tuple(runs))], "ring"))
           busiest rank's tokens / mean              tokens moved              ms per call
    layer   none   even     ring    any  batch      ring      any    batch     ring    any  batch
        0  1.500  1.250    1.000  1.000  1.000        10       10       10     1.00   1.00   1.00
    """
    widths = 5, 7, 7, 9, 7, 7, 10, 9, 9, 9, 7, 7
    runs = topology, "any", "batch"

    def line(*cells: Any) -> str:
        return "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))

    lines = [
        f"       busiest rank's tokens / mean{'tokens moved':>26}{'ms per call':>25}{'':>7}",
        line("layer", "none", "even", *3 * runs),
    ]
    for i, layer in enumerate(layers):
        lines.append(
            line(
                i,
                *(f"{load:.3f}" for load in layer.busiest),
                *(f"{run.moved:,}" for run in layer.runs),
                *(f"{1e3 * run.seconds:.2f}" for run in layer.runs),
            )
        )
    return "\n".join(line.rstrip() for line in lines)


def _routing(aux_loss: str | None, traces: str | None) -> Traces:
    """The packaged traces or those of a file, whose tokens and experts divide evenly by ranks."""
    if traces is None:
        return load_traces(AUX_LOSSES[0] if aux_loss is None else aux_loss)
    if aux_loss is not None:
        raise ValueError(
            f"aux_loss: expected None, not a packaged trace's, with traces = {traces!r}, got "
            f"{aux_loss!r}"
        )
    try:
        read = read_traces(traces)
    except ValueError as error:
        raise ValueError(str(error).replace("path", "traces", 1)) from None
    for what, n in (("tokens", read.indices.shape[1]), ("experts", read.history.shape[1])):
        if n % EP_SIZE:
            raise ValueError(
                f"traces: expected a multiple of {EP_SIZE} {what}, one share per rank, got {n} in "
                f"{traces}"
            )
    return read


def _legend(layers: list[Layer], topology: str, repeats: int, transport: str) -> str:
    """What the table's columns mean."""
    return (
        f"\nnone: no replicas; even: along the {topology}, tokens of an expert halved; any: copies "
        f"of any expert\non any rank; batch: copies chosen for these tokens. On all ranks there "
        f"are {_copies(layers)}."
        f"\nms: median of {repeats} calls after a warm-up; one call is rebalance() on all "
        f"{EP_SIZE} ranks\n(count, sync by {transport}, solve, assign) as one jitted "
        f"shard_map, until every result is ready."
    )


def _copies(layers: list[Layer]) -> str:
    """The fewest and most copies of each kind of placement in a layer."""
    numbers = zip(*([run.n_copies for run in layer.runs] for layer in layers), strict=True)
    spans = [sorted({min(of_layers), max(of_layers)}) for of_layers in numbers]
    return ", ".join(" to ".join(map(str, span)) for span in spans) + " copies"


def _on_many_ranks(indices: np.ndarray, history: np.ndarray) -> str:
    """The busiest of many ranks over the mean load, computed by `solve` alone."""
    sizes = {"n_logical": history.shape[1], "ep_size": MANY_RANKS}
    packed = place_experts(history, **sizes, redundants_per_rank=0, method="eplb")
    placed = place_experts(history, **sizes, redundants_per_rank=FEW_SLOTS)

    def busiest(layer: int) -> list[float]:
        loads = np.bincount(indices[layer].ravel(), minlength=history.shape[1]).astype(np.int32)
        static = _layer(placed, layer)
        placements = _layer(packed, layer), static, place_copies(loads, static)
        splits = [solve(loads, placement=placement) for placement in placements]
        return [float(split.max_load[0]) / loads.sum() * MANY_RANKS for split in splits]

    rows = [busiest(layer) for layer in range(len(indices))]
    none, anywhere, batch = np.mean(rows, axis=0)
    return (
        f"\n{MANY_RANKS} ranks, {FEW_SLOTS} redundant slots, by solve(), mean of all layers: "
        f"none {none:.3f}, any {anywhere:.3f}, batch {batch:.3f}"
    )


def _describe(devices: list[Any]) -> str:
    if devices[0].platform == "cpu":
        return f"{len(devices)} virtual CPU devices ({len(os.sched_getaffinity(0))} cores)"
    return f"{len(devices)} × {devices[0].device_kind}"


def _progress(text: str) -> None:
    """Shows a status line that the next one replaces; only on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _compile(
    mesh: Mesh, comm: Comm, indices: np.ndarray, placement: Placement, copies: CopiesFrom
) -> jax.stages.Compiled:
    """rebalance() as one program for all ranks and all placements."""
    specs = (P("ep"), P()) if copies == "placement" else (P("ep"), P(), P())

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("ep"), P()), out_specs=specs)
    def step(indices: jax.Array, placement: Placement) -> tuple[Any, ...]:
        return rebalance(
            indices, None, placement=placement, axis_name="ep", comm=comm, copies=copies
        )

    # Compiled ahead of time, so a layer that needed another program would fail.
    return step.lower(*_put(mesh, indices, placement)).compile()


def _put(mesh: Mesh, indices: np.ndarray, placement: Placement) -> tuple[jax.Array, Placement]:
    """Shards the tokens over the ranks and replicates the placement."""
    return (
        jax.device_put(indices, NamedSharding(mesh, P("ep"))),
        jax.device_put(placement, NamedSharding(mesh, P())),
    )


def _balance(
    mesh: Mesh,
    comm: Comm,
    indices: np.ndarray,
    placements: Sequence[Placement],
    topology: str,
    repeats: int,
) -> list[Layer]:
    """Balances every layer along the topology, on any placement, and with copies of the batch."""
    along, anywhere = placements
    kinds: list[tuple[Placement, str, CopiesFrom]] = [
        (along, topology, "placement"),
        (anywhere, "any placement", "placement"),
        (anywhere, "batch", "batch"),
    ]
    runs = [[*_run_layers(mesh, comm, indices, kind[0], repeats, *kind[1:])] for kind in kinds]
    layers = []
    for i, of_layer in enumerate(zip(*runs, strict=True)):
        loads = np.bincount(indices[i].ravel(), minlength=along.n_logical)
        placement = _layer(along, i)
        quotas = metrics.home_quota(loads, placement), metrics.even_quota(loads, placement)
        home, even = map(_loads_of_ranks, quotas)
        layers.append(Layer(home, even, of_layer))
    return layers


def _run_layers(
    mesh: Mesh,
    comm: Comm,
    indices: np.ndarray,
    stacked: Placement,
    repeats: int,
    name: str,
    copies: CopiesFrom,
) -> Iterator[Run]:
    """Runs every layer with its placement; one program serves all."""
    _progress(f"{name}: compiling one step for all layers")
    step = _compile(mesh, comm, indices[0], _layer(stacked, 0), copies)
    for i, chosen in enumerate(indices):
        _progress(f"{name}, layer {i + 1} of {len(indices)}: {repeats} timed calls")
        yield _run_layer(step, mesh, chosen, _layer(stacked, i), repeats, name)


def _layer(stacked: Placement, i: int) -> Placement:
    return jax.tree.map(lambda array: array[i], stacked)


def _loads_of_ranks(quota: jax.Array | np.ndarray) -> np.ndarray:
    return np.asarray(metrics.rank_loads(quota, EP_SIZE))


def _run_layer(
    step: jax.stages.Compiled,
    mesh: Mesh,
    indices: np.ndarray,
    placement: Placement,
    repeats: int,
    name: str,
) -> Run:
    arguments = _put(mesh, indices, placement)
    physical, split, *chosen = jax.block_until_ready(step(*arguments))  # also the warm-up
    if chosen:
        placement = jax.tree.map(np.asarray, chosen[0])
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(step(*arguments))
        seconds.append(time.perf_counter() - start)

    physical, split = np.asarray(physical), jax.tree.map(np.asarray, split)
    in_range = physical[(physical >= 0) & (physical < placement.n_physical)]
    counted = np.bincount(in_range, minlength=placement.n_physical)
    return Run(
        name,
        _loads_of_ranks(counted),
        lower_bound=int(split.lower_bound[0]),
        n_copies=int((placement.phy2log >= 0).sum()) - placement.n_logical,
        moved=int(metrics.tokens_moved(counted, placement)),
        seconds=statistics.median(seconds),
        faults=verify(None, split, placement=placement, indices=indices, physical_indices=physical),
    )


def _write_picture(path: str, layers: list[Layer], topology: str) -> None:
    try:
        from lplb_jax._picture import draw
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        print("picture: none, since matplotlib is missing; get it with: pip install matplotlib")
        return
    draw(layers, topology).savefig(path)
    print(f"picture: {path}")
