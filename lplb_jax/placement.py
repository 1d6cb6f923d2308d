"""Where the experts are: logical experts, physical slots, and the host-side packing of EPLB."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

import jax
import jax.core
import numpy as np

from lplb_jax import _host, _tables, topologies
from lplb_jax._eplb import eplb, pack
from lplb_jax._keep import keep
from lplb_jax._portfolio import Sizes, Table, best_table
from lplb_jax.topologies import Topology

# The arrays of a placement in a checkpoint; with a topology also r2o.
_ARRAYS = "phy2log", "log2phy", "logcnt", "ep_size", "n_nodes"
Method = Literal["auto", "eplb"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["phy2log", "log2phy", "logcnt"],
    meta_fields=["ep_size", "topology", "n_nodes"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """Which logical expert each physical slot holds; a pytree, so a new one needs no recompilation.

    Slots are numbered rank by rank: rank `p // (n_physical / ep_size)` hosts slot p. Along a
    topology, on each rank its own logical experts come first, then its redundant slots; redundant
    slot j·D + d is a copy of local expert j·D + d of rank `r2o[·, d]`. Without one, any slot may
    hold any expert, see `from_phy2log`. Leading axes (layers) may be added to all arrays for
    `vmap`.

    Attributes:
      phy2log: int32 `[n_physical]`, the logical expert in each slot; −1 if a slot is empty,
        which only a placement without a topology allows.
      log2phy: int32 `[n_logical, max_replicas]`, the slots of each expert, its home first, padded
        with −1.
      logcnt: int32 `[n_logical]`, slots per expert, at least 1.
      ep_size: ranks of the expert-parallel axis (static).
      topology: the `Topology` along which the redundant slots copy, or None (static). Functions
        with an argument `r2o` use it if `r2o` is None. If both are None, all ranks are one group
        and an expert's tokens may go to any of its slots.
      n_nodes: nodes, each with `ep_size / n_nodes` consecutive ranks (static).

    Raises:
      TypeError, ValueError: `ep_size`, `topology` or `n_nodes` is not as above. The arrays are
        checked where they are used: JAX rebuilds placements with other leaves.
    """

    phy2log: Any
    log2phy: Any
    logcnt: Any
    ep_size: int
    topology: Topology | None = None
    n_nodes: int = 1

    def __post_init__(self) -> None:
        check_nodes(self.ep_size, self.n_nodes)
        if self.topology is not None and not isinstance(self.topology, Topology):
            raise TypeError(
                f"topology: expected a Topology or None, got {type(self.topology).__name__}; "
                f"convert with lplb_jax.topologies.validate"
            )

    def __eq__(self, other: object) -> bool:
        """Whether arrays and static fields are equal, on the host."""
        if not isinstance(other, Placement):
            return NotImplemented
        (mine, static), (theirs, other_static) = jax.tree.flatten(self), jax.tree.flatten(other)
        return static == other_static and all(map(np.array_equal, mine, theirs))

    @property
    def n_logical(self) -> int:
        """Logical experts."""
        return self.log2phy.shape[-2]

    @property
    def n_physical(self) -> int:
        """Physical slots over all ranks."""
        return self.phy2log.shape[-1]

    @property
    def redundants_per_rank(self) -> int:
        """Redundant slots of each rank, along a topology."""
        return (self.n_physical - self.n_logical) // self.ep_size

    @classmethod
    def from_phy2log(
        cls, phy2log: Any, *, ep_size: int, n_logical: int | None = None, n_nodes: int = 1
    ) -> Placement:
        """A placement of any kind: any number of copies of an expert, on any ranks.

        One slot of every expert becomes its home, so that the numbers of homes on the ranks are as
        even as the table allows. If an expert has two slots on a rank, only the first is used.

        Args:
          phy2log: integers, the logical expert in each slot, −1 for an empty slot:
            `[ep_size, slots_per_rank]`, or flat, `[n_physical]`, or with one placement per
            layer `[layers, ep_size, slots_per_rank]`; EPLB's tables `[layers, n_physical]` are
            reshaped to `(layers, ep_size, -1)`. An unsigned type's largest value is an empty slot,
            too, unless it is an id. May be traced; then the values are checked when they are used,
            and an inconsistent table sets `Status.BAD_PLACEMENT`.
          ep_size: ranks; n_physical is a multiple of it.
          n_logical: experts, at most n_physical; it need not be a multiple of ep_size. None: the
            largest id + 1 (not if phy2log is traced).
          n_nodes: nodes with `ep_size / n_nodes` consecutive ranks each: a token that cannot stay
            on its rank stays on its node if it can.

        Returns:
          A `Placement` without topology, with log2phy `[n_logical, n_physical − n_logical + 1]`: an
          expert's home, its first slots on other ranks in the order of the ranks, further slots on
          ranks that have one already. NumPy arrays unless phy2log is traced.

        Raises:
          TypeError, ValueError: an argument is not as above, an id is out of range or an expert has
            no slot; the message names the first one.

        >>> placement = Placement.from_phy2log([[0, 1, 2], [0, 3, -1]], ep_size=2)
        >>> placement.log2phy[:, :2].tolist()
        [[3, 0], [1, -1], [2, -1], [4, -1]]
        """
        check_nodes(ep_size, n_nodes)
        tables, n_logical = _tables.check_phy2log(phy2log, int(ep_size), n_logical)
        if isinstance(tables, np.ndarray) and np.ndim(phy2log) == 2:
            _tables.warn_of_layers(tables.reshape(int(ep_size), -1), n_logical)
        log2phy, logcnt = _tables.other_tables(tables, int(ep_size), n_logical)
        return cls(tables, log2phy, logcnt, int(ep_size), None, int(n_nodes))

    def to_arrays(self) -> dict[str, Any]:
        """All fields as NumPy arrays by name, including the static ones: for a checkpoint.

        A checkpoint restored without a target is a dict of arrays, without static fields.

        Returns:
          phy2log, log2phy and logcnt; ep_size and n_nodes, int32 scalars; with a topology also r2o,
          int32 `[group_size, n_columns]`.

        >>> arrays = Placement.from_phy2log([[0, 1], [1, 0]], ep_size=2).to_arrays()
        >>> list(arrays), Placement.from_arrays(arrays).ep_size
        (['phy2log', 'log2phy', 'logcnt', 'ep_size', 'n_nodes'], 2)
        """
        tables = jax.device_get((self.phy2log, self.log2phy, self.logcnt))
        values = *tables, self.ep_size, self.n_nodes
        arrays: dict[str, Any] = dict(
            zip(_ARRAYS, (np.asarray(value, np.int32) for value in values), strict=True)
        )
        return arrays if self.topology is None else arrays | {"r2o": np.array(self.topology)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> Placement:
        """The placement that `to_arrays` was called on.

        Args:
          arrays: its result, in any order; NumPy or JAX arrays.

        Raises:
          ValueError: a name is missing or unknown, or the arrays' shapes are inconsistent.
        """
        if not set(_ARRAYS) <= set(arrays) <= {*_ARRAYS, "r2o"}:
            raise ValueError(
                f"arrays: expected {', '.join(_ARRAYS)} and maybe r2o, got "
                f"{', '.join(map(str, arrays)) or 'none'}"
            )
        host = {name: np.asarray(array) for name, array in jax.device_get(dict(arrays)).items()}
        tables = phy2log, log2phy, logcnt = [host[name] for name in _ARRAYS[:3]]
        ndim = phy2log.ndim
        if ndim < 1 or (log2phy.ndim, logcnt.shape) != (ndim + 1, log2phy.shape[:-1]):
            shapes = ", ".join(str(list(table.shape)) for table in tables)
            raise ValueError(
                f"arrays: expected phy2log [n_physical], log2phy [n_logical, max_replicas] and "
                f"logcnt [n_logical], maybe all with layers before, got {shapes}"
            )
        topology = Topology(host["r2o"]) if "r2o" in host else None
        return cls(phy2log, log2phy, logcnt, int(host["ep_size"]), topology, int(host["n_nodes"]))


def place_experts(
    history: Any,
    r2o: Any = None,
    *,
    n_logical: int,
    ep_size: int,
    redundants_per_rank: int | None = None,
    n_physical: int | None = None,
    n_nodes: int = 1,
    n_groups: int = 1,
    method: Method = "auto",
    previous: Placement | None = None,
) -> Placement:
    """Places experts on ranks from past loads, on the host.

    Along a topology `r2o`, experts are packed onto groups (tokens cannot leave their group), then
    onto the nodes of a group, then onto ranks, to even out the loads. This is EPLB's hierarchical
    packing without its replication: heaviest expert first, each onto the lightest pack with room.
    If nodes hold several groups, groups are packed onto nodes in the same way. The experts of a
    rank are sorted by load, and the heaviest `redundants_per_rank` are replicated along `r2o`.

    Without `r2o`, an expert may have any number of copies on any ranks, and each rank is the home
    of equally many experts. Method "auto" constructs several candidates (EPLB's numbers of copies,
    second copies for many experts, links between distant ranks, topologies that fit). It chooses
    the one with the smallest largest rank load, balanced exactly, averaged over the history's
    batches and perturbations of them. Copies stay on their expert's node if that costs nothing.
    Method "eplb" places experts like EPLB's `rebalance_experts`: each redundant slot goes to the
    expert with the most load per copy, and the copies are packed onto ranks. If `n_groups` is a
    multiple of `n_nodes`, groups of consecutive experts are packed onto nodes first, and no copy
    leaves its node. Homes are then as even as the table allows, which often is not even enough for
    the own experts of `moe.moe_layer`.

    With `previous`, the current placement, few experts and copies move. Step by step a copy is
    replaced or two experts are swapped, until the largest rank load, balanced exactly, is within
    1 % of that of a new placement, and within 5 % on similar loads. If that takes too many steps,
    homes stay and all copies are placed again. If that is not enough, everything is placed again,
    with ranks numbered so that they keep as much as possible. Along `r2o`, experts are swapped or
    everything is placed again. Without `r2o`, experts that stay on a rank keep their slot.
    `metrics.experts_fetched` and `homes_moved` count what moves.

    Args:
      history: loads `[n_logical]`, or `[layers, n_logical]` for a placement per layer, or
        `[layers, batches, n_logical]`, of which `r2o` and method "eplb" take the sum over batches;
        finite and not negative, any unit and real dtype. None keeps the given order along `r2o`,
        and means equal loads without `r2o`.
      r2o: topology `[group_size, n_columns]`, see `lplb_jax.topologies`, or None.
      n_logical: experts; with `r2o` a multiple of `ep_size`.
      ep_size: ranks; with `r2o` a multiple of `group_size`, groups are consecutive ranks.
      redundants_per_rank: redundant slots of each rank. With `r2o` a multiple of `n_columns`, at
        most `n_logical / ep_size`; without `r2o` at least 0, in addition to
        ⌈n_logical / ep_size⌉ slots.
      n_physical: the number of all slots, instead of `redundants_per_rank` and only without `r2o`;
        a multiple of `ep_size`, at least `n_logical`.
      n_nodes: nodes with `ep_size / n_nodes` consecutive ranks each.
      n_groups: groups of experts for method "eplb", a divisor of `n_logical`.
      method: "auto" or "eplb"; with `r2o` only "auto".
      previous: the current placement, with the same numbers of experts, ranks and slots, stacked by
        layer if and only if `history` is, in NumPy or JAX arrays; with `r2o`, a placement along
        it. Not for method "eplb".

    Returns:
      A `Placement` of NumPy arrays, with a layer axis if `history` has one. It carries `r2o`;
      without `r2o` it is like the result of `Placement.from_phy2log`.

    Raises:
      TypeError, ValueError: an argument is not as above; the message names it.

    Source: DeepSeek EPLB, LPLB (replicas along a topology).

    >>> placement = place_experts(
    ...     [5, 1, 9, 1], topologies.ring(2), n_logical=4, ep_size=2, redundants_per_rank=1
    ... )
    >>> placement.phy2log.tolist()  # rank 0: experts 2 and 3 and a copy of 0, rank 1: 0, 1 and 2
    [2, 3, 0, 0, 1, 2]
    >>> eplb = place_experts(
    ...     [5, 1, 9, 1], n_logical=4, ep_size=2, redundants_per_rank=1, method="eplb"
    ... )
    >>> eplb.phy2log.tolist()
    [2, 0, 1, 2, 0, 3]
    >>> later = place_experts(
    ...     [5, 2, 9, 1], n_logical=4, ep_size=2, redundants_per_rank=1, previous=eplb
    ... )
    >>> later == eplb
    True
    """
    check_nodes(ep_size, n_nodes)
    if r2o is None:
        slots_per_rank = _slots_per_rank(n_logical, ep_size, redundants_per_rank, n_physical)
        _check_method(method, n_logical, n_groups)
        loads = np.ones(n_logical) if history is None else _loads_of(history, n_logical)
        sizes = Sizes(int(n_logical), int(ep_size), slots_per_rank, int(n_nodes))
        if method == "eplb":
            if previous is not None:
                raise ValueError("previous: expected None with method 'eplb', which ignores it")
            place = functools.partial(_place_as_eplb, sizes=sizes, n_groups=n_groups)
        else:
            place = functools.partial(_place_anywhere, sizes=sizes)
        return _each_layer(place, loads, _kept(previous, loads, sizes, None))
    for name, given, default in (
        ("n_physical", n_physical, None),
        ("n_groups", n_groups, 1),
        ("method", method, "auto"),
    ):
        if given != default:
            raise ValueError(f"{name}: expected {default!r} with r2o, got {given!r}")
    topology = topologies.validate(r2o)
    slots_per_rank = _slots_along(topology, n_logical, ep_size, redundants_per_rank)
    sizes = Sizes(int(n_logical), int(ep_size), slots_per_rank, int(n_nodes))
    if history is None and previous is None:
        return _along_topology(np.arange(n_logical), topology, sizes)
    loads = np.ones(n_logical) if history is None else _loads_of(history, n_logical)
    if loads.ndim == 3:
        loads = loads.sum(axis=1)
    place = functools.partial(_place_along, sizes=sizes, topology=topology)
    return _each_layer(place, loads, _kept(previous, loads, sizes, topology))


def _place_along(
    loads: np.ndarray, previous: Placement | None, sizes: Sizes, topology: Topology
) -> Placement:
    """The placement along a topology for loads `[n_logical]`."""
    order = _pack_ranks(loads, sizes.ep_size, topology.group_size, sizes.n_nodes)
    fresh = _along_topology(order, topology, sizes)
    if previous is None:
        return fresh
    batches = np.atleast_2d(loads if loads.any() else np.ones_like(loads))
    table = keep(_table_of(previous), _table_of(fresh), batches, sizes, along=True)
    own = table.phy2log.reshape(sizes.ep_size, -1)[:, : sizes.n_logical // sizes.ep_size]
    return _along_topology(own.ravel(), topology, sizes)


def _place_as_eplb(
    loads: np.ndarray, _: Placement | None, sizes: Sizes, n_groups: int
) -> Placement:
    """EPLB's placement for loads `[n_logical]` or `[batches, n_logical]`."""
    n_logical, ep_size, slots_per_rank, n_nodes = sizes
    total = np.atleast_2d(loads).sum(axis=0)
    table = eplb(total, ep_size, slots_per_rank, n_groups, n_nodes)
    flat = table.ravel()
    return Placement.from_phy2log(flat, ep_size=ep_size, n_logical=n_logical, n_nodes=n_nodes)


