"""Any placement on an NVIDIA GPU: the CPU's bits, whatever the table, loads and tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from any_cases import SIZES, Sizes, loads_for, without_a_slot
from cases import spoiled
from steps import assert_same
from test_batch_copies import stacked_problems

from lplb_jax import Placement, Status, assign, count_loads, place_copies, rebalance, solve

pytestmark = pytest.mark.gpu

# Around the words of rank sets (32, 64, 128 ranks) and the threads of a block, up to the most.
SHAPES = SIZES | {
    "32 x 10": Sizes(32, 10, 256),
    "144 x 3": Sizes(144, 3, 288),
    "256 x 3": Sizes(256, 3, 500),
    "320 x 2": Sizes(320, 2, 512),
    "512 x 2": Sizes(512, 2, 600),
}


def on(platform: str, function, *arguments):
    """The results of jitted `function` there, as NumPy arrays."""
    device = jax.devices(platform)[0]
    with jax.default_device(device):
        result = jax.jit(function)(*jax.device_put(arguments, device))
    for array in jax.tree.leaves(result):
        assert {d.platform for d in array.devices()} == {platform}
    return jax.tree.map(np.asarray, result)


def same_on_both(function, *arguments):
    """The GPU's result, which must equal the CPU's."""
    on_gpu = on("gpu", function, *arguments)
    assert_same(jax.tree.leaves(on_gpu), jax.tree.leaves(on("cpu", function, *arguments)))
    return on_gpu


def table_of(rng: np.random.Generator, sizes: Sizes) -> np.ndarray:
    kind = sizes.phy2log if rng.random() < 0.7 else sizes.phy2log_one_everywhere
    return kind(rng).reshape(sizes.ep_size, -1)


def placement_of(rng: np.random.Generator, sizes: Sizes, n_nodes: int = 1) -> Placement:
    return Placement.from_phy2log(
        table_of(rng, sizes), ep_size=sizes.ep_size, n_logical=sizes.n_logical, n_nodes=n_nodes
    )


def stacked(rng: np.random.Generator, sizes: Sizes, n: int) -> Placement:
    return Placement.from_phy2log(
        np.stack([table_of(rng, sizes) for _ in range(n)]),
        ep_size=sizes.ep_size,
        n_logical=sizes.n_logical,
    )


def tokens(rng: np.random.Generator, sizes: Sizes, *shape: int) -> np.ndarray:
    """Ids of a random skew; now and then none, or one that is no expert."""
    heat = rng.random(sizes.n_logical) ** rng.choice([0, 1, 8])
    ids = rng.choice(sizes.n_logical, shape, p=heat / heat.sum())
    return np.where(rng.random(shape) < 0.02, rng.choice([-1, sizes.n_logical]), ids).astype(
        np.int32
    )


@pytest.mark.parametrize("name", SHAPES)
def test_solve(rng, name):
    sizes = SHAPES[name]
    n = 40 if sizes.n_physical < 2000 else 4
    placements = stacked(rng, sizes, n)
    loads = np.stack(
        [loads_for(rng, sizes, sizes.hosts(table)) for table in np.asarray(placements.phy2log)]
    )
    split = same_on_both(
        jax.vmap(lambda loads, placement: solve(loads, placement=placement)), loads, placements
    )
    assert not split.status.any()
    np.testing.assert_array_equal(split.max_load, split.lower_bound)


@pytest.mark.parametrize("name", ["3 x 4", "8 x 40", "64 x 6", "128 x 3", "256 x 3"])
def test_solve_by_source_with_bad_loads(rng, name):
    """Negative loads, invalid ids, and rank loads above int32's range."""
    sizes = SHAPES[name]
    placement = placement_of(rng, sizes)
    for high in (100, 2**31 - 1):
        loads = rng.integers(0, high, (sizes.ep_size, sizes.n_logical)).astype(np.int32)
        loads[rng.integers(sizes.ep_size), rng.integers(sizes.n_logical)] = -1
        split = same_on_both(lambda loads: solve(loads, placement=placement), loads)
        assert split.status[0] & Status.NEGATIVE_LOAD
        assert bool(split.status[0] & Status.LOAD_OVERFLOW) == (high > 100 or sizes.ep_size == 1)


