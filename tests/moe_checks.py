"""The plain mathematics of an expert-parallel layer, on any mesh: value and gradients."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case
from jax.sharding import PartitionSpec as P
from meshes import everywhere

from lplb_jax import Placement, moe, topologies

HIDDEN, WIDTH, TOP_K = 16, 12, 3
ROOM: dict[str, Any] = {"capacity_factor": 8.0}  # enough that nothing can overflow


def case_of(n_ranks):
    """Few experts; on some ranks, some experts that no token chooses."""
    if n_ranks == 8:
        return Case(topologies.cube(), 5, combined=2)
    return Case(topologies.ring(n_ranks), 5, combined=3)


def balanced(rng, case, n_tokens):
    """Every expert is chosen equally often."""
    ids = np.resize(rng.permutation(case.n_logical), n_tokens * TOP_K)
    return ids.reshape(n_tokens, TOP_K)


def skewed(rng, case, n_tokens):
    """A few experts have most of the tokens; one choice in ten names none."""
    weight = rng.lognormal(0, 1.5, case.n_logical)
    ids = rng.choice(case.n_logical, (n_tokens, TOP_K), p=weight / weight.sum())
    return np.where(rng.random(ids.shape) < 0.1, -1, ids)


def one_expert(rng, case, n_tokens):
    """Almost all ranks get nothing."""
    return np.full((n_tokens, TOP_K), rng.integers(case.n_logical))


def half_silent(rng, case, n_tokens):
    """Every second rank has no tokens to send: its choices all name no expert."""
    ids = skewed(rng, case, n_tokens).reshape(case.ep_size, -1)
    ids[::2] = -1
    return ids.reshape(n_tokens, TOP_K)


def nothing(rng, case, n_tokens):
    """No choice names an expert."""
    return np.full((n_tokens, TOP_K), -1)


ROUTINGS = [balanced, skewed, one_expert, half_silent, nothing]


def problem(rng, case, routing, n_tokens=64, dtype=np.float32, sizes=(HIDDEN, WIDTH)):
    """tokens, gates, weights in the order of experts (not of slots), and indices; a placement."""
    hidden, width = sizes
    ids = routing(rng, case, n_tokens).astype(np.int32)
    floats = (
        rng.normal(0, 1, (n_tokens, hidden)),
        rng.random(ids.shape),
        moe.Experts(
            rng.normal(0, hidden**-0.5, (case.n_logical, hidden, 2 * width)),
            rng.normal(0, width**-0.5, (case.n_logical, width, hidden)),
        ),
    )
    floats = jax.tree.map(lambda array: array.astype(dtype), floats)
    return floats, ids, case.placement(rng)


def plainly(tokens, gates, experts, ids):
    """Runs every token through every expert and selects the choices. No slots, no ranks."""

    def expert(gate_up, down):
        gate, up = jnp.split(tokens @ gate_up, 2, axis=1)
        return (gate / (1 + jnp.exp(-gate)) * up) @ down

    of_expert = jax.vmap(expert)(*experts)
    chosen = jax.nn.one_hot(ids, len(experts.down), dtype=gates.dtype)
    return jnp.einsum("tk,tke,eth->th", gates, chosen, of_expert)


@dataclasses.dataclass(frozen=True)
class AnyCase:
    """Placements without topology: several copies, also on the same rank, and empty slots."""

    ep_size: int
    slots_per_rank: int
    n_logical: int
    r2o: None = None

    def placement(self, rng):
        """Homes as even as possible; other slots hold a hot expert, or are empty."""
        per_rank = np.resize(np.arange(self.ep_size), self.n_logical)
        ranks = rng.permutation(self.ep_size)[per_rank]
        table = np.full((self.ep_size, self.slots_per_rank), -1, np.int32)
        for expert, rank in enumerate(ranks):
            table[rank, rng.choice(np.flatnonzero(table[rank] < 0))] = expert
        rest = np.argwhere(table < 0)
        rest = rest[rng.random(len(rest)) < 0.8]
        hot = rng.random(len(rest)) < 0.5
        copies = np.where(
            hot, rng.integers(self.n_logical), rng.integers(self.n_logical, size=len(rest))
        )
        table[tuple(rest.T)] = copies
        return Placement.from_phy2log(table, ep_size=self.ep_size, n_logical=self.n_logical)


def in_slots(experts, placement):
    """Reorders experts from id order to home order, padded."""
    home = np.asarray(placement.log2phy)[:, 0]
    n_ranks, n_local = placement.ep_size, -(-len(home) // placement.ep_size)
    by_rank = [[] for _ in range(n_ranks)]
    for expert in np.argsort(home):
        by_rank[home[expert] // (placement.n_physical // n_ranks)].append(expert)

    def ordered(array):
        out = np.zeros((n_ranks, n_local, *array.shape[1:]), array.dtype)
        for rank, own in enumerate(by_rank):
            out[rank, : len(own)] = array[own]
        return out.reshape(-1, *array.shape[1:])

    return jax.tree.map(lambda array: ordered(np.asarray(array)), experts)


def ragged_by_gather(operand, output, starts, sizes, places, received, *, axis_name):
    """`lax.ragged_all_to_all`, which CPUs lack; NaN or −1 if sender and receiver disagree."""
    n_ranks, me = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    operands = jax.lax.all_gather(operand, axis_name)
    starts, sizes, places = (
        jax.lax.all_gather(array, axis_name).reshape(n_ranks, n_ranks, -1)[:, me].reshape(-1)
        for array in (starts, sizes, places)
    )
    source = jnp.repeat(jnp.arange(n_ranks), len(sizes) // n_ranks)
    row = jnp.arange(len(output))

    def one(out, update):
        source, start, size, place = update
        rows = operands[source].at[start + row - place].get(mode="clip")
        mine = (row >= place) & (row < place + size)
        return jnp.where(mine.reshape(-1, *[1] * (out.ndim - 1)), rows, out), None

    out, _ = jax.lax.scan(one, output, (source, starts, sizes, places))
    wrong = jnp.nan if jnp.issubdtype(out.dtype, jnp.floating) else -1
    return jnp.where((sizes == received).all(), out, jnp.full_like(out, wrong))


def layer_over(mesh, case, *, check_vma=True, **options):
    """The layer on all ranks; experts are passed and returned in home order."""

    def rank(tokens, gates, experts, ids, placement):
        out, traffic = moe.moe_layer(
            tokens, ids, gates, experts, case.r2o, placement=placement, axis_name="ep", **options
        )
        return out, traffic

    return jax.shard_map(
        rank,
        mesh=mesh,
        in_specs=(P("ep"), P("ep"), P("ep"), P("ep"), P()),
        out_specs=(P("ep"), P()),
        check_vma=check_vma,
    )


def with_slopes(function):
    """jit of (floats, upstream, …) -> function's output, its gradients for floats, and the rest."""

    def loss(floats, upstream, *others):
        out, aux = function(*floats, *others)
        return (out.astype(np.float32) * upstream).sum(), (out, aux)

    def run(*arguments):
        (_, (out, aux)), slopes = jax.value_and_grad(loss, has_aux=True)(*arguments)
        return out, slopes, aux

    return jax.jit(run)


