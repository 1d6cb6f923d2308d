"""Copies of experts by copy engines beside tokens of transport "peer", also between processes.

XLA's copy engines serve one process only, and only where it decides to use them. Here a program
starts a flight, lets the tokens travel, and takes what came: two calls, between which the engines
write into the memory of the other ranks, see `cuda/flight.h`. The gradients fly home the same way
while those of the tokens travel.

All arrays of a call fly together, and flights follow one another: each starts only when the tokens
of its layer are there, and these wait for the start. So every rank numbers its flights alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lplb_jax import _native
from lplb_jax._axes import check_axis, varying_as
from lplb_jax.comm import Comm
from lplb_jax.moe.fetch import Fetch
from lplb_jax.moe.transfers import of_floats
from lplb_jax.topologies import Topology


@jax.tree_util.register_static
class Flight(Fetch):
    """A `Fetch` that starts at one point of a program and ends at another."""

    def __init__(self, r2o: Topology | np.ndarray, axis_name: Any, n_copies: int, comm: Comm):
        super().__init__(r2o, axis_name, n_copies, by_engines=True)
        self._comm = comm
        table = np.asarray(r2o)
        group_size, n_columns = table.shape
        first = np.arange(check_axis(axis_name)) // group_size * group_size
        owners = first[:, None] + np.tile(table, (len(first) // group_size, 1))
        servers = np.empty_like(owners)  # Each column is a permutation.
        servers[owners, np.arange(n_columns)] = np.arange(len(owners))[:, None]
        self._route = comm.route(servers.tolist(), owners.tolist())

    def check(self, experts: Any) -> None:
        """Raises if the copies of these experts do not fit in the communicator's memory."""
        leaves = jax.tree.leaves(experts)
        sizes = [leaf[0].size * leaf.dtype.itemsize for leaf in leaves]
        total = self.n_copies * sum(sizes)
        if any(size % 16 for size in sizes):
            raise ValueError(
                f"experts: expected arrays of a multiple of 16 bytes per expert with copy_bytes in "
                f"init_comm, got {' and '.join(map(str, sizes))} bytes"
            )
        if total > self._comm.copy_bytes:
            raise ValueError(
                f"comm: it has room for {self._comm.copy_bytes} bytes of copies, and "
                f"{self.n_copies} copies of these experts need {total}; raise copy_bytes in "
                f"init_comm"
            )

    def start(self, arrays: list[jax.Array], *, home: bool) -> jax.Array:
        """Sends the first experts to the ranks with copies, or `home` the last ones, which are
        copies' gradients; returns the flight's number, float32 `[]`."""
        return self._call("lplb_start_flight", _number, *arrays, home=int(home))

    def take(self, number: jax.Array, arrays: list[jax.Array], *, home: bool) -> list[jax.Array]:
        """What came, `[n_copies, …]` for each of the arrays that left."""
        came = self._gradients if home else self._copies
        received = self._call("lplb_take_flight", came, number, *arrays, home=int(home))
        return list(received) if isinstance(received, tuple) else [received]

    def _call(self, target: str, reference: Callable[..., Any], *operands: Any, home: int) -> Any:
        return _native.call(
            target,
            reference,
            *operands,
            axis_name=self._comm.axis,
            comm=self._comm.identifier,
            route=self._route,
            n_copies=self.n_copies,
            home=home,
        )

    # The specifications of `take`; bound methods of one flight are equal, so calls share traces.

    def _copies(self, _: jax.Array, *arrays: jax.Array, **__: Any) -> tuple[jax.Array, ...]:
        return tuple(self.slots(self.delivered(self.wanted(array))) for array in arrays)

    def _gradients(self, _: jax.Array, *arrays: jax.Array, **__: Any) -> tuple[jax.Array, ...]:
        return tuple(self.slots(self.sent_home(array)) for array in arrays)


def _number(*arrays: jax.Array, **_: Any) -> jax.Array:
    return functools.reduce(varying_as, arrays, jnp.float32(0))


@jax.custom_vjp
def depart(flight: Flight, tokens: jax.Array, experts: Any) -> tuple[jax.Array, Any, jax.Array]:
    """Starts the copies' flight before the tokens', and returns its number; the rest is unchanged.

    In the backward pass, takes the gradients that came home.
    """
    leaves, tree = jax.tree.flatten(experts)
    tokens, leaves = lax.optimization_barrier((tokens, leaves))
    number = flight.start(leaves, home=False)
    tokens, number = lax.optimization_barrier((tokens, number))
    return tokens, tree.unflatten(leaves), number


def _depart_forward(flight: Flight, tokens: jax.Array, experts: Any) -> Any:
    return depart(flight, tokens, experts), flight


def _depart_backward(flight: Flight, cts: Any) -> tuple[None, jax.Array, Any]:
    of_tokens, of_experts, number = cts
    of_slots, put_back = of_floats(of_experts)
    if not of_slots:
        return None, of_tokens, of_experts
    of_tokens, number = lax.optimization_barrier((of_tokens, number))
    home = flight.take(number, of_slots, home=True)
    # The layers below start no flight before this one has ended.
    of_tokens, home = lax.optimization_barrier((of_tokens, home))
    return None, of_tokens, put_back(list(map(flight.add_home, of_slots, home)))


depart.defvjp(_depart_forward, _depart_backward)


@jax.custom_vjp
def arrive(
    flight: Flight, rows: jax.Array, experts: Any, number: jax.Array
) -> tuple[jax.Array, Any]:
    """Writes the copies into the experts' room once the tokens have arrived.

    In the backward pass, starts the flight of the copies' gradients.
    """
    leaves, tree = jax.tree.flatten(experts)
    rows, number = lax.optimization_barrier((rows, number))
    copies = flight.take(number, leaves, home=False)
    return rows, tree.unflatten(list(map(flight.fill, leaves, copies)))


def _arrive_forward(flight: Flight, rows: jax.Array, experts: Any, number: jax.Array) -> Any:
    return arrive(flight, rows, experts, number), flight


def _arrive_backward(flight: Flight, cts: Any) -> tuple[None, jax.Array, Any, jax.Array]:
    of_rows, of_experts = cts
    of_slots, _ = of_floats(of_experts)
    number = varying_as(jnp.float32(0), of_rows)
    if of_slots:
        number = flight.start(of_slots, home=True)
    of_rows, number = lax.optimization_barrier((of_rows, number))
    return None, of_rows, of_experts, number


arrive.defvjp(_arrive_forward, _arrive_backward)
