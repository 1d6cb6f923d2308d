"""A model's worth of calls under transformations; as a program, prints a digest of its results."""

import hashlib
import sys

import jax
import numpy as np
from cases import Case, counts_of, tokens

from lplb_jax import count_loads, rebalance, topologies

CASE = Case(topologies.cube(), 8, combined=2)
N_LAYERS, N_BATCHES = 4, 3


def inputs(rng):
    """Tokens `[layers, batches, ep, tokens]`, and a placement per layer."""
    ids = [[tokens(rng, CASE, 96) for _ in range(N_BATCHES)] for _ in range(N_LAYERS)]
    placements = [CASE.placement(rng) for _ in range(N_LAYERS)]
    return np.array(ids), jax.tree.map(lambda *leaves: np.stack(leaves), *placements)


@jax.jit
def transformed(ids, placements):
    """A checkpointed scan over the layers of a vmap over batches, after a vmap over sources."""

    def balance(ids, placement):
        counts = jax.vmap(lambda row: count_loads(row, CASE.n_logical))(ids)
        return rebalance(ids, counts, CASE.r2o, placement=placement)

    @jax.checkpoint
    def layer(carry, inputs):
        return carry, jax.vmap(balance, in_axes=(0, None))(*inputs)

    return jax.lax.scan(layer, 0, (ids, placements))[1]


@jax.jit
def unrolled(ids, placements):
    """Layers in sequence, each fed by the previous one: a long sequence of kernels."""
    shift, results = 0, []
    for i in range(N_LAYERS):
        placement = jax.tree.map(lambda array, i=i: array[i], placements)
        rolled = jax.numpy.where(ids[i, 0] < 0, -1, (ids[i, 0] + shift) % CASE.n_logical)
        physical, split = rebalance(rolled, None, CASE.r2o, placement=placement)
        shift = split.max_load[0]
        results.append((physical, split))
    return results


def of_runs(seed: int) -> str:
    """Several calls of the same programs with new inputs."""
    rng = np.random.default_rng(seed)
    summed = hashlib.sha256()
    for _ in range(5):
        batch = inputs(rng)
        assert (counts_of(batch[0][0, 0], CASE.n_logical) > 0).any()
        for leaf in jax.tree.leaves((transformed(*batch), unrolled(*batch))):
            summed.update(np.asarray(leaf).tobytes())
    return summed.hexdigest()


if __name__ == "__main__":
    seed, platform = sys.argv[1:]
    assert jax.default_backend() == platform
    print(of_runs(int(seed)))