@pytest.mark.parametrize("name", ["one rank", "3 x 4", "8 x 6", "64 x 6", "144 x 3"])
def test_tables_that_contradict_themselves(rng, name):
    """Traced, so that only the solver sees them: no address leaves its buffer, the bits agree."""
    sizes = SHAPES[name]
    good = placement_of(rng, sizes)
    loads = rng.integers(0, 100, sizes.n_logical).astype(np.int32)
    for _ in range(20):
        phy2log, log2phy = np.array(good.phy2log), np.array(good.log2phy)
        spoilt = phy2log if rng.random() < 0.5 else log2phy
        where = tuple(rng.integers(0, spoilt.shape))
        if spoilt is log2phy:
            where = (where[0], 0)
        spoilt[where] = rng.choice([-(2**31), -7, -1, 0, sizes.n_logical, 2**31 - 1])
        placement = Placement(phy2log, log2phy, good.logcnt, sizes.ep_size)
        same_on_both(
            lambda loads, placement: solve(loads, placement=placement).status, loads, placement
        )


@pytest.mark.parametrize("name", ["3 x 4", "8 x 6", "64 x 6", "144 x 3"])
def test_experts_without_a_slot(rng, name):
    """Their loads, of any value, set no bit."""
    sizes = SHAPES[name]
    tables, loads = without_a_slot(rng, sizes, 24)
    options = {"ep_size": sizes.ep_size, "n_logical": sizes.n_logical}

    def run(table, loads):
        return solve(loads, placement=Placement.from_phy2log(table, **options))

    same_on_both(jax.vmap(run), tables.reshape(24, sizes.ep_size, -1), loads)


