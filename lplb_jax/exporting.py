"""Programs that outlive the process: what jax.export has to know of this library."""

from __future__ import annotations

import json

import jax.export

from lplb_jax import _native
from lplb_jax.assignment import Assignment
from lplb_jax.metrics import CopyTimes, CopyTraffic
from lplb_jax.moe import Experts, Traffic
from lplb_jax.placement import Placement
from lplb_jax.solver import Split, TileSplit
from lplb_jax.topologies import Topology


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What to pass to `jax.export.export` as `disabled_checks`.

    JAX does not export calls of native code unless told to: it cannot know how long a target stays
    compatible. Load a program with the version of this library that it was exported with. The
    process that loads it (`jax.export.deserialize`, which needs flatbuffers) imports `lplb_jax`,
    which registers the targets; on GPUs it needs the CUDA module. A `Comm` exists in one run only:
    export programs without `comm`. The number of tokens may be symbolic, except where JAX itself
    fails, inside `jax.shard_map`.

    Returns:
      A check for every native target of this installation.

    Raises:
      Nothing: without native modules the list is empty, and programs hold the reference.

    >>> solver = jax.jit(lambda loads: solve(loads, topologies.ring(2)))
    >>> loads = jax.ShapeDtypeStruct((4,), jnp.int32)
    >>> program = jax.export.export(solver, disabled_checks=export_checks())(loads)
    >>> program.call(jnp.array([9, 1, 1, 1], jnp.int32)).quota.tolist()
    [5, 1, 0, 1, 1, 4]
    """
    targets = {target for targets in _native.AVAILABLE.values() for target in targets}
    return [jax.export.DisabledSafetyCheck.custom_call(target) for target in sorted(targets)]


for result in (Assignment, Split, TileSplit, Experts, Traffic, CopyTraffic, CopyTimes):
    jax.export.register_namedtuple_serialization(
        result, serialized_name=f"lplb_jax.{result.__name__}"
    )


def _written(meta: tuple[int, Topology | None, int]) -> bytes:
    """What is static in a placement, as JSON."""
    ep_size, topology, n_nodes = meta
    table = None if topology is None else topology.tolist()
    return json.dumps([int(ep_size), table, int(n_nodes)]).encode()


def _read(text: bytes | bytearray) -> tuple[int, Topology | None, int]:
    ep_size, table, n_nodes = json.loads(text)
    return ep_size, None if table is None else Topology(table), n_nodes


jax.export.register_pytree_node_serialization(
    Placement,
    serialized_name="lplb_jax.Placement",
    serialize_auxdata=_written,
    deserialize_auxdata=_read,
)
jax.export.register_pytree_node_serialization(
    Topology,
    serialized_name="lplb_jax.Topology",
    serialize_auxdata=lambda topology: json.dumps(topology.tolist()).encode(),
    deserialize_auxdata=lambda text: Topology(json.loads(text)),
)
