"""What a layer says of its traffic: loads by expert, and one account for all slices of a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from moe_checks import HIDDEN, TOP_K, WIDTH, AnyCase, in_slots

from lplb_jax import LoadHistory, Status, metrics, moe


@pytest.mark.parametrize("copies", ["placement", "batch"])
def test_slices_of_a_data_axis_are_reduced(rng, cpu_devices, copies):
    """Two slices of four ranks with other tokens; on one of them some find no room."""
    mesh, case = Mesh(cpu_devices.reshape(2, 4), ("data", "ep")), AnyCase(4, 6, 19)
    placement = case.placement(rng)
    # In the second slice all tokens choose few experts, and three choices in ten are no expert's.
    ids = rng.integers(0, 19, (64, TOP_K)).astype(np.int32)
    ids[32:] = np.where(rng.random((32, TOP_K)) < 0.3, 99, ids[32:] % 2)
    experts = moe.Experts(
        rng.normal(0, 1, (19, HIDDEN, 2 * WIDTH)).astype(np.float32),
        rng.normal(0, 1, (19, WIDTH, HIDDEN)).astype(np.float32),
    )
    both = P(("data", "ep"))

    def rank(tokens, ids, gates, experts, placement):
        _, traffic = moe.moe_layer(
            tokens, ids, gates, experts, placement=placement, axis_name="ep", copies=copies,
            capacity_factor=1.0, transport="padded",
        )  # fmt: skip
        return traffic.reduced("data"), jax.tree.map(lambda leaf: leaf[None], traffic)

    @jax.jit
    def run(ids, history):
        tokens, gates = jnp.ones((64, HIDDEN)), jnp.ones((64, TOP_K))
        over = jax.shard_map(
            rank, mesh=mesh, in_specs=(both, both, both, P("ep"), P()), out_specs=(P(), P("data")),
        )  # fmt: skip
        traffic, of_slices = over(tokens, ids, gates, in_slots(experts, placement), placement)
        return traffic, of_slices, history.update(traffic.expert_loads[None])

    history = LoadHistory.empty(n_layers=1, n_logical=19)
    traffic, slices, history = jax.tree.map(np.asarray, run(ids, history))
    counts = np.bincount(ids[ids < 19], minlength=19)
    np.testing.assert_array_equal(traffic.expert_loads, counts)
    np.testing.assert_array_equal(history.loads[0, 0], counts)
    for part, of_slice in zip(np.split(ids, 2), slices.expert_loads, strict=True):
        np.testing.assert_array_equal(of_slice, np.bincount(part[part < 19], minlength=19))
    np.testing.assert_array_equal(traffic.slot_loads, slices.slot_loads.sum(0))
    ranks = metrics.rank_loads(slices.slot_loads, 4)
    assert traffic.capacity == slices.capacity[0]
    assert traffic.overflow == np.maximum(ranks - traffic.capacity, 0).sum()
    assert slices.lower_bound[0] != slices.lower_bound[1]
    assert traffic.lower_bound == slices.lower_bound.max()
    assert slices.status.ravel().tolist() == [0, Status.INVALID_INDEX]
    assert traffic.status.tolist() == [Status.INVALID_INDEX]
    first, second = slices.phy2log
    np.testing.assert_array_equal(traffic.phy2log, np.where(first == second, first, -1))
    assert (first != second).any() == (copies == "batch")


def test_of_stacked_layers(rng, cpu_devices):
    """All bits of any slice, whatever else; as out of a scan."""
    mesh = Mesh(cpu_devices[:4], "data")
    arrays = [rng.integers(0, 64, (4, 3, *shape)).astype(np.int32) for shape in 3 * [(), (5,)]]
    traffic = moe.Traffic(
        arrays[1], arrays[0], arrays[2], arrays[3], arrays[5], arrays[1], arrays[3]
    )

    def rank(traffic):
        return jax.tree.map(lambda leaf: leaf[0], traffic).reduced("data")

    run = jax.shard_map(rank, mesh=mesh, in_specs=P("data"), out_specs=P())
    got = jax.jit(run)(traffic)
    np.testing.assert_array_equal(got.status, np.bitwise_or.reduce(traffic.status))
    np.testing.assert_array_equal(got.overflow, traffic.overflow.sum(0))
    np.testing.assert_array_equal(got.lower_bound, traffic.lower_bound.max(0))


def test_the_axis_must_be_there():
    nothing = moe.Traffic(*[jnp.int32(0)] * 7)
    with pytest.raises(ValueError, match=r"^axis_name: .*'data', which is not in scope"):
        nothing.reduced("data")