@pytest.mark.parametrize("fan_out", [None, 1, 3])
@pytest.mark.parametrize("name", SHAPES)
def test_place_copies(rng, name, fan_out):
    """The same tables, for a batch of problems in which ties are the rule, and of large loads."""
    sizes = SHAPES[name]
    loads, placements = stacked_problems(rng, sizes, 8)
    # One exceeds int32 on its experts, one only in total.
    loads[0, 0] = 2**31 - 1
    loads[1] = 0
    loads[1, 0] = 2 * (2**30 // sizes.n_logical)
    choose = jax.vmap(lambda loads, p: place_copies(loads, p, fan_out=fan_out))
    chosen = same_on_both(choose, loads, placements)
    assert (chosen.phy2log[0] >= 0).sum() == sizes.n_logical


@pytest.mark.parametrize("name", ["one rank", "3 x 4", "8 x 6", "64 x 6", "144 x 3"])
def test_place_copies_of_tables_that_contradict_themselves(rng, name):
    sizes = SHAPES[name]
    loads, placements = stacked_problems(rng, sizes, 20)
    spoilt = jax.tree.map(lambda array: spoiled(rng, array), placements)
    same_on_both(jax.vmap(place_copies), loads, spoilt)


@pytest.mark.parametrize("n_tokens", [0, 1, 700, 8192, 30_000, 300_000])
@pytest.mark.parametrize("name", ["one rank", "5 x 7", "8 x 40", "33 x 3", "64 x 6", "128 x 3"])
def test_rebalance(rng, name, n_tokens):
    """In one launch and in two, for a batch with one placement per instance."""
    sizes = SHAPES[name]
    ids, placements = tokens(rng, sizes, 2, n_tokens), stacked(rng, sizes, 2)
    assignment, split = same_on_both(
        jax.vmap(lambda ids, p: rebalance(ids, None, placement=p, positions=True)), ids, placements
    )
    for row, quota, counts in zip(ids, split.quota, assignment.counts, strict=True):
        n_valid = ((row >= 0) & (row < sizes.n_logical)).sum()
        assert quota.sum() == counts.sum() == n_valid


@pytest.mark.parametrize("n_tokens", [0, 1, 700, 1500, 8192, 30_000, 300_000])
@pytest.mark.parametrize("name", ["one rank", "5 x 7", "8 x 40", "33 x 3", "64 x 6", "512 x 2"])
def test_rebalance_over_copies_of_the_batch(rng, name, n_tokens):
    """In one launch, by clusters of every size, and in two; of homes anywhere."""
    sizes = SHAPES[name]
    ids, (_, placements) = tokens(rng, sizes, 3, n_tokens), stacked_problems(rng, sizes, 3)
    fan_out = int(rng.choice([1, 2, sizes.n_logical]))

    def step(ids, placement):
        options = {"positions": True, "copies": "batch", "fan_out": fan_out}
        return rebalance(ids, None, placement=placement, **options)

    assignment, split, chosen = same_on_both(jax.vmap(step), ids, placements)
    counts = np.stack(
        [
            np.bincount(row[(row >= 0) & (row < sizes.n_logical)], minlength=sizes.n_logical)
            for row in ids
        ]
    )
    alone = jax.vmap(lambda loads, p: place_copies(loads, p, fan_out=fan_out))
    assert_same(
        jax.tree.leaves(chosen),
        jax.tree.leaves(on("cpu", alone, counts.astype(np.int32), placements)),
    )
    np.testing.assert_array_equal(split.max_load, split.lower_bound)
    np.testing.assert_array_equal(assignment.counts, split.quota)


@pytest.mark.parametrize("n_tokens", [700, 30_000, 300_000])
@pytest.mark.parametrize("name", ["3 x 4", "8 x 6", "64 x 6"])
def test_rebalance_over_copies_of_tables_that_contradict_themselves(rng, name, n_tokens):
    sizes = SHAPES[name]
    ids, (_, placements) = tokens(rng, sizes, 6, n_tokens), stacked_problems(rng, sizes, 6)
    spoilt = jax.tree.map(lambda array: spoiled(rng, array), placements)
    step = jax.vmap(lambda ids, p: rebalance(ids, None, placement=p, copies="batch"))
    same_on_both(step, ids, spoilt)


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.uint8])
@pytest.mark.parametrize("name", ["3 x 4", "8 x 6", "16 x 5", "64 x 6", "512 x 2"])
def test_assign(rng, name, dtype):
    """Counts of all sources, over nodes of every size; estimates; and a batch of its own."""
    sizes = SHAPES[name]
    ids = tokens(rng, sizes, sizes.ep_size, 500)
    ids = np.where((ids < 0) | (ids >= np.iinfo(dtype).max), np.iinfo(dtype).max, ids)
    ids = ids.astype(dtype)
    counts = np.stack([count_loads(row, sizes.n_logical) for row in ids])
    nodes = [n for n in range(1, sizes.ep_size + 1) if sizes.ep_size % n == 0]
    placement = placement_of(rng, sizes, int(rng.choice(nodes)))

    def by_source(ids, counts, placement):
        split = solve(counts, placement=placement)
        return assign(ids, counts, split, placement=placement, positions=True), split

    assignment, split = same_on_both(by_source, ids, counts, placement)
    np.testing.assert_array_equal(assignment.counts.sum(axis=0), split.quota)

    def estimated(ids, loads, placement):
        split = solve(loads, placement=placement)
        return assign(ids, loads, split, placement=placement, positions=True)

    same_on_both(estimated, ids[0], counts.sum(axis=0, dtype=np.int32), placement)

    def alone(ids, placement):
        split = solve(count_loads(ids, sizes.n_logical), placement=placement)
        return assign(ids, None, split, placement=placement, positions=True)

    same_on_both(alone, ids[0], placement)


@pytest.mark.parametrize("high", [50, 2**31 - 1])
@pytest.mark.parametrize("name", ["3 x 4", "16 x 5", "64 x 6"])
def test_assign_of_quotas_made_by_hand(rng, name, high):
    """Too few, too many, negative: no token is lost, none leaves its buffer."""
    sizes = SHAPES[name]
    placement = placement_of(rng, sizes)
    ids = tokens(rng, sizes, sizes.ep_size, 300)
    counts = np.stack([count_loads(row, sizes.n_logical) for row in ids])
    split = solve(jnp.asarray(counts), placement=placement)
    quota = rng.integers(-5, high, sizes.n_physical).astype(np.int32)
    assignment = same_on_both(
        lambda ids, counts, quota: assign(
            ids, counts, split._replace(quota=quota), placement=placement, positions=True
        ),
        ids,
        counts,
        quota,
    )
    valid = (ids >= 0) & (ids < sizes.n_logical)
    np.testing.assert_array_equal(assignment.physical_indices >= 0, valid)
