"""Experts' arrays in different orders, of ids and of homes; and moves of whole training states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from moe_checks import AnyCase, in_slots

from lplb_jax import Placement, moe, topologies

CASES = {
    "cube": Case(topologies.cube(), 3),
    "anywhere": AnyCase(8, 4, 19),
    "few experts": AnyCase(8, 3, 3),
}


def placed(rng, case, n_layers):
    if n_layers is None:
        return case.placement(rng)
    layers = [case.placement(rng) for _ in range(n_layers)]
    return jax.tree.map(lambda *arrays: np.stack(arrays), *layers)


def in_home_order(array, placement):
    if placement.phy2log.ndim == 1:
        return in_slots(array, placement)
    layers = (jax.tree.map(lambda a, i=i: a[i], placement) for i in range(len(array)))
    return np.stack([in_slots(of, layer) for of, layer in zip(array, layers, strict=True)])


@pytest.mark.parametrize("n_layers", [None, 2])
@pytest.mark.parametrize("name", CASES)
def test_from_ids_and_back(rng, name, n_layers):
    """For every dtype, and under every transformation."""
    case = CASES[name]
    placement = placed(rng, case, n_layers)
    lead = () if n_layers is None else (n_layers,)
    of_ids = {
        "floats": rng.normal(0, 1, (*lead, case.n_logical, 2, 3)).astype(np.float32),
        "integers": rng.integers(-9, 10, (*lead, case.n_logical)).astype(np.int8),
        "step": 3,
        "placeholder": np.zeros(1),
    }
    want = in_home_order(of_ids["floats"], placement), in_home_order(of_ids["integers"], placement)

    def assert_there(tree, arrays):
        for name, expected in zip(("floats", "integers"), arrays, strict=True):
            assert tree[name].dtype == expected.dtype
            np.testing.assert_array_equal(tree[name], expected)
        assert tree["step"] == 3
        assert tree["placeholder"].shape == (1,)

    calls = [lambda function: function, jax.jit]
    calls += [jax.vmap] * (n_layers is not None)
    for of in calls:
        given = of_ids | {"step": np.full(lead, 3), "placeholder": np.zeros((*lead, 1))}
        given = given if of is jax.vmap else of_ids
        home = of(moe.to_home_order)(given, placement)
        back = of(moe.to_id_order)(home, placement)
        if of is jax.vmap:
            home, back = (
                tree | {"step": tree["step"][0], "placeholder": tree["placeholder"][0]}
                for tree in (home, back)
            )
        assert_there(home, want)
        assert_there(back, (of_ids["floats"], of_ids["integers"]))


@pytest.mark.parametrize("n_layers", [None, 2])
@pytest.mark.parametrize("n_logical", [16, 14])
def test_homes_that_do_not_fit(rng, n_logical, n_layers):
    """Known ones are refused; of traced ones, every row of their layer is marked as lost."""
    crowded = np.full((4, 6), -1, np.int32)
    crowded.ravel()[:n_logical] = np.arange(n_logical)  # six homes on a rank that has four rows
    tables = [AnyCase(4, 6, n_logical).placement(rng).phy2log.reshape(4, 6), crowded][::-1]
    placement = Placement.from_phy2log(tables[0] if n_layers is None else tables, ep_size=4)
    lead = () if n_layers is None else (n_layers,)
    marks = {"float32": np.nan, "bfloat16": np.nan, "int8": -128, "uint16": 65535, "bool": True}
    for dtype, mark in marks.items():
        of_ids = jnp.asarray(rng.integers(0, 2, (*lead, n_logical, 3)), dtype)
        for move in (
            moe.to_home_order,
            lambda array, placement: moe.to_id_order(
                jnp.zeros((*lead, 16, 3), array.dtype), placement
            ),
            lambda array, placement: moe.move_experts(
                jnp.zeros((*lead, 16, 3), array.dtype), placement, placement
            ),
        ):
            with pytest.raises(ValueError, match=r"at most 4 experts, got 6.*moe\.InSlots"):
                move(of_ids, placement)
            got = jax.jit(move)(of_ids, placement).astype(np.float32)
            lost = got if n_layers is None else got[0]
            np.testing.assert_array_equal(lost, np.full_like(lost, mark))
            if n_layers is not None and move is moe.to_home_order:
                fits = jax.tree.map(lambda leaf: leaf[1], placement)
                want = moe.to_home_order(of_ids[1], fits).astype(np.float32)
                np.testing.assert_array_equal(got[1], want)


def test_another_number_of_ranks(rng):
    """19 experts from eight ranks to four, via the order of ids."""
    array = rng.normal(0, 1, (19, 2)).astype(np.float32)
    eight, four = (AnyCase(*sizes, 19).placement(rng) for sizes in ((8, 4), (4, 6)))
    home = moe.to_home_order(array, eight)
    moved = moe.to_home_order(moe.to_id_order(home, eight), four)
    np.testing.assert_array_equal(moved, in_slots(array, four))


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["cube", "anywhere"])
def test_arrays_stay_sharded_where_their_size_allows(rng, cpu_devices, name, kind, traced):
    case = CASES[name]
    mesh = Mesh(cpu_devices.reshape(8, 1), ("ep", "tp"), axis_types=(kind,) * 2)
    placement = case.placement(rng)
    even = case.n_logical % 8 == 0
    array = rng.normal(0, 1, (case.n_logical, 2)).astype(np.float32)
    sharded, whole = (NamedSharding(mesh, P(axis, "tp")) for axis in ("ep", None))
    home = jax.device_put(in_slots(array, placement), sharded)
    call = jax.jit(moe.to_id_order) if traced else moe.to_id_order
    with jax.transfer_guard("allow" if traced else "disallow"):
        ids = call(home, placement)
    np.testing.assert_array_equal(ids, array)
    if kind == AxisType.Explicit or not traced:
        assert ids.sharding.is_equivalent_to(sharded if even else whole, 2)
    back = moe.to_home_order(ids, placement)
    np.testing.assert_array_equal(back, home)
    assert back.sharding.is_equivalent_to(ids.sharding, 2)


def test_a_whole_optimiser_state_of_stacked_layers(rng):
    """Leaves of experts follow them; the rest stays the same object."""
    optax = pytest.importorskip("optax")
    old, new = (placed(rng, CASES["anywhere"], 3) for _ in range(2))

    def of_ids(*shape):
        return rng.normal(0, 1, (3, 19, *shape)).astype(np.float32)

    experts = {"up": of_ids(4, 2), "bias": of_ids(2)}
    weights = {
        "experts": jax.tree.map(lambda array: in_home_order(array, old), experts),
        "router": rng.normal(0, 1, (3, 4, 19)).astype(np.float32),
        "norm": np.ones(24, np.float32),  # as many as rows, by chance
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1), optax.adamw(1e-3), optax.ema(0.9))
    state = jax.jit(optimizer.init)(weights)
    update = jax.jit(optimizer.update)
    _, state = update(weights, state, weights)  # moments are now proportional to weights

    def is_expert(path):
        return "experts" in jax.tree_util.keystr(path)

    moved_weights, moved = moe.move_experts((weights, state), old, new, where=is_expert)
    wanted = weights | {
        "experts": jax.tree.map(lambda array: in_home_order(array, new), experts),
    }
    jax.tree.map(np.testing.assert_array_equal, moved_weights, wanted)
    _, expected = update(wanted, jax.jit(optimizer.init)(wanted), wanted)
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(moved),
        jax.tree.leaves(expected),
        jax.tree.leaves(state),
        strict=True,
    )
    n_moved = 0
    for (path, leaf), want, before in pairs:
        np.testing.assert_allclose(leaf, want, rtol=1e-6)
        assert is_expert(path) or leaf is before
        n_moved += is_expert(path)
    assert n_moved == 2 * 3  # two arrays; both moments and the average


def test_fresh_arrays_stay_free_to_go_anywhere(rng, cpu_devices):
    """Uncommitted arrays can still be arguments together with sharded ones."""
    placement = CASES["anywhere"].placement(rng)
    sharded = jax.device_put(np.ones(24), NamedSharding(Mesh(cpu_devices, "ep"), P("ep")))
    for fresh in (np.ones(19), jnp.ones(19)):
        home = moe.to_home_order(fresh, placement)
        assert not home.committed
        assert not moe.to_id_order(home, placement).committed
        assert float(jax.jit(lambda a, b: (a + b).sum())(home, sharded)) == 24 + 19
    bound = jax.device_put(np.ones(19), cpu_devices[3])
    assert moe.to_home_order(bound, placement).devices() == {cpu_devices[3]}


def test_contradictions_are_refused(rng):
    placement = CASES["anywhere"].placement(rng)
    for function, n, other in ((moe.to_home_order, 19, 24), (moe.to_id_order, 24, 19)):
        assert function(np.zeros(n), placement).shape == (other,)
        words = rf"^weights: expected arrays \[n_rows, …\] = \[{n}, …\] or scalars, got \[7\]"
        with pytest.raises(ValueError, match=words):
            function(np.zeros(7), placement)
        with pytest.raises(TypeError, match=r"^placement: expected a lplb_jax\.Placement, got int"):
            function(np.zeros(n), 3)
    table = np.full((8, 4), -1)
    table.ravel()[:19] = np.arange(19)
    crowded = Placement.from_phy2log(table, ep_size=8)
    with pytest.raises(ValueError, match=r"^placement: .*at most 3 experts, got 4 on rank 0"):
        moe.to_home_order(jnp.zeros(19), crowded)
