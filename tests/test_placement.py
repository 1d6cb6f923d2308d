"""place_experts: EPLB's packing, the numbering of the slots, and Placement as a pytree."""

import dataclasses
import functools
import pickle
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case, layers
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lplb_jax import (
    Placement,
    assign,
    export_checks,
    moe,
    place_experts,
    rebalance,
    solve,
    topologies,
)

CUBE = topologies.cube()


def greedy(loads, experts, n_packs):
    """EPLB's balanced packing as described: heaviest first, to the lightest pack with room."""
    packs = [[] for _ in range(n_packs)]
    for expert in sorted(experts, key=lambda e: (-loads[e], e)):
        room = [p for p in packs if len(p) < len(experts) // n_packs]
        min(room, key=lambda pack: sum(loads[e] for e in pack)).append(expert)
    return packs


def ranks_of(placement: Placement) -> np.ndarray:
    """Slots as `[ep_size, slots_per_rank]`."""
    return np.asarray(placement.phy2log).reshape(placement.ep_size, -1)


@pytest.mark.parametrize("name", CASES)
def test_slots_are_numbered_as_documented(rng, name):
    """Own experts first; redundant slot j·D + d copies local expert j·D + d of rank r2o[·, d]."""
    case = CASES[name](rng)
    placement = case.placement(rng)
    ranks = ranks_of(placement)
    group_size, n_columns = case.r2o.shape
    assert placement.n_logical == case.n_logical
    assert placement.n_physical == case.ep_size * (case.n_local + case.redundants_per_rank)
    assert placement.redundants_per_rank == case.redundants_per_rank
    assert sorted(ranks[:, : case.n_local].ravel()) == list(range(case.n_logical))
    for rank in range(case.ep_size):
        group, v = divmod(rank, group_size)
        for j in range(case.combined):
            for d in range(n_columns):
                source = group * group_size + case.r2o[v, d]
                k = j * n_columns + d
                assert ranks[rank, case.n_local + k] == ranks[source, k]


@pytest.mark.parametrize("name", CASES)
def test_log2phy_inverts_phy2log(rng, name):
    """The first slot of an expert is its own rank's; unused places are −1."""
    case = CASES[name](rng)
    placement = case.placement(rng)
    slots_per_rank = placement.n_physical // case.ep_size
    for expert, slots in enumerate(placement.log2phy):
        hosting = np.flatnonzero(placement.phy2log == expert)
        assert sorted(slots[slots >= 0]) == list(hosting)
        assert placement.logcnt[expert] == len(hosting)
        assert slots[0] % slots_per_rank < case.n_local
        assert (slots[len(hosting) :] == -1).all()


@pytest.mark.parametrize("n_nodes", [1, 2, 4, 8])
def test_packing_is_greedy_by_node_then_by_rank(rng, n_nodes):
    loads = rng.integers(0, 50, 64)  # with ties
    placement = place_experts(
        loads, topologies.cube(), n_logical=64, ep_size=8, redundants_per_rank=2, n_nodes=n_nodes
    )
    expected = [
        sorted(rank, key=lambda e: (-loads[e], rank.index(e)))
        for node in greedy(loads, range(64), n_nodes)
        for rank in greedy(loads, node, 8 // n_nodes)
    ]
    np.testing.assert_array_equal(ranks_of(placement)[:, :8], expected)


# For 16 ranks: sizes of groups and nodes divide one another in either direction, or not at all.
@pytest.mark.parametrize("n_nodes", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("group_size", [2, 4, 8, 16])
def test_packing_is_greedy_by_group_first(rng, group_size, n_nodes):
    loads = rng.integers(0, 50, 64)  # with ties
    placement = place_experts(
        loads,
        topologies.ring(group_size),
        n_logical=64,
        ep_size=16,
        redundants_per_rank=1,
        n_nodes=n_nodes,
    )
    groups = greedy(loads, range(64), 16 // group_size)
    groups_per_node = 16 // n_nodes // group_size
    if groups_per_node:
        totals = [sum(loads[e] for e in group) for group in groups]
        groups = [groups[i] for node in greedy(totals, range(len(groups)), n_nodes) for i in node]
    nodes_per_group = max(1, group_size // (16 // n_nodes))
    expected = [
        sorted(rank, key=lambda e: (-loads[e], rank.index(e)))
        for group in groups
        for node in greedy(loads, group, nodes_per_group)
        for rank in greedy(loads, node, group_size // nodes_per_group)
    ]
    np.testing.assert_array_equal(ranks_of(placement)[:, :4], expected)


@pytest.mark.parametrize("n_nodes", [1, 2, 4, 8, 16, 64])
def test_groups_are_level(rng, n_nodes):
    """No token leaves its group, so the heaviest group bounds what the solver can reach."""
    loads = np.exp(rng.normal(0, 0.6, 256))
    placement = place_experts(
        loads, CUBE, n_logical=256, ep_size=64, redundants_per_rank=2, n_nodes=n_nodes
    )
    groups = loads[ranks_of(placement)[:, :4]].reshape(8, -1).sum(axis=1)
    assert groups.max() <= 1.02 * groups.mean()


def test_groups_and_nodes_that_do_not_divide_each_other(rng):
    """Six ranks a group and four a node: pairs of ranks that share both are packed first."""
    loads = rng.integers(0, 50, 48)
    placement = place_experts(
        loads, topologies.ring(6), n_logical=48, ep_size=12, redundants_per_rank=1, n_nodes=3
    )
    expected = [
        sorted(rank, key=lambda e: (-loads[e], rank.index(e)))
        for group in greedy(loads, range(48), 2)
        for pair in greedy(loads, group, 3)
        for rank in greedy(loads, pair, 2)
    ]
    np.testing.assert_array_equal(ranks_of(placement)[:, :4], expected)


def test_each_ranks_experts_are_sorted_and_the_heaviest_replicated(rng):
    loads = rng.lognormal(3, 2, 48)
    placement = place_experts(
        loads, topologies.torus(2, 3), n_logical=48, ep_size=6, redundants_per_rank=4
    )
    own = loads[ranks_of(placement)[:, :8]]
    assert (np.diff(own, axis=1) <= 0).all()
    replicated = np.isin(np.arange(48), ranks_of(placement)[:, 8:])
    for rank in ranks_of(placement)[:, :8]:
        np.testing.assert_array_equal(replicated[rank], [True] * 4 + [False] * 4)


def test_packing_evens_out_loads(rng):
    """Greedy packing is within the heaviest expert of even, as it guarantees."""
    loads = rng.lognormal(3, 1, 256)
    placement = place_experts(
        loads, topologies.cube(), n_logical=256, ep_size=8, redundants_per_rank=2
    )
    ranks = loads[ranks_of(placement)[:, :32]].sum(axis=1)
    assert ranks.max() <= loads.sum() / 8 + loads.max()


def test_no_history_keeps_the_given_order():
    placement = place_experts(
        None, topologies.ring(3), n_logical=9, ep_size=3, redundants_per_rank=2
    )
    assert placement.phy2log.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6, 7, 6, 7, 8, 0, 1]


def test_layers_are_placed_one_by_one(rng):
    history = rng.lognormal(3, 1, (5, 16))
    sizes: dict[str, Any] = {"n_logical": 16, "ep_size": 4, "redundants_per_rank": 2, "n_nodes": 2}
    stacked = place_experts(history, topologies.ring(4), **sizes)
    assert stacked.phy2log.shape == (5, 24)
    assert (stacked.n_logical, stacked.n_physical, stacked.redundants_per_rank) == (16, 24, 2)
    for row, placement in zip(history, layers(stacked), strict=True):
        alone = place_experts(row, topologies.ring(4), **sizes)
        jax.tree.map(np.testing.assert_array_equal, placement, alone)


def test_placement_is_a_pytree_of_int32_with_static_ep_size():
    placement = Case(topologies.cube(), 4).placement()
    leaves, structure = jax.tree.flatten(placement)
    assert [leaf.dtype for leaf in leaves] == [np.int32] * 3
    again = jax.tree.unflatten(structure, leaves)
    assert (again.ep_size, again.topology, again.n_nodes) == (8, topologies.cube(), 1)


def test_what_is_static_in_a_placement():
    """Placements of one topology share compiled code, however the topology was passed."""
    sizes: dict[str, Any] = {"n_logical": 32, "ep_size": 8, "redundants_per_rank": 2}

    def structure(r2o=CUBE, history=None, **change):
        return jax.tree.structure(place_experts(history, r2o, **sizes | change))

    table = np.array(CUBE)
    for same in (table, table.tolist(), np.asfortranarray(table), table.astype(np.uint8)):
        assert structure(same) == structure()
    assert structure(table[:, ::-1]) != structure()
    assert structure(topologies.ring(8)) != structure()
    assert structure(n_nodes=2) != structure()
    assert structure(n_logical=64, ep_size=16) != structure()


@pytest.mark.parametrize("name", CASES)
def test_r2o_is_the_placements_unless_given(rng, name):
    case = CASES[name](rng)
    placement = case.placement(rng)
    loads = rng.integers(0, 1000, case.n_logical).astype(np.int32)
    ids = rng.integers(0, case.n_logical, (case.ep_size, 7)).astype(np.int32)
    assert placement.topology == topologies.validate(case.r2o)
    bare = dataclasses.replace(placement, topology=None)
    split = solve(loads, case.r2o, placement=bare)
    expected = (
        split,
        assign(ids, loads, split, case.r2o, placement=bare),
        rebalance(ids, None, case.r2o, placement=bare),
    )
    for r2o in (None, case.r2o, placement.topology, np.asarray(case.r2o).tolist()):
        got = (
            solve(loads, r2o, placement=placement),
            assign(ids, loads, split, r2o, placement=placement),
            rebalance(ids, None, r2o, placement=placement),
        )
        jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_one_compilation_for_equal_topologies(rng):
    traces = []

    @jax.jit
    def step(loads, placement):
        traces.append(placement.topology)
        return solve(loads, placement=placement)

    loads = rng.integers(0, 1000, 32).astype(np.int32)
    for r2o in (CUBE, np.array(CUBE), CUBE.tolist()):
        history = rng.random(32)
        placement = place_experts(history, r2o, n_logical=32, ep_size=8, redundants_per_rank=2)
        jax.tree.map(
            np.testing.assert_array_equal,
            step(loads, placement),
            solve(loads, CUBE, placement=placement),
        )
    assert traces == [CUBE]


def test_placements_made_by_hand(rng):
    """Positional arguments and pickles may predate `topology` and `n_nodes`."""
    made = Case(CUBE, 4).placement(rng)
    by_hand = Placement(made.phy2log, made.log2phy, made.logcnt, 8)
    assert (by_hand.topology, by_hand.n_nodes) == (None, 1)
    old = Placement.__new__(Placement)
    old.__dict__.update(
        {name: getattr(made, name) for name in ("phy2log", "log2phy", "logcnt", "ep_size")}
    )
    old = pickle.loads(pickle.dumps(old))
    loads = rng.integers(0, 1000, 32).astype(np.int32)
    expected = solve(loads, placement=made)
    for placement in (by_hand, old, jax.tree.map(jnp.asarray, old)):
        got = solve(loads, CUBE, placement=placement)
        jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"ep_size": 0}, ValueError, "^ep_size: expected at least 1 rank, got 0"),
        ({"ep_size": -8}, ValueError, "^ep_size: expected at least 1 rank, got -8"),
        ({"ep_size": "2"}, TypeError, "^ep_size: expected an integer, got '2'"),
        ({"ep_size": 8.0}, TypeError, "^ep_size: expected an integer, got 8.0"),
        ({"ep_size": None}, TypeError, "^ep_size: expected an integer, got None"),
        ({"n_nodes": 0}, ValueError, "^n_nodes: expected a divisor of ep_size = 8, got 0"),
        ({"n_nodes": 3}, ValueError, "^n_nodes: expected a divisor of ep_size = 8, got 3"),
        ({"n_nodes": "2"}, TypeError, "^n_nodes: expected an integer, got '2'"),
        ({"topology": np.array(CUBE)}, TypeError, "^topology: expected a Topology .*got ndarray"),
    ],
)
def test_bad_static_fields(change, error, words):
    made = Case(CUBE, 4).placement()
    with pytest.raises(error, match=words):
        dataclasses.replace(made, **change)
    with pytest.raises(error, match=words):
        Placement(**{**vars(made), **change})


def test_placements_are_equal_by_value(rng):
    made = Case(CUBE, 4).placement(rng)
    again = pickle.loads(pickle.dumps(made))
    assert made == made
    assert made == again
    assert jax.tree.map(jnp.asarray, made) == again
    for field in ("phy2log", "log2phy", "logcnt"):
        other = getattr(made, field).copy()
        other.flat[-1] += 1
        assert made != dataclasses.replace(made, **{field: other})
        assert made != dataclasses.replace(made, **{field: other[:-1]})
    for change in ({"ep_size": 4}, {"topology": None}, {"n_nodes": 2}):
        assert made != dataclasses.replace(made, **change)
    assert made != tuple(vars(made).values())
    with pytest.raises(TypeError, match="unhashable type: 'Placement'"):
        hash(made)


def test_jax_rebuilds_placements_with_any_leaves():
    """None, sentinels and tracers replace arrays; only static fields are checked then."""
    made = Case(CUBE, 4).placement()
    for leaf in (None, object(), 0, jax.ShapeDtypeStruct((3,), jnp.float32)):
        rebuilt = jax.tree.map(lambda _, leaf=leaf: leaf, made)
        assert rebuilt.phy2log is leaf
        assert rebuilt.topology is made.topology
    shapes = jax.eval_shape(lambda placement: placement, made)
    assert shapes.phy2log.shape == made.phy2log.shape


GOOD: dict[str, Any] = {"n_logical": 16, "ep_size": 8, "redundants_per_rank": 2}


@pytest.mark.parametrize(
    ("history", "change", "argument"),
    [
        (
            None,
            {"ep_size": 12, "n_logical": 24},
            "ep_size: expected a multiple of the group size 8",
        ),
        (None, {"ep_size": 0}, "ep_size"),
        (None, {"n_logical": 17}, "n_logical: expected a multiple of ep_size = 8, got 17"),
        (None, {"n_logical": 0}, "n_logical"),
        (None, {"redundants_per_rank": 1}, "redundants_per_rank: expected a multiple of the 2"),
        (None, {"redundants_per_rank": 0}, "redundants_per_rank"),
        (None, {"redundants_per_rank": 4}, "redundants_per_rank: .*at most the 2 experts"),
        (None, {"n_nodes": 3}, "n_nodes: expected a divisor of ep_size = 8, got 3"),
        (None, {"n_nodes": 0}, "n_nodes"),
        (np.ones(15), {}, r"history: expected shape .* got \(15,\)"),
        (np.ones((1, 2, 2, 16)), {}, "history: expected shape"),
        (np.ones((0, 16)), {}, r"history: .*at least one layer and batch, got \(0, 16\)"),
        (np.ones((2, 0, 16)), {}, r"history: .*at least one layer and batch, got \(2, 0, 16\)"),
        (np.full(16, np.nan), {}, "history: expected finite"),
        (np.full(16, np.inf), {}, "history: expected finite"),
        (-np.ones(16), {}, "history: expected finite loads of at least 0"),
    ],
)
def test_bad_arguments(history, change, argument):
    with pytest.raises(ValueError, match=f"^{argument}"):
        place_experts(history, topologies.cube(), **(GOOD | change))


@pytest.mark.parametrize(
    "history", [["hot"] * 16, [[1.0] * 16, [2.0] * 15], np.ones(16, complex), object(), {1: 2}]
)
def test_history_is_of_numbers(history):
    with pytest.raises(TypeError, match=r"^history: expected an array of real numbers"):
        place_experts(history, CUBE, **GOOD)


def test_history_is_known_on_the_host():
    with pytest.raises(TypeError, match=r"^history: expected .* known on the host, got .*float32"):
        jax.jit(lambda history: place_experts(history, CUBE, **GOOD))(np.ones(16, np.float32))


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int32, np.float16, jnp.bfloat16])
def test_history_of_any_real_type(rng, dtype):
    history = rng.integers(0, 2, 16)
    jax.tree.map(
        np.testing.assert_array_equal,
        place_experts(jnp.asarray(history).astype(dtype), CUBE, **GOOD),
        place_experts(history.astype(float), CUBE, **GOOD),
    )


