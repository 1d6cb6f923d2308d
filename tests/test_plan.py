"""Plans of an exchange, against placing rows one by one."""

import functools
import types

import jax
import numpy as np
import plan_cases
import pytest
from jax.sharding import PartitionSpec

from lplb_jax import Assignment, _native
from lplb_jax.moe.plan import planned
from lplb_jax.reference.exchange import STARTS_HERE, STARTS_RETURN


@pytest.mark.parametrize(
    ("n_ranks", "n_slots", "n_tokens", "top_k"),
    [(1, 3, 5, 2), (2, 5, 33, 8), (3, 1, 17, 1), (8, 4, 9, 32), (5, 40, 40, 6)],
)
def test_the_plan(rng, n_ranks, n_slots, n_tokens, top_k):
    for _ in range(3):
        case = plan_cases.random_case(rng, n_ranks, n_slots, n_tokens, top_k)
        plan_cases.check(case.run(), case)


@pytest.mark.parametrize(
    ("n_ranks", "n_slots", "n_tokens", "top_k"), [(2, 5, 33, 8), (3, 1, 17, 1), (8, 4, 9, 32)]
)
def test_places(rng, n_ranks, n_slots, n_tokens, top_k):
    """On the way back, every token sent has a place of its own in the window, and on the way there
    every token received; NVSHMEM's put also packs tokens and sums at these places."""
    for _ in range(3):
        case = plan_cases.random_case(rng, n_ranks, n_slots, n_tokens, top_k)
        row, order, lists = map(np.asarray, case.run()[:3])
        leaves = order >= 0
        returns = lists[STARTS_RETURN][row[leaves] // case.capacity] + order[leaves]
        ranks = np.where(case.rows() < 0, -1, case.rows() // case.capacity)
        sizes = (ranks == case.me).any(axis=2).sum(axis=1)
        sizes[case.me] = 0
        received = zip(lists[STARTS_HERE], sizes, strict=True)
        here = np.concatenate([start + np.arange(size) for start, size in received])
        others = n_ranks - 1
        most = n_tokens * min(others, top_k), min(n_tokens * others, case.capacity)
        for places, room in zip((returns, here), most, strict=True):
            assert len(np.unique(places)) == len(places)
            assert ((places >= 0) & (places < room)).all()


@pytest.mark.parametrize("shared_bytes", [227 << 10, 1 << 10])
def test_without_room_in_shared_memory(rng, monkeypatch, cpu_devices, shared_bytes):
    """XLA plans if the counts of all ranks do not fit in a block of the present GPU."""
    extension = types.SimpleNamespace(
        plan_bytes=lambda n_ranks, n_slots: 4 * (n_ranks**2 + 4 * n_ranks * n_slots) + 1024,
        current_device=lambda: types.SimpleNamespace(shared_bytes=shared_bytes),
    )
    monkeypatch.setattr(_native, "cuda", lambda: extension)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    case = plan_cases.random_case(rng, 2, 5, 9, 3)
    n_physical = 2 * case.n_slots
    positions = np.concatenate([plan_cases.positions(slots) for slots in case.slots])
    spec = PartitionSpec("ep")

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=jax.sharding.Mesh(cpu_devices[:2], "ep"),
        in_specs=spec,
        out_specs=spec,
    )
    def run(slots, positions, counts):
        assignment = Assignment(slots, positions, counts.reshape(n_physical))
        results = planned(assignment, "ep", case.capacity, case.groups)
        return [result[None] for result in results]

    operands = np.concatenate(case.slots), positions, case.counts.reshape(2, n_physical)
    traced = run.trace(*operands)
    assert ("lplb_plan" in str(traced.jaxpr)) == (shared_bytes > 1 << 10)
    plan_cases.check([result[case.me] for result in run(*operands)], case)
