"""Copies chosen for a batch: against an independent implementation in Python's integers."""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from any_cases import SIZES, Sizes
from cases import INT32_MAX, Case, counts_of, spoiled
from jax.sharding import Mesh, PartitionSpec
from oracles import tokens_at_slots
from steps import assert_same, on_cpu, repeated

from lplb_jax import (
    Placement,
    Split,
    Status,
    _native,
    assign,
    init_comm,
    metrics,
    place_copies,
    place_experts,
    rebalance,
    reference,
    solve,
    topologies,
)

NAMES = ["one rank", "no room", "3 x 4", "8 x 6", "16 x 5", "65 x 2"]


def homes_somewhere(rng, sizes: Sizes) -> Placement:
    """Homes in any slots of any ranks, and anything in the other slots."""
    return Placement.from_phy2log(
        sizes.phy2log(rng).reshape(sizes.ep_size, -1),
        ep_size=sizes.ep_size,
        n_logical=sizes.n_logical,
    )


def stacked_problems(rng, sizes: Sizes, n: int):
    """Placements and loads by source; many loads are equal or 0, so that ties are the rule."""
    placements = [homes_somewhere(rng, sizes) for _ in range(n)]
    loads = np.zeros((n, sizes.ep_size, sizes.n_logical), np.int32)
    for i in range(n):
        heat = rng.zipf(1.3, sizes.n_logical) % 1000 if i % 2 else np.ones(sizes.n_logical)
        total = rng.integers(0, rng.choice([2, 4, 10**5]), sizes.n_logical) * heat
        for source in rng.integers(0, sizes.ep_size, 2):
            loads[i, source] += (total % 2**24).astype(np.int32)
    return loads, jax.tree.map(lambda *rows: np.stack(rows), *placements)