PLAIN = with_slopes(lambda *arguments: (plainly(*arguments), None))
NAMES = ["output", "tokens", "gates", "gate_up", "down"]


def assert_equals_plain_mathematics(run, mesh, floats, ids, placement, rng, tolerance):
    """Checks `run`, from with_slopes(layer_over()), on every process's part of the results;
    returns the Traffic."""
    upstream = rng.normal(0, 1, floats[0].shape).astype(np.float32)
    tokens, gates, experts = floats
    by_rank = (tokens, gates, in_slots(experts, placement)), upstream, ids
    by_rank = jax.tree.map(functools.partial(everywhere, mesh), by_rank)
    placed = jax.tree.map(lambda array: everywhere(mesh, np.asarray(array), P()), placement)
    ours, (*slopes, of_experts), traffic = run(*by_rank, placed)
    exact = jax.tree.map(lambda array: array.astype(np.float32), floats)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        plain, (*expected, expected_of_experts), _ = PLAIN(exact, upstream, ids)
    expected = [plain, *expected, *in_slots(expected_of_experts, placement)]
    for name, got, want in zip(NAMES, [ours, *slopes, *of_experts], expected, strict=True):
        want = np.asarray(want)
        scale = max(np.abs(want).max(), 1e-6)
        for part in got.addressable_shards:
            here = np.asarray(part.data, np.float32) / scale
            np.testing.assert_allclose(here, want[part.index] / scale, atol=tolerance, err_msg=name)
    return jax.tree.map(np.asarray, traffic)
