"""jax.export: programs with native calls, of any number of tokens, loaded in another process."""

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, counts_of, tokens
from jax import export
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from steps import assert_same

from lplb_jax import (
    assign,
    count_loads,
    export_checks,
    place_experts,
    rebalance,
    solve,
    topologies,
)

pytest.importorskip("flatbuffers")  # what jax.export serializes with

CASE = Case(topologies.ring(4), 4)


def counted(ids, loads, placement):
    return rebalance(ids, None, CASE.r2o, placement=placement, positions=True)


def by_source(ids, loads, placement):
    return rebalance(ids, loads, CASE.r2o, placement=placement, positions=True)


def by_statistics(ids, loads, placement):
    return rebalance(ids, loads[0], CASE.r2o, placement=placement)


def interior_point(ids, loads, placement):
    return rebalance(ids, loads, CASE.r2o, placement=placement, solver="ipm")


def step_by_step(ids, loads, placement):
    counts = jax.vmap(lambda row: count_loads(row, CASE.n_logical))(ids)
    split = solve(counts, CASE.r2o, placement=placement)
    return split, assign(ids, counts, split, CASE.r2o, placement=placement)


STEPS = pytest.mark.parametrize(
    "step", [counted, by_source, by_statistics, interior_point, step_by_step]
)


def written_and_read(step, *arguments):
    made = export.export(jax.jit(step), disabled_checks=export_checks())(*arguments)
    return export.deserialize(made.serialize())


@STEPS
def test_any_number_of_tokens(rng, step):
    (n,) = export.symbolic_shape("n")
    placement = CASE.placement(rng)
    loads = rng.integers(0, 99, (4, 16)).astype(np.int32)
    ids = jax.ShapeDtypeStruct((4, n), jnp.int32)
    program = written_and_read(step, ids, loads, placement)
    for n_tokens in (1, int(rng.integers(2, 99)), 5000):
        operands = tokens(rng, CASE, n_tokens), loads, placement
        assert_same(program.call(*operands), step(*operands))


def test_any_number_of_layers(rng):
    """vmap over a symbolic axis, with a placement per layer."""
    layers, n = export.symbolic_shape("layers, n")

    def shape(*dims):
        return jax.ShapeDtypeStruct((layers, *dims), jnp.int32)

    sizes = CASE.placement()
    stacked = jax.tree.map(lambda leaf: shape(*leaf.shape), sizes)
    program = written_and_read(jax.vmap(counted), shape(4, n), shape(4, 16), stacked)
    for count in (1, 3):
        history = rng.random((count, 16))
        options: dict[str, Any] = {"n_logical": 16, "ep_size": 4, "redundants_per_rank": 1}
        placements = place_experts(history, CASE.r2o, **options)
        ids = np.stack([tokens(rng, CASE, 50) for _ in range(count)])
        operands = ids, np.zeros((count, 4, 16), np.int32), placements
        assert_same(program.call(*operands), jax.vmap(counted)(*operands))


def test_the_checks_are_needed():
    """They name exactly what JAX requires."""
    solver = jax.jit(lambda loads: solve(loads, CASE.r2o))
    with pytest.raises(ValueError, match="lplb_solve"):
        export.export(solver)(np.ones(16, np.int32))
    named = {str(check) for check in export_checks()}
    for target in ("count", "solve", "assign", "rebalance", "ipm"):
        assert any(f"lplb_{target}" in name for name in named)


LOAD = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
import lplb_jax
program = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
given = np.load(sys.argv[2])
placement = lplb_jax.Placement(
    given["phy2log"], given["log2phy"], given["logcnt"], ep_size=8,
    topology=lplb_jax.topologies.cube(),
)
arguments = given["ids"], placement
if program.nr_devices == 8:
    mesh = jax.sharding.Mesh(jax.devices("cpu")[:8], "ep")
    specs = jax.sharding.PartitionSpec("ep"), jax.sharding.PartitionSpec()
    shardings = tuple(jax.sharding.NamedSharding(mesh, spec) for spec in specs)
    arguments = jax.device_put(arguments, shardings)
physical, split = program.call(*arguments)
assert type(split) is lplb_jax.Split
np.savez(sys.argv[2], physical=physical, **split._asdict())
"""


@pytest.mark.parametrize("n_ranks", [1, 8])
def test_in_another_process(rng, cpu_devices, tmp_path, n_ranks):
    """On one device any number of tokens; over ranks a fixed one, as JAX's shard_map requires."""
    case = Case(topologies.cube(), 4)
    placement = case.placement(rng)
    ids = tokens(rng, case, 70)
    expected = rebalance(ids, counts_of(ids, case.n_logical), case.r2o, placement=placement)

    if n_ranks == 1:
        (n_tokens,) = export.symbolic_shape("n")

        def step(ids, placement):
            counts = jax.vmap(lambda row: count_loads(row, case.n_logical))(ids)
            return rebalance(ids, counts, case.r2o, placement=placement)
    else:
        n_tokens = 70
        mesh = Mesh(cpu_devices, "ep")

        def over_ranks(ids, placement):
            return rebalance(ids, None, case.r2o, placement=placement, axis_name="ep")

        specs: dict[str, Any] = {"in_specs": (P("ep"), P()), "out_specs": (P("ep"), P())}
        step = jax.shard_map(over_ranks, mesh=mesh, **specs)

    made = export.export(jax.jit(step), disabled_checks=export_checks())(
        jax.ShapeDtypeStruct((8, n_tokens), jnp.int32), placement
    )
    program, arrays = tmp_path / "program", tmp_path / "arrays.npz"
    program.write_bytes(made.serialize())
    parts = {name: getattr(placement, name) for name in ("phy2log", "log2phy", "logcnt")}
    np.savez(arrays, ids=ids, **parts)
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOAD, str(program), str(arrays)],
        capture_output=True,
        text=True,
        timeout=250,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    loaded = np.load(arrays)
    np.testing.assert_array_equal(loaded["physical"], expected[0])
    for name, array in expected[1]._asdict().items():
        np.testing.assert_array_equal(loaded[name], array)