def _place_anywhere(loads: np.ndarray, previous: Placement | None, sizes: Sizes) -> Placement:
    """The placement without topology for loads `[n_logical]` or `[batches, n_logical]`."""
    batches = np.atleast_2d(loads)
    if not batches.any():
        batches = np.ones_like(batches)
    table = best_table(batches, sizes, _along_fitting(batches.sum(axis=0), sizes))
    if previous is not None:
        table = keep(_table_of(previous), table, batches, sizes)
    n_logical, ep_size, _, n_nodes = sizes
    log2phy, logcnt = _tables.log2phy_of(np, table.phy2log, table.homes, ep_size, n_logical)
    return Placement(table.phy2log, log2phy, logcnt, ep_size, None, n_nodes)


def _table_of(placement: Placement) -> Table:
    return Table(placement.phy2log, placement.log2phy[:, 0])


def _along_fitting(loads: np.ndarray, sizes: Sizes) -> Iterator[Table]:
    """Placements along topologies with as many columns as fit, of all ranks, of halves, …"""
    n_logical, ep_size, slots_per_rank, n_nodes = sizes
    redundants = slots_per_rank - n_logical // ep_size
    if n_logical % ep_size or not 1 <= redundants <= n_logical // ep_size:
        return
    for n_groups in (1, 2, 4, 8):
        if ep_size % n_groups:
            continue
        topology = _widest_topology(ep_size // n_groups, redundants)
        if topology is not None:
            order = _pack_ranks(loads, ep_size, topology.group_size, n_nodes)
            placement = _along_topology(order, topology, sizes)
            yield _table_of(placement)


@functools.lru_cache(maxsize=64)
def _widest_topology(group_size: int, redundants_per_rank: int) -> Topology | None:
    """The topology with the most columns that divide the redundant slots, or None."""
    named = topologies.named(group_size).values()
    fitting = [topology for topology in named if redundants_per_rank % topology.n_columns == 0]
    return max(fitting, key=lambda topology: topology.n_columns, default=None)


def _each_layer(
    place: Callable[[np.ndarray, Placement | None], Placement],
    loads: np.ndarray,
    previous: Placement | None,
) -> Placement:
    """`place` of `[n_logical]`, or of every element of the first axis, stacked."""
    if loads.ndim == 1:
        return place(loads, previous)
    layers = [
        place(row, None if previous is None else _layer(previous, i)) for i, row in enumerate(loads)
    ]
    return jax.tree.map(lambda *arrays: np.stack(arrays), *layers)


def _layer(stacked: Placement, i: int) -> Placement:
    return jax.tree.map(lambda array: array[i], stacked)


def _kept(
    previous: Any, loads: np.ndarray, sizes: Sizes, topology: Topology | None
) -> Placement | None:
    """`previous` in NumPy arrays; raises if its sizes or its topology do not match."""
    if previous is None:
        return None
    if not isinstance(previous, Placement):
        raise TypeError(
            f"previous: expected a lplb_jax.Placement or None, got {type(previous).__name__}"
        )
    if any(isinstance(array, jax.core.Tracer) for array in jax.tree.leaves(previous)):
        raise TypeError("previous: expected a placement known on the host, got a traced one")
    n_physical = sizes.ep_size * sizes.slots_per_rank
    layers = loads.shape[:1] if loads.ndim > 1 else ()
    expected = (*layers, sizes.n_logical, n_physical, sizes.ep_size)
    given = (
        *previous.phy2log.shape[:-1],
        previous.n_logical,
        previous.n_physical,
        previous.ep_size,
    )
    if given != expected:
        names = ", ".join([*(["layers"] if layers else []), "n_logical, n_physical, ep_size"])
        raise ValueError(f"previous: expected [{names}] = {list(expected)}, got {list(given)}")
    previous = jax.tree.map(np.asarray, previous)
    for i in range(loads.shape[0] if layers else 1):
        layer = _layer(previous, i) if layers else previous
        try:
            if topology is None:
                check_any(layer)
            else:
                check_fits(layer, topology)
        except (TypeError, ValueError) as error:
            raise type(error)(f"previous: {error}") from None
    return previous


def _loads_of(history: Any, n_logical: int) -> np.ndarray:
    """`history` as float64 with one to three axes; raises if it is not such an array."""
    given = _host.array_of("history", history)
    loads = _host.as_floats(given)
    if loads is None:
        raise TypeError(f"history: expected an array of real numbers, got {given.dtype}")
    if not 1 <= loads.ndim <= 3 or loads.shape[-1] != n_logical or 0 in loads.shape:
        raise ValueError(
            f"history: expected shape [n_logical] or [layers, n_logical] or [layers, batches, "
            f"n_logical] with n_logical = {n_logical} and at least one layer and batch, got "
            f"{loads.shape}"
        )
    if not np.all(np.isfinite(loads)) or np.any(loads < 0):
        raise ValueError("history: expected finite loads of at least 0, got NaN, inf or negative")
    return loads


def _slots_along(topology: Topology, n_logical: int, ep_size: int, redundants: Any) -> int:
    """Slots of a rank along a topology."""
    check_integers(n_logical=n_logical, redundants_per_rank=redundants)
    check_sizes(topology, n_logical, ep_size, redundants)
    return int(n_logical) // int(ep_size) + int(redundants)


def _slots_per_rank(n_logical: int, ep_size: int, redundants_per_rank: Any, n_physical: Any) -> int:
    """Slots of a rank without a topology, from either of the two sizes."""
    check_integers(n_logical=n_logical)
    if n_logical < 1:
        raise ValueError(f"n_logical: expected at least 1 expert, got {n_logical}")
    if (redundants_per_rank is None) == (n_physical is None):
        raise ValueError(
            f"redundants_per_rank: expected either this or n_physical, got {redundants_per_rank} "
            f"and {n_physical}"
        )
    if n_physical is not None:
        check_integers(n_physical=n_physical)
        if n_physical < n_logical or n_physical % ep_size:
            raise ValueError(
                f"n_physical: expected a multiple of ep_size = {ep_size}, at least n_logical = "
                f"{n_logical}, got {n_physical}"
            )
        return int(n_physical) // int(ep_size)
    check_integers(redundants_per_rank=redundants_per_rank)
    if redundants_per_rank < 0:
        raise ValueError(f"redundants_per_rank: expected at least 0, got {redundants_per_rank}")
    return -(-int(n_logical) // int(ep_size)) + int(redundants_per_rank)


def _check_method(method: Any, n_logical: int, n_groups: Any) -> None:
    """Raises if the method is unknown or `n_groups` does not divide the experts."""
    if method not in get_args(Method):
        raise ValueError(f"method: expected 'auto' or 'eplb', got {method!r}")
    check_integers(n_groups=n_groups)
    if n_groups < 1 or n_logical % n_groups:
        raise ValueError(f"n_groups: expected a divisor of n_logical = {n_logical}, got {n_groups}")


@functools.lru_cache(maxsize=64)
def given_order(topology: Topology, n_logical: int, ep_size: int) -> Placement:
    """The default placement: experts in the given order, one redundant slot per column."""
    check_sizes(topology, n_logical, ep_size, topology.n_columns)
    slots_per_rank = n_logical // ep_size + topology.n_columns
    return _along_topology(
        np.arange(n_logical), topology, Sizes(n_logical, ep_size, slots_per_rank)
    )


def choose_topology(r2o: Any, placement: Placement | None) -> Topology:
    """`r2o`, or if that is None the topology that `placement` carries."""
    if placement is not None and not isinstance(placement, Placement):
        raise TypeError(
            f"placement: expected a lplb_jax.Placement or None, got {type(placement).__name__}"
        )
    carried = None if placement is None else placement.topology
    if r2o is None:
        if carried is None:
            given = "no placement" if placement is None else "a placement that carries none"
            raise ValueError(
                f"r2o: expected a topology, got None with {given}; pass one of "
                f"lplb_jax.topologies, or a placement made by place_experts"
            )
        return carried
    topology = topologies.validate(r2o)
    if carried is not None and carried != topology:
        raise ValueError(
            f"r2o: expected placement.topology, {carried}, got {topology}; pass None, or a "
            f"placement made along this r2o"
        )
    return topology


def check_integers(**sizes: Any) -> None:
    """Raises `TypeError` if a size is not an integer."""
    for name, size in sizes.items():
        if not isinstance(size, int | np.integer):
            raise TypeError(f"{name}: expected an integer, got {size!r}")


def check_nodes(ep_size: Any, n_nodes: Any) -> None:
    """Raises if ranks do not fill the nodes evenly."""
    check_integers(ep_size=ep_size, n_nodes=n_nodes)
    if ep_size < 1:
        raise ValueError(f"ep_size: expected at least 1 rank, got {ep_size}")
    if n_nodes < 1 or ep_size % n_nodes:
        raise ValueError(f"n_nodes: expected a divisor of ep_size = {ep_size}, got {n_nodes}")


def check_sizes(r2o: Topology, n_logical: int, ep_size: int, redundants_per_rank: int) -> None:
    """Raises `ValueError` if the sizes of a placement along `r2o` are inconsistent."""
    group_size, n_columns = r2o.shape
    if ep_size % group_size:
        raise ValueError(
            f"ep_size: expected a multiple of the group size {group_size} of r2o, got {ep_size}"
        )
    if n_logical < 1 or n_logical % ep_size:
        raise ValueError(f"n_logical: expected a multiple of ep_size = {ep_size}, got {n_logical}")
    n_local = n_logical // ep_size
    if redundants_per_rank < 1 or redundants_per_rank % n_columns or redundants_per_rank > n_local:
        raise ValueError(
            f"redundants_per_rank: expected a multiple of the {n_columns} columns of r2o, at most "
            f"the {n_local} experts of a rank, got {redundants_per_rank}"
        )


def check_fits(placement: Placement, r2o: Topology | np.ndarray) -> None:
    """Raises if `placement` was not made for `r2o`; values are checked if they are known.

    An `r2o` without columns stands for any placement.
    """
    names = ("phy2log", "log2phy", "logcnt")
    arrays = {name: getattr(placement, name) for name in names}
    for name, array in arrays.items():
        if getattr(array, "dtype", None) != np.int32:
            raise TypeError(
                f"placement.{name}: expected an int32 array, got "
                f"{getattr(array, 'dtype', type(array).__name__)}"
            )
    dims = tuple(array.ndim for array in arrays.values())
    if dims != (1, 2, 1):
        raise ValueError(
            f"placement: expected arrays of 1, 2 and 1 dimensions (phy2log, log2phy, logcnt), got "
            f"{dims}; a placement with a leading layer axis goes through jax.vmap or one layer at "
            f"a time"
        )
    n_logical, n_physical = placement.n_logical, placement.n_physical
    if not isinstance(r2o, Topology):
        return check_any(placement)
    extra = n_physical - n_logical
    if placement.logcnt.shape != (n_logical,) or extra % placement.ep_size:
        raise ValueError(
            f"placement: expected logcnt [{n_logical}] and n_physical = n_logical + ep_size · "
            f"redundants_per_rank, got logcnt {list(placement.logcnt.shape)}, n_physical = "
            f"{n_physical}, n_logical = {n_logical}, ep_size = {placement.ep_size}"
        )
    check_sizes(r2o, n_logical, placement.ep_size, extra // placement.ep_size)
    if placement.log2phy.shape[1] < 2:
        raise ValueError(
            f"placement.log2phy: expected [n_logical, max_replicas] with max_replicas of at least "
            f"2, got {list(placement.log2phy.shape)}"
        )
    if any(isinstance(array, jax.core.Tracer) for array in arrays.values()):
        return  # the solver checks the values at run time and sets a status bit
    placement = jax.device_get(placement)
    phy2log = placement.phy2log.reshape(placement.ep_size, -1)
    order = phy2log[:, : n_logical // placement.ep_size].ravel()
    if np.array_equal(np.sort(order), np.arange(n_logical)):
        sizes = Sizes(n_logical, placement.ep_size, phy2log.shape[1])
        expected = _along_topology(order, r2o, sizes)
        if (
            np.array_equal(expected.phy2log, placement.phy2log)
            and np.array_equal(expected.log2phy, placement.log2phy[:, :2])
            and np.all(placement.log2phy[:, 2:] == -1)
            and np.array_equal(expected.logcnt, placement.logcnt)
        ):
            return
    raise ValueError(
        "placement: expected every expert once among the ranks' own slots and the redundant slots "
        "to copy them along r2o, got another arrangement; make it with place_experts and this r2o"
    )


def check_any(placement: Placement) -> None:
    """Raises if a placement without a topology contradicts itself."""
    n_logical, n_physical, ep_size = placement.n_logical, placement.n_physical, placement.ep_size
    max_replicas = placement.log2phy.shape[1]
    fits = n_logical >= 1 and n_physical >= n_logical and n_physical % ep_size == 0
    if not fits or placement.logcnt.shape != (n_logical,) or max_replicas < 1:
        raise ValueError(
            f"placement: expected n_physical as a multiple of ep_size = {ep_size} and at least "
            f"n_logical, logcnt [n_logical] and log2phy [n_logical, max_replicas], got n_physical "
            f"= {n_physical}, logcnt {list(placement.logcnt.shape)} and log2phy "
            f"{list(placement.log2phy.shape)}; make it with Placement.from_phy2log"
        )
    arrays = (placement.phy2log, placement.log2phy, placement.logcnt)
    if any(isinstance(array, jax.core.Tracer) for array in arrays):
        return  # the solver checks the values at run time and sets a status bit
    phy2log, log2phy, logcnt = jax.device_get(arrays)
    _tables.check_phy2log(phy2log, ep_size, n_logical)
    # Homes may differ from those that from_phy2log chooses.
    expected, count = _tables.log2phy_of(np, phy2log, log2phy[:, 0], ep_size, n_logical)
    most = max(max_replicas, int(count.max()))
    padding = [(0, 0), (0, most)]
    rows = [np.pad(rows, padding, constant_values=-1)[:, :most] for rows in (expected, log2phy)]
    wrong = (rows[0] != rows[1]).any(axis=1) | (log2phy[:, 0] < 0) | (count != logcnt)
    if wrong.any():
        expert = int(wrong.argmax())
        slots = expected[expert, : count[expert]].tolist()
        raise ValueError(
            f"placement.log2phy: expected the slots of expert {expert}, home first and then in the "
            f"order of the ranks, {slots}, got {log2phy[expert].tolist()} and logcnt "
            f"{logcnt[expert]}; make it with Placement.from_phy2log"
        )


def _pack_ranks(loads: np.ndarray, ep_size: int, group_size: int, n_nodes: int) -> np.ndarray:
    """Order of the experts by rank, heaviest first on each rank."""
    node_size = ep_size // n_nodes
    groups = _pack(loads, np.arange(len(loads)), ep_size // group_size)
    if node_size % group_size == 0:
        of_groups = np.array([loads[group].sum() for group in groups])
        nodes = _pack(of_groups, np.arange(len(groups)), n_nodes)
        groups = [groups[i] for node in nodes for i in node]
    # Ranks that share both their group and their node, where neither size divides the other too.
    block_size = math.gcd(group_size, node_size)
    order = []
    for group in groups:
        for block in _pack(loads, group, group_size // block_size):
            for rank in _pack(loads, block, block_size):
                order.extend(rank[np.argsort(-loads[rank], kind="stable")])
    return np.array(order)


def _pack(loads: np.ndarray, experts: np.ndarray, n_packs: int) -> np.ndarray:
    """The experts of every pack, `[n_packs, …]`."""
    return experts[pack(loads[experts], n_packs)]


def _along_topology(order: np.ndarray, topology: Topology, sizes: Sizes) -> Placement:
    """The placement with experts `order` on the ranks and replicas along `topology`."""
    n_logical, ep_size, slots_per_rank, n_nodes = sizes
    group_size, n_columns = topology.shape
    own = order.reshape(ep_size, -1)
    n_local = own.shape[1]
    redundants_per_rank = slots_per_rank - n_local
    rank = np.arange(ep_size)
    first_of_group = rank - rank % group_size
    # Redundant slot k of a rank belongs to column k % D and copies local expert k of that source.
    local = np.arange(redundants_per_rank)
    source = first_of_group[:, None] + topology[rank % group_size][:, local % n_columns]
    phy2log = np.concatenate([own, own[source, local]], axis=1)

    log2phy = np.full((n_logical, 2), -1)
    slot = np.arange(phy2log.size).reshape(ep_size, slots_per_rank)
    log2phy[own, 0] = slot[:, :n_local]
    log2phy[phy2log[:, n_local:], 1] = slot[:, n_local:]
    return Placement(
        phy2log=phy2log.ravel().astype(np.int32),
        log2phy=log2phy.astype(np.int32),
        logcnt=(log2phy >= 0).sum(axis=1).astype(np.int32),
        ep_size=ep_size,
        topology=topology,
        n_nodes=n_nodes,
    )
