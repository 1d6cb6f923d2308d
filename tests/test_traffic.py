"""A layer's traffic: loads by expert, and its reduction over the slices of a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from moe_checks import HIDDEN, TOP_K, WIDTH, AnyCase, in_slots

from lplb_jax import (
    LoadHistory,
    Placement,
    Status,
    metrics,
    moe,
    place_copies,
    rebalance,
    solve,
    topologies,
)


@pytest.mark.parametrize("copies", ["placement", "batch"])
def test_slices_of_a_data_axis_are_reduced(rng, cpu_devices, copies):
    """Two slices of four ranks with different tokens; on one of them, some rows do not fit."""
    mesh, case = Mesh(cpu_devices.reshape(2, 4), ("data", "ep")), AnyCase(4, 6, 19)
    placement = case.placement(rng)
    # In the second slice all tokens choose few experts, and 30 % of the choices name no expert.
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
    """All bits of any slice, also for traffic stacked by a scan."""
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


def sends(ranks, home, node_size):
    """(from, to) of an expert's copies on `ranks`, in sequence."""
    done = []

    def spread(have, rest):
        """All holders in turn send three times; then the new holders join."""
        while rest:
            now = [*zip(3 * have, rest, strict=False)]
            done.extend(now)
            have, rest = have + [to for _, to in now], rest[len(now) :]

    def from_home(to):
        done.extend((home, rank) for rank in to[:4])
        spread(to[:4], to[4:])

    nodes = {}
    for rank in sorted(ranks):
        nodes.setdefault(rank // node_size, []).append(rank)
    from_home(nodes.pop(home // node_size, []))
    from_home([of_node[0] for of_node in nodes.values()])
    for first, *rest in nodes.values():
        spread([first], rest)
    return done


@pytest.mark.parametrize(
    ("ep_size", "n_nodes"), [(8, 1), (8, 2), (8, 8), (24, 4), (64, 2), (64, 16), (5, 1)]
)
def test_copies_that_travel_are_counted(rng, ep_size, n_nodes):
    """Against a list of who sends what to whom; layers at once, or one by one."""
    table = np.full((ep_size, 7), -1, np.int32)
    table[:, :5] = rng.permutation(5 * ep_size).reshape(ep_size, 5)
    empty = Placement.from_phy2log(table, ep_size=ep_size, n_nodes=n_nodes)
    layers, quotas, expected = [], [], []
    for power in (1, 3):
        share = np.arange(1, 5 * ep_size + 1) ** -float(power)
        loads = rng.multinomial(5000, share / share.sum()).astype(np.int32)
        chosen = place_copies(loads, empty)
        quota = np.asarray(solve(loads, placement=chosen).quota)
        counts, home = np.zeros((4, ep_size), int), empty.log2phy[:, 0] // 7
        for expert in range(5 * ep_size):
            slots = np.flatnonzero((np.asarray(chosen.phy2log) == expert) & (quota > 0))
            ranks = set(slots // 7) - {home[expert]}
            for sender, to in sends(ranks, home[expert], ep_size // n_nodes):
                abroad = sender * n_nodes // ep_size != to * n_nodes // ep_size
                counts[0, sender] += 1
                counts[1, to] += 1
                counts[2, sender] += abroad
                counts[3, to] += abroad
        before = np.bincount(home, loads, ep_size).max()
        expected.append([*counts, before - quota.reshape(ep_size, 7).sum(1).max()])
        layers.append(chosen)
        quotas.append(quota)
        for got, want in zip(metrics.copy_traffic(quota, chosen), expected[-1], strict=True):
            np.testing.assert_array_equal(got, want)
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *layers)
    got = jax.jit(metrics.copy_traffic)(np.stack(quotas), stacked)
    for ours, *theirs in zip(got, *expected, strict=True):
        np.testing.assert_array_equal(ours, np.stack(theirs))


def test_along_a_topology_all_copies_travel(rng):
    """Used or not, each from its home."""
    case = Case(topologies.cube(), 5, combined=2)
    placement = case.placement(rng)
    n_redundant = placement.redundants_per_rank
    ids = rng.integers(0, case.n_logical, 30).astype(np.int32)
    _, split = rebalance(ids, None, placement=placement)
    copies = metrics.copy_traffic(split.quota, placement, n_nodes=2)
    columns = np.resize(np.arange(placement.topology.shape[1]), n_redundant)
    pairs = [(int(placement.topology[v, d]), v) for v in range(8) for d in columns]
    assert copies.sent.tolist() == np.bincount([a for a, _ in pairs], minlength=8).tolist()
    assert copies.received.tolist() == [n_redundant] * 8
    abroad = [(a, b) for a, b in pairs if a // 4 != b // 4]
    assert copies.sent_abroad.tolist() == np.bincount([a for a, _ in abroad], minlength=8).tolist()


def test_times_of_copies(rng):
    """The busiest link of any rank, by its rate; in inference nothing travels back."""
    sent, received = rng.integers(0, 50, (2, 3, 8))
    sent_abroad, received_abroad = rng.integers(0, sent + 1), rng.integers(0, received + 1)
    rows = rng.integers(-10, 10**6, 3)
    copies = metrics.CopyTraffic(sent, received, sent_abroad, received_abroad, rows)
    rates = {"flops": 3e14, "link": 2e11, "node_link": 4e10}
    times = {
        inference: metrics.copy_times(
            copies, parameters=1e7, bytes_per_expert=1.5e7, inference=inference, **rates
        )
        for inference in (False, True)
    }
    for layer in range(3):
        links = [(sent - sent_abroad, 2e11), (received - received_abroad, 2e11)]
        links += [(sent_abroad, 4e10), (received_abroad, 4e10)]
        once = max(n[layer].max() * 1.5e7 / rate for n, rate in links)
        forward = rows[layer] * 2e7 / 3e14
        for inference, ways, passes in ((True, 1, 1), (False, 2, 3)):
            np.testing.assert_allclose(times[inference].fetch[layer], ways * once, rtol=1e-5)
            np.testing.assert_allclose(times[inference].saved[layer], passes * forward, rtol=1e-5)
    for name, value in (("parameters", 0), ("link", np.inf), ("bytes_per_expert", -1.0)):
        with pytest.raises(ValueError, match=rf"^{name}: expected a finite number above 0"):
            metrics.copy_times(copies, **{"parameters": 1e7, name: value})
    placement = Placement.from_phy2log([[0, 1], [2, 3]], ep_size=2)
    with pytest.raises(ValueError, match=r"^n_nodes: expected a divisor of ep_size = 2, got 3"):
        metrics.copy_traffic(np.ones(4, np.int32), placement, n_nodes=3)
