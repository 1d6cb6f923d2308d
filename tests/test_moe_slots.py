"""Copies of any placement: what travels, over which links, and where the gradients go."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from moe_checks import HIDDEN, AnyCase, problem, skewed

from lplb_jax import Placement, moe, topologies
from lplb_jax.moe import copies, slots
from lplb_jax.moe.transports import COLLECTIVES
from lplb_jax.placement import place_experts


def hot(rng, case):
    """One expert on almost every rank with a spare slot; few others have copies."""
    placement = case.placement(rng)
    spare = np.setdiff1d(np.arange(placement.n_physical), placement.log2phy[:, 0])
    table = placement.phy2log.copy()
    table[spare] = rng.integers(case.n_logical)
    others = spare[rng.random(len(spare)) < 0.2]
    table[others] = rng.integers(-1, case.n_logical, len(others))
    return Placement.from_phy2log(table, ep_size=case.ep_size, n_logical=case.n_logical)


@functools.partial(jax.jit, static_argnames=("used", "fan_out", "transport", "n_nodes"))
def fetch_of(placement, loads, *, used, fan_out=None, transport="ragged", n_nodes=None):
    rows = slots.slots_by_row(placement)
    fetch = slots.fetch_anywhere(
        placement,
        rows,
        "ep",
        COLLECTIVES[transport],
        slot_loads=loads if used else None,
        fan_out=fan_out,
        n_nodes=n_nodes,
    )
    return rows, fetch


def check_journeys(placement, loads, rows, fetch, used):
    """Follows every copy; returns the sends of each rank in each round."""
    n_ranks, n_local, limits = placement.ep_size, fetch.n_local, fetch.limits
    table = placement.phy2log.reshape(n_ranks, -1)
    loads = loads.reshape(table.shape)
    expert = np.full(rows.shape, -1)
    filled = rows < table.shape[1]
    expert[filled] = table[np.nonzero(filled)[0], rows[filled]]
    has = [set(expert[rank, :n_local]) - {-1} for rank in range(n_ranks)]
    assert sum(map(len, has)) == placement.n_logical
    homes = placement.log2phy[:, 0] // table.shape[1]
    sends = np.zeros((fetch.limits.rounds, n_ranks), int)
    moved = fetch.round >= 0
    for n in range(fetch.limits.rounds):
        received = [set() for _ in range(n_ranks)]
        places, children = set(), set()
        for rank, c in np.argwhere(fetch.round == n):
            peer, row, child = (int(a[rank, c]) for a in (fetch.peer, fetch.row, fetch.child))
            sent = expert[peer, row] if n == 0 else expert[peer, n_local + row]
            assert sent == expert[rank, n_local + c] >= 0
            assert sent in has[peer]
            received[rank].add(sent)
            sends[n, peer] += 1
            assert 0 <= child < (limits.sent if n == 0 else limits.relayed)
            children.add((peer, row, child))
            room = fetch.n_received if n == 0 else fetch.n_copies * limits.relayed
            assert 0 <= fetch.place[rank, c] < room
            places.add((peer, int(fetch.place[rank, c])))
        assert len(children) == len(places) == (fetch.round == n).sum()
        for rank in range(n_ranks):
            has[rank] |= received[rank]
    there = expert[:, n_local:] >= 0
    if used:
        busy = np.zeros_like(there)
        at = np.nonzero(there)
        busy[at] = loads[at[0], rows[:, n_local:][at]] > 0
        there &= busy & (homes[expert[:, n_local:]] != np.arange(n_ranks)[:, None])
    np.testing.assert_array_equal(moved, there)
    return sends


@pytest.mark.parametrize("sizes", [(8, 4, 19), (2, 5, 6), (16, 5, 64), (64, 4, 250), (5, 3, 15)])
def test_every_copy_travels_once_from_a_rank_that_has_it(rng, sizes):
    """Bytes on a link as a multiple of an expert's: counted, and compared with the optimum."""
    case = AnyCase(*sizes)
    for make in (lambda: case.placement(rng), lambda: hot(rng, case)) * 2:
        placement = make()
        loads = slots_used(rng, placement).astype(np.int32)
        for used in (False, True):
            rows, fetch = jax.tree.map(np.asarray, fetch_of(placement, loads, used=used))
            sends = check_journeys(placement, loads, rows, fetch, used)
            moved, owner = fetch.round >= 0, placement.log2phy[:, 0] // sizes[1]
            # A home sends an expert to at most four ranks; a copy is passed on to three per round.
            experts = np.where(
                moved,
                placement.phy2log.reshape(sizes[0], -1)[
                    np.arange(sizes[0])[:, None], np.minimum(rows[:, fetch.n_local :], sizes[1] - 1)
                ],
                -1,
            )
            n_copies = np.bincount(experts[moved], minlength=case.n_logical)
            direct = np.bincount(owner, np.minimum(n_copies, 4), sizes[0])
            np.testing.assert_array_equal(sends[0], direct)
            assert (sends[1:].max(initial=0)) <= 3 * fetch.n_copies
            assert sends.sum() == moved.sum()
            rounds = (
                1 if n_copies.max() <= 4 else 1 + np.ceil(np.log(n_copies.max() / 4) / np.log(4))
            )
            assert fetch.round.max(initial=-1) < rounds <= fetch.limits.rounds