def chosen_slowly(
    loads: list[int], placement: Placement, fan_out: float
) -> tuple[list[int], list[int]]:
    """phy2log and quotas of the best attempt: all of them, one after the other."""
    n_slots = placement.n_physical // placement.ep_size
    home = {int(slot): e for e, slot in enumerate(placement.log2phy[:, 0])}
    at_home = [0] * placement.ep_size
    for slot, e in home.items():
        at_home[slot // n_slots] += loads[e]
    mean, most = -(-sum(loads) // placement.ep_size), max(at_home)
    tried = []
    for i in range(1, 33):
        target = mean + ((most - mean) * i**2 // 1024) * i**2 // 1024
        load, left, sent = list(at_home), list(loads), [0] * placement.ep_size
        held = [home.get(slot, -1) for slot in range(placement.n_physical)]
        taken = {}
        n_copies = 0
        while max(load) > target:
            rank = load.index(max(load))
            e = max((home[s] for s in sorted(home) if s // n_slots == rank), key=left.__getitem__)
            free = [s for s, of in enumerate(held) if of < 0 and load[s // n_slots] < target]
            if not free or sent[rank] == fan_out:
                break
            slot = min(free, key=lambda s: (load[s // n_slots], s))
            to = slot // n_slots
            moved = min(load[rank] - target, left[e], target - load[to])
            load[rank] -= moved
            load[to] += moved
            left[e] -= moved
            held[slot] = e
            taken[slot] = moved
            sent[rank] += 1
            n_copies += 1
        else:
            quota = [taken.get(s, 0 if e < 0 else left[e]) for s, e in enumerate(held)]
            tried.append((target, n_copies, i, held, quota))
    good = [one for one in tried if one[0] - tried[0][0] <= mean // 512]
    return min(good, key=lambda one: (one[1], one[2]))[3:]


@on_cpu
@functools.partial(jax.jit, static_argnames="fan_out")
def spec(loads, placements, *, fan_out):
    """phy2log, log2phy and logcnt, with a leading axis."""

    def one(loads, placement):
        sizes = {"ep_size": placement.ep_size, "fan_out": fan_out}
        return reference.place_copies(loads, placement.phy2log, placement.log2phy, **sizes)

    return jax.vmap(one)(loads, placements)


def tables_of(placement):
    return placement.phy2log, placement.log2phy, placement.logcnt


@functools.partial(jax.jit, static_argnums=2)
def with_copies(loads, placements, fan_out=None):
    """Chosen copies, the best split over them, and the split without any."""

    def one(loads, placement):
        chosen = place_copies(loads, placement, fan_out=fan_out)
        return chosen, *(solve(loads, placement=of) for of in (chosen, homes_alone(placement)))

    return jax.vmap(one)(loads, placements)


def homes_alone(placement: Placement) -> Placement:
    """Without any copies."""
    home = placement.log2phy[:, 0]
    held = jnp.arange(placement.n_logical, dtype=jnp.int32)
    phy2log = jnp.full(placement.n_physical, -1, jnp.int32).at[home].set(held)
    return Placement(phy2log, home[:, None], jnp.ones_like(home), placement.ep_size)


@pytest.mark.parametrize("name", NAMES)
def test_the_method(rng, name):
    """By native code and by the specification: the same bits as by the implementation here."""
    sizes = SIZES[name]
    n = 6 if sizes.ep_size > 16 else 20
    fan_out = [None, 1, 2][rng.integers(3)]
    loads, placements = stacked_problems(rng, sizes, n)
    chosen, ours, none = jax.tree.map(np.asarray, with_copies(loads, placements, fan_out))
    limit = fan_out or sizes.n_physical
    assert_same(tables_of(chosen), spec(loads, placements, fan_out=limit))
    assert not ours.status.any()
    assert (ours.max_load <= none.max_load).all()
    for i in range(n):
        one, of_one = (jax.tree.map(lambda x, i=i: x[i], of) for of in (placements, chosen))
        total = loads[i].sum(axis=0, dtype=np.int32)
        assert of_one.phy2log.tolist() == chosen_slowly(total.tolist(), one, limit)[0]
        assert_tables(of_one, one.log2phy[:, 0])
        again = place_copies(total, of_one, fan_out=fan_out)  # whose tables are checked as values
        assert_same(again, of_one)


def assert_tables(placement: Placement, homes: np.ndarray) -> None:
    """Homes first, then the copies in rank order, no expert twice on a rank."""
    for row in placement.phy2log.reshape(placement.ep_size, -1):
        assert len(set(row[row >= 0])) == (row >= 0).sum()
    for e, slots in enumerate(placement.log2phy):
        copies = [s for s in np.flatnonzero(placement.phy2log == e) if s != homes[e]]
        expected = [homes[e], *copies]
        assert slots.tolist() == expected + [-1] * (len(slots) - len(expected))
        assert placement.logcnt[e] == len(expected)


def test_two_slots_are_nearly_enough_for_perfect_balance(rng):
    """One expert has 45 times the mean load, with no prior knowledge."""
    empty = np.pad(np.arange(256).reshape(64, 4), [(0, 0), (0, 2)], constant_values=-1)
    empty = Placement.from_phy2log(empty, ep_size=64)
    weight = rng.gamma(4, 1, 256)
    weight[rng.integers(256)] = 45 * weight.mean()
    loads = rng.multinomial(2**18, weight / weight.sum()).astype(np.int32)
    chosen, ours, none = with_copies(*repeated((loads, empty), 1))
    ours = jax.tree.map(lambda x: x[0], ours)
    assert none.max_load[0, 0] > 9 * loads.sum() // 64
    assert metrics.mean_gap(ours, 64) < 0.01
    assert 40 <= (np.asarray(chosen.phy2log) >= 0).sum() - 256 <= 68


def test_of_a_placement_along_a_topology(rng):
    """Its own experts stay in their slots; the topology no longer says what is copied."""
    case = Case(topologies.cube(), 4)
    placement = case.placement(rng)
    loads = (rng.zipf(1.3, 32) % 1000).astype(np.int32)
    chosen = place_copies(loads, placement)
    own = np.asarray(placement.phy2log).reshape(8, -1)[:, :4]
    assert chosen.topology is None
    np.testing.assert_array_equal(np.asarray(chosen.phy2log).reshape(8, -1)[:, :4], own)
    anywhere = Placement.from_phy2log(placement.phy2log, ep_size=8)
    same_homes = Placement(anywhere.phy2log, placement.log2phy, placement.logcnt, 8)
    assert_same(chosen, place_copies(loads, same_homes))


def test_loads_that_are_too_large(rng):
    """A sum of 2³¹ gives no copies; one less is balanced normally."""
    sizes = SIZES["5 x 7"]
    placement = homes_somewhere(rng, sizes)
    loads = np.zeros((5, 11), np.int64)
    loads[rng.integers(5), rng.integers(11)] = INT32_MAX - 20
    loads[rng.integers(5), rng.integers(11)] += 20
    for more, copies in ((0, True), (1, False)):
        loads[0, 0] += more
        chosen = place_copies(loads.astype(np.int32), placement)
        assert ((np.asarray(chosen.phy2log) >= 0).sum() > 11) == copies
        expected = spec(*repeated((loads.astype(np.int32), placement), 1), fan_out=35)
        assert_same(tables_of(chosen), [x[0] for x in expected])
        if copies:
            split = solve(loads.astype(np.int32), placement=chosen)
            assert split.status.tolist() == [0]
            assert int(split.max_load[0]) < INT32_MAX // 2


def test_negative_loads_count_as_none(rng):
    sizes = SIZES["8 x 6"]
    loads, placements = stacked_problems(rng, sizes, 1)
    placement = jax.tree.map(lambda x: x[0], placements)
    loads[0, 3, 5] = -7
    chosen = place_copies(loads[0], placement)
    assert_same(chosen, place_copies(loads[0].clip(0), placement))
    assert solve(loads[0], placement=chosen).status.tolist() == [Status.NEGATIVE_LOAD]


def test_garbage_is_the_same_garbage_everywhere(rng):
    """No crash, and valid slots; the status reports a home that holds another expert."""
    loads, placements = stacked_problems(rng, SIZES["3 x 4"], 40)
    loads[::3] = spoiled(rng, loads[::3])
    right = placements
    placements = jax.tree.map(lambda x: spoiled(rng, x), placements)
    chosen = jax.jit(jax.vmap(place_copies))(loads, placements)
    limit = right.n_physical
    assert_same(tables_of(chosen), spec(loads, placements, fan_out=limit))
    splits = jax.jit(jax.vmap(lambda loads, of: solve(loads, placement=of)))(loads, chosen)
    for i in range(40):
        homes, held = placements.log2phy[i][:, 0], placements.phy2log[i]
        inside = (homes >= 0) & (homes < len(held))
        fits = inside & (held[np.where(inside, homes, 0)] == np.arange(len(homes)))
        assert bool(splits.status[i][0] & Status.BAD_PLACEMENT) == (not fits.all())


def test_under_jit_scan_checkpoint_and_differentiation(rng):
    sizes = SIZES["8 x 6"]
    loads, placements = stacked_problems(rng, sizes, 5)
    expected = [
        place_copies(loads[i], jax.tree.map(lambda x, i=i: x[i], placements)) for i in range(5)
    ]
    expected = jax.tree.map(lambda *rows: np.stack(rows), *expected)

    def step(carry, problem):
        return carry, place_copies(*problem)

    scanned = jax.jit(lambda *problems: jax.lax.scan(step, 0, problems)[1])(loads, placements)
    assert_same(scanned, expected)

    @jax.checkpoint
    def scaled(x, placement):
        return (x * place_copies(loads[0], placement).phy2log).sum()

    one = jax.tree.map(lambda x: x[0], placements)
    grad = jax.jit(jax.grad(scaled))(jnp.ones(sizes.n_physical), one)
    np.testing.assert_array_equal(grad, expected.phy2log[0])


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.filterwarnings("ignore:lplb_jax was installed without")
def test_under_shard_map(rng, cpu_devices, monkeypatch, check_vma, native):
    """Loads vary over the ranks or not, and so do the tables."""
    sizes = SIZES["3 x 4"]
    loads, placements = stacked_problems(rng, sizes, 8)
    one = jax.tree.map(lambda x: x[0], placements)
    expected = [place_copies(rows, one) for rows in loads]
    if not native:
        monkeypatch.setattr(_native, "AVAILABLE", {})
    axis, everywhere = PartitionSpec("ep"), PartitionSpec()

    def choose(loads, placement):
        ours, of_all = place_copies(loads[0], placement), place_copies(placement.logcnt, placement)
        return jax.tree.map(lambda x: x[None], ours), of_all

    mapped = jax.shard_map(
        choose,
        mesh=Mesh(cpu_devices, "ep"),
        in_specs=(axis, everywhere),
        out_specs=(axis, everywhere),
        check_vma=check_vma,
    )
    ours, of_all = jax.jit(mapped)(loads, one)
    assert_same(ours, jax.tree.map(lambda *rows: np.stack(rows), *expected))
    assert_same(of_all, place_copies(one.logcnt, one))


def test_a_module_without_this_target_runs_the_reference(rng, monkeypatch, recwarn):
    """Like a CUDA module without the kernel; no warning."""
    loads, placements = stacked_problems(rng, SIZES["5 x 7"], 1)
    one = jax.tree.map(lambda x: x[0], placements)
    expected = place_copies(loads[0], one)
    others = tuple(name for name in _native.AVAILABLE["cpu"] if name != "lplb_place_copies")
    monkeypatch.setattr(_native, "AVAILABLE", {"cpu": others})
    run = jax.jit(lambda loads, placement: place_copies(loads, placement))
    assert "lplb_place_copies" not in run.lower(loads[0], one).as_text()
    assert_same(run(loads[0], one), expected)
    assert not recwarn.list


def test_steps_where_a_gpu_has_no_room_for_one_launch(rng, monkeypatch):
    """The same bits as at once; what does not choose copies still goes at once, if it fits."""

    def refused_if_it_chooses(problem, quotas, chooses, n_tokens, device):
        assert (problem, n_tokens) == ((8, 8, 0, 19, 32, width), 64 * 3)
        assert (quotas, device) == ("solved", "the GPU")
        if chooses:
            raise ValueError("the tables need more")

    sizes = Sizes(8, 4, 19)
    placement = homes_somewhere(rng, sizes)
    width = placement.log2phy.shape[1]
    ids = rng.integers(-1, 19, (64, 3)).astype(np.int32)

    def run(copies):
        function = functools.partial(rebalance, placement=placement, positions=True, copies=copies)
        program = str(jax.make_jaxpr(lambda ids: function(ids, None))(ids))
        return function(ids, None), "lplb_rebalance" in program, "lplb_solve" in program

    want, *at_once = run("batch")
    assert at_once == [True, False]
    fake = types.SimpleNamespace(
        current_device=lambda: "the GPU", route_shape=refused_if_it_chooses
    )
    monkeypatch.setattr(_native, "cuda", lambda: fake)
    assert run("batch")[1:] == (True, False)  # No query without a GPU.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    got, *at_once = run("batch")
    assert at_once == [False, True]
    assert_same(jax.tree.leaves(got), jax.tree.leaves(want))
    assert run("placement")[1:] == (True, False)


def test_bad_arguments():
    placement = place_experts(None, n_logical=4, ep_size=2, redundants_per_rank=1)
    loads = np.ones(4, np.int32)
    for error, words, arguments, options in (
        (TypeError, "^placement: expected a lplb_jax.Placement.*NoneType", (loads, None), {}),
        (TypeError, "^loads: .*got float32", (loads.astype(np.float32), placement), {}),
        (ValueError, r"^loads: .*got \[5\]", (np.ones(5, np.int32), placement), {}),
        (ValueError, r"^loads: .*got \[3, 4\]", (np.ones((3, 4), np.int32), placement), {}),
        (ValueError, "^fan_out: .*got 0", (loads, placement), {"fan_out": 0}),
        (ValueError, "^fan_out: .*got 1.5", (loads, placement), {"fan_out": 1.5}),
    ):
        with pytest.raises(error, match=words):
            place_copies(*arguments, **options)
    ids, ring = np.zeros(3, np.int32), topologies.ring(2)
    batch = {"placement": placement, "copies": "batch"}
    for error, words, options in (
        (ValueError, "^copies: .*placement, batch, got 'step'", {**batch, "copies": "step"}),
        (ValueError, "^fan_out: .*got 2", {"placement": placement, "fan_out": 2}),
        (ValueError, "^fan_out: .*got 0", {**batch, "fan_out": 0}),
        (ValueError, "^r2o: expected None with copies='batch'", {**batch, "r2o": ring}),
        (TypeError, "^placement: .*got NoneType", {"copies": "batch"}),
    ):
        with pytest.raises(error, match=words):
            rebalance(ids, None, **options)


@functools.partial(jax.jit, static_argnames="ep_size")
def solve_from(loads, tables, start, *, ep_size):
    no_topology = jnp.zeros((ep_size, 0), jnp.int32)
    return reference.solve(loads[None], *tables, no_topology, ep_size=ep_size, start=start)


def step_by_step(ids, loads, placement, given, fan_out=None):
    """What rebalance does with copies="batch", step by step.

    The copies are those of `place_copies`, and the largest load is that of `solve`; but the solver
    starts from the tokens that were moved when the copies were chosen.
    """
    chosen = place_copies(loads, placement, fan_out=fan_out)
    split = solve(loads, placement=chosen)
    total = loads.reshape(-1, placement.n_logical).sum(axis=0, dtype=np.int32)
    held, quota = chosen_slowly(total.tolist(), placement, fan_out or placement.n_physical)
    assert chosen.phy2log.tolist() == held
    tables = chosen.phy2log, chosen.log2phy
    ours = on_cpu(solve_from)(total, tables, np.int32(quota), ep_size=placement.ep_size)
    ours = Split(*ours)
    assert_same(ours[1:], split[1:])  # Another start is no other problem.
    by_rank = np.reshape(quota, (placement.ep_size, -1)).sum(axis=1)
    if by_rank.max() == -(-total.sum() // placement.ep_size):  # Nothing is left to do.
        np.testing.assert_array_equal(ours.quota, quota)
    return assign(ids, given, ours, placement=chosen, positions=True), ours, chosen


def tokens(rng, sizes: Sizes) -> np.ndarray:
    weight = rng.zipf(1.5, sizes.n_logical)
    ids = rng.choice(sizes.n_logical, (sizes.ep_size, 60), p=weight / weight.sum())
    return np.where(rng.random(ids.shape) < 0.1, -1, ids).astype(np.int32)


@pytest.mark.parametrize("given", ["none", "counts", "estimates"])
def test_rebalance(rng, given):
    sizes = SIZES["8 x 6"]
    placement, ids = homes_somewhere(rng, sizes), tokens(rng, sizes)
    counts = counts_of(ids, sizes.n_logical)
    total = counts.sum(axis=0, dtype=np.int32)
    loads = {"none": total, "counts": counts, "estimates": 3 * total}[given]
    options: dict[str, Any] = {
        "placement": placement,
        "copies": "batch",
        "fan_out": 2,
        "positions": True,
    }
    result = rebalance(ids, None if given == "none" else loads, **options)
    known = None if given == "none" else loads
    assert_same(result, step_by_step(ids, loads, placement, known, fan_out=2))
    run = jax.jit(lambda ids, loads, placement: rebalance(ids, loads, **options))
    assert_same(run(ids, known, placement), result)
    wrong = np.where(ids == ids.max(), sizes.n_logical, ids)
    loads = None if given == "none" else loads
    assert rebalance(wrong, loads, **options)[1].status.tolist() == [Status.INVALID_INDEX]


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("by_comm", [True, False])
def test_rebalance_over_ranks(rng, cpu_devices, check_vma, by_comm):
    """Every rank chooses the same copies, and together they fill the quotas."""
    sizes = SIZES["8 x 6"]
    placement, ids = homes_somewhere(rng, sizes), tokens(rng, sizes)
    mesh = Mesh(cpu_devices, "ep")
    axis, everywhere = PartitionSpec("ep"), PartitionSpec()

    with init_comm(mesh, max_experts=sizes.n_logical) as comm:

        def route(ids, placement):
            return rebalance(
                ids,
                None,
                placement=placement,
                copies="batch",
                axis_name="ep",
                comm=comm if by_comm else None,
            )

        mapped = jax.shard_map(
            route,
            mesh=mesh,
            in_specs=(axis, everywhere),
            out_specs=(axis, everywhere, everywhere),
            check_vma=check_vma,
        )
        result = jax.jit(mapped)(ids, placement)
    counts = counts_of(ids, sizes.n_logical)
    assigned, split, chosen = step_by_step(ids, counts, placement, counts)
    assert_same(result, (assigned.physical_indices, split, chosen))
    np.testing.assert_array_equal(tokens_at_slots(result[0], sizes.n_physical), split.quota)