@pytest.mark.parametrize("name", ["n_logical", "ep_size", "redundants_per_rank", "n_nodes"])
@pytest.mark.parametrize("value", [8.0, "8", None])
def test_sizes_are_integers(name, value):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected .* got "):
        place_experts(None, topologies.cube(), **(GOOD | {name: value}))


@pytest.mark.parametrize("topology", [CUBE, None])
def test_exported_programs_keep_what_is_static(rng, topology):
    sizes: dict[str, Any] = {
        "n_logical": 16,
        "ep_size": np.int64(8),
        "redundants_per_rank": 2,
        "n_nodes": 2,
    }
    placement = dataclasses.replace(place_experts(None, CUBE, **sizes), topology=topology)
    loads = rng.integers(0, 1000, 16).astype(np.int32)
    step = jax.jit(lambda loads, r2o, placement: solve(loads, r2o, placement=placement))
    program = jax.export.export(step, disabled_checks=export_checks())(loads, CUBE, placement)
    again = jax.export.deserialize(program.serialize())
    assert again.in_tree == program.in_tree
    jax.tree.map(
        np.testing.assert_array_equal,
        again.call(loads, CUBE, placement),
        solve(loads, CUBE, placement=placement),
    )


def test_layers_of_experts_find_the_topology_too(rng, cpu_devices):
    """moe_layer and replicate_weights: as if r2o were given, with all slots of the placement."""
    case = Case(CUBE, 3, combined=1)
    placement = case.placement(rng)
    spec, mesh = P("ep"), Mesh(cpu_devices, "ep")
    weights = rng.random((case.n_logical, 4)).astype(np.float32)
    tokens = rng.random((64, 8), np.float32)
    ids = rng.integers(0, case.n_logical, (64, 2)).astype(np.int32)
    experts = moe.Experts(
        rng.random((case.n_logical, 8, 8), np.float32),
        rng.random((case.n_logical, 4, 8), np.float32),
    )

    def slots(r2o, **options):
        fetch = functools.partial(moe.replicate_weights, r2o=r2o, axis_name="ep", **options)
        return jax.shard_map(fetch, mesh=mesh, in_specs=spec, out_specs=spec)(weights)

    def layer(r2o):
        def rank(tokens, ids, experts):
            gates = jnp.ones_like(ids, jnp.float32)
            return moe.moe_layer(
                tokens, ids, gates, experts, r2o, placement=placement, axis_name="ep"
            )

        results = moe.LayerResult(spec, P())
        run = jax.shard_map(rank, mesh=mesh, in_specs=spec, out_specs=results)
        return jax.jit(run)(tokens, ids, experts)

    expected = slots(CUBE, redundants_per_rank=placement.redundants_per_rank)
    np.testing.assert_array_equal(slots(None, placement=placement), expected)
    np.testing.assert_array_equal(slots(CUBE, placement=placement), expected)
    jax.tree.map(np.testing.assert_array_equal, layer(None), layer(CUBE))
    with pytest.raises(ValueError, match=r"^r2o: expected a topology, got None with no placement"):
        slots(None)
    with pytest.raises(ValueError, match=r"^r2o: expected placement.topology, .* got Topology"):
        slots(topologies.ring(8), placement=placement)
    with pytest.raises(ValueError, match=r"^redundants_per_rank: expected the placement's 2, or"):
        slots(None, placement=placement, redundants_per_rank=4)