@pytest.mark.parametrize(
    ("sizes", "n_nodes"), [((8, 4, 19), 2), ((16, 5, 64), 4), ((64, 4, 250), 4), ((24, 3, 40), 12)]
)
def test_between_nodes_an_expert_travels_once(rng, sizes, n_nodes):
    """For any copies, used or not; homes send to four of each kind, others to three."""
    case, node_size = AnyCase(*sizes), sizes[0] // n_nodes
    for make in (lambda: case.placement(rng), lambda: hot(rng, case)):
        placement = make()
        loads = slots_used(rng, placement).astype(np.int32)
        for used in (False, True):
            rows, fetch = jax.tree.map(
                np.asarray, fetch_of(placement, loads, used=used, n_nodes=n_nodes)
            )
            check_journeys(placement, loads, rows, fetch, used)
            rank, copy = np.nonzero(fetch.round >= 0)
            expert = placement.phy2log.reshape(sizes[0], -1)[rank, rows[rank, fetch.n_local + copy]]
            sender, turn = fetch.peer[rank, copy], fetch.round[rank, copy]
            home = placement.log2phy[expert, 0] // sizes[1]
            abroad = sender // node_size != rank // node_size
            once = {*zip(expert[abroad], rank[abroad] // node_size, strict=True)}
            away = home // node_size != rank // node_size
            assert once == {*zip(expert[away], rank[away] // node_size, strict=True)}
            assert len(once) == abroad.sum()
            if used:  # Then a rank has one copy of an expert at most, and the limits are its own.
                assert len({*zip(expert, rank, strict=True)}) == len(expert)
            # Where two slots of a rank have copies of one expert, each passes it on.
            passed = np.where(turn == 0, -1, fetch.row[rank, copy])
            sends = [*zip(expert, sender, passed, turn, abroad & (turn == 0), strict=True)]
            for of_one in set(sends):
                assert sends.count(of_one) <= (4 if of_one[3] == 0 else 3)


def slots_used(rng, placement):
    """0 to 2 for every slot; of an expert's slots on a rank, a rank uses the first."""
    loads = rng.integers(0, 3, placement.n_physical)
    rows = zip(
        loads.reshape(placement.ep_size, -1),
        placement.phy2log.reshape(placement.ep_size, -1),
        strict=True,
    )
    for row, held in rows:
        row[np.setdiff1d(np.arange(len(held)), np.unique(held, return_index=True)[1])] = 0
    return loads


def test_a_limit_on_what_a_rank_sends_is_room_enough(rng):
    """Also without relays, if homes may send no more than in one round."""
    placement = place_experts(
        None, topologies.ring(8), n_logical=40, ep_size=8, redundants_per_rank=2
    )
    table = np.full((8, 7), -1, np.int32)
    table[:, :5] = placement.phy2log.reshape(8, 7)[:, :5]
    table[1:4, 5] = table[0, 0]
    placement = Placement.from_phy2log(table, ep_size=8, n_logical=40)
    loads = np.ones(placement.n_physical, np.int32)
    rows, fetch = jax.tree.map(np.asarray, fetch_of(placement, loads, used=True, fan_out=3))
    assert check_journeys(placement, loads, rows, fetch, used=True).tolist() == [[3] + [0] * 7]
    assert fetch.n_received == 3


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_received_rows_are_added_one_by_one(rng, dtype):
    """By the GPU kernel and by XLA, against float32 on the host; no other row changes."""
    for n, n_rows, most, n_received in [(7, 5, 3, 4), (4, 4, 1, 9), (3, 2, 4, 8), (5, 5, 2, 1)]:
        total = rng.normal(0, 1, (n, 384)).astype(dtype)
        received = rng.normal(0, 1, (n_received, 384)).astype(dtype)
        received[rng.integers(n_received)] = np.nan  # never read
        usable = np.flatnonzero(~np.isnan(received[:, 0].astype(np.float32)))
        places = np.full(n_rows * most, n_received + 3, np.int32)
        some = rng.permutation(n_rows * most)[: len(usable)]
        places[some] = rng.permutation(usable)[: len(some)]
        places = places.reshape(n_rows, most)
        want = total.copy()
        for row in range(n_rows):
            of_row = total[row].astype(np.float32)
            for place in places[row][places[row] < n_received]:
                of_row += received[place].astype(np.float32)
            want[row] = of_row.astype(dtype)
        got = copies.add_received(*map(jnp.asarray, (total, received, places)))
        np.testing.assert_array_equal(got, want)
        some = np.flatnonzero((places < n_received).any(axis=1))
        targets = np.full(n_rows, n, np.int32)
        targets[: len(some)] = some
        by_target = np.full_like(places, n_received)
        by_target[: len(some)] = places[some]
        got = copies.added_in_place(
            *map(jnp.asarray, (total, received, targets, by_target)), interpret=True
        )
        np.testing.assert_array_equal(got, want)


def test_own_weights_are_not_copied(rng, cpu_devices):
    """In place, a step needs no more memory than along a topology, except for data in flight: with
    the padded exchange, a copy for each rank, sent and received."""
    mesh, n_local = Mesh(cpu_devices, "ep"), 24
    placement = place_experts(
        None, topologies.ring(8), n_logical=8 * n_local, ep_size=8, redundants_per_rank=1
    )
    case = AnyCase(8, n_local + 1, 8 * n_local)
    (tokens, gates, _), ids, _ = problem(rng, case, skewed)
    experts = moe.Experts(
        np.zeros((8 * (n_local + 1), HIDDEN, 2 * 512), np.float32),
        np.zeros((8 * (n_local + 1), 512, HIDDEN), np.float32),
    )

    def memory(copies):
        def step(experts, tokens, gates, ids):
            def layer(experts, tokens, gates):
                out, _, experts = moe.moe_layer(
                    tokens, ids, gates, experts, placement=placement, axis_name="ep",
                    copies=copies, in_place=True, transport="padded", gemm="xla",
                )  # fmt: skip
                return out, experts

            out, pull, experts = jax.vjp(layer, experts, tokens, gates, has_aux=True)
            return experts, pull(out), out

        run = jax.shard_map(step, mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
        run = jax.jit(run, donate_argnums=0).lower(experts, tokens, gates, ids).compile()
        return run.memory_analysis()

    static, batch = memory("placement"), memory("batch")
    row = 4 * (HIDDEN * 2 * 512 + 512 * HIDDEN)
    assert batch.alias_size_in_bytes == static.alias_size_in_bytes >= n_local * row
    assert batch.temp_size_in_bytes - static.temp_size_in_bytes < 2 * 8 * row