def test_stacked_placements_under_vmap_and_scan(rng):
    """Layers share static fields: one trace, each with its own arrays, r2o from the placement."""
    history = rng.lognormal(3, 1, (3, 32))
    stacked = place_experts(history, CUBE, n_logical=32, ep_size=8, redundants_per_rank=2)
    loads = rng.integers(0, 1000, (3, 32)).astype(np.int32)

    def one(loads, placement):
        return solve(loads, placement=placement)

    def step(carry, layer):
        return carry, one(*layer)

    expected = [one(*layer) for layer in zip(loads, layers(stacked), strict=True)]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *expected)
    jax.tree.map(np.testing.assert_array_equal, jax.vmap(one)(loads, stacked), expected)
    scanned = jax.lax.scan(step, None, (loads, stacked))[1]
    jax.tree.map(np.testing.assert_array_equal, scanned, expected)


@pytest.mark.parametrize("along", [True, False])
@pytest.mark.parametrize("n_layers", [None, 2])
def test_arrays_and_back(rng, along, n_layers):
    """Static fields are kept, also from JAX arrays and in any order."""
    given: dict[str, Any] = {"n_logical": 16, "ep_size": 8, "redundants_per_rank": 2, "n_nodes": 2}
    history = rng.integers(0, 99, (n_layers or 1, 16))
    placement = place_experts(
        history if n_layers else history[0], topologies.cube() if along else None, **given
    )
    arrays = placement.to_arrays()
    assert all(isinstance(array, np.ndarray) for array in arrays.values())
    assert Placement.from_arrays(arrays) == placement
    shuffled = {name: jnp.asarray(arrays[name]) for name in rng.permutation(list(arrays))}
    assert Placement.from_arrays(shuffled) == placement
    for changed, words in (
        ({name: arrays[name] for name in list(arrays)[1:]}, "^arrays: expected phy2log.*got log2"),
        (arrays | {"more": 1}, "^arrays: .*r2o, got .*more"),
        ({}, "^arrays: .*got none"),
        (arrays | {"logcnt": arrays["logcnt"][..., 1:]}, r"^arrays: .*\[n_logical\].*got \["),
        (arrays | {"ep_size": np.int32(0)}, "^ep_size: "),
    ):
        with pytest.raises(ValueError, match=words):
            Placement.from_arrays(changed)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.int32, np.float64])
@pytest.mark.parametrize("update", [False, True])
def test_several_batches_along_a_topology(rng, dtype, update):
    """Their sum, which the dtype may not hold, is what the placement suits."""
    loads = rng.integers(1, 250, (3, 5, 16)).astype(dtype)
    r2o = topologies.ring(4)
    sizes: dict[str, Any] = {"n_logical": 16, "ep_size": 4, "redundants_per_rank": 2}
    if update:
        sizes["previous"] = place_experts(rng.random((3, 16)), r2o, **sizes)
    found = place_experts(loads, r2o, **sizes)
    assert found.topology == r2o
    assert found == place_experts(loads.astype(np.float64).sum(axis=1), r2o, **sizes)
