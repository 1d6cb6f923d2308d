"""Decoding with small batches: fetches copies' weights once and balances tokens in every step.

    python examples/decode.py                  # on 8 GPUs, or 8 virtual CPU devices

Weights are int8 with one scale per column, and copies travel and stay in int8. A decoder with
random weights and attention over a cache continues a few sequences per device greedily, once
without copies and once balanced. Few tokens are rarely even, so every rank has room for all.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any, Literal

import gpt_oss
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from model import is_expert
from train_moe import make_mesh

from lplb_jax import Placement, metrics, moe, place_experts

HIDDEN, WIDTH, N_EXPERTS, TOP_K, N_LAYERS, VOCABULARY = 64, 96, 32, 4, 2, 256


def quantised(weights: jax.Array) -> dict[str, jax.Array]:
    """int8 weights `[n, k, columns]` and the scales of their columns `[n, columns]`."""
    scales = jnp.abs(weights).max(axis=1) / 127
    return {"weights": jnp.round(weights / scales[:, None]).astype(jnp.int8), "scales": scales}


def ffn(rows: jax.Array, experts: dict[str, Any], group_sizes: jax.Array) -> jax.Array:
    """Gated units with quantized weights: GEMMs take int8 weights, and results are scaled."""

    def linear(x: jax.Array, layer: dict[str, jax.Array]) -> jax.Array:
        scales = moe.per_row(layer["scales"], group_sizes, len(x)).astype(x.dtype)
        return moe.grouped_dot(x, layer["weights"], group_sizes) * scales

    gate, up = jnp.split(linear(rows, experts["gate_up"]), 2, axis=1)
    return linear(jax.nn.silu(gate) * up, experts["down"])


def init(key: jax.Array) -> dict[str, Any]:
    """Weights of all layers, stacked, experts in the order of their ids."""

    def normal(key: jax.Array, *shape: int) -> jax.Array:
        return jax.random.normal(key, shape) * shape[-2] ** -0.5

    def layer(key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key, 5)
        return {
            "qkv": normal(keys[0], HIDDEN, 3 * HIDDEN),
            "router": normal(keys[1], HIDDEN, N_EXPERTS),
            "router_bias": jax.random.normal(keys[2], (N_EXPERTS,)),  # makes some experts popular
            "experts": {
                "gate_up": quantised(normal(keys[3], N_EXPERTS, HIDDEN, 2 * WIDTH)),
                "down": quantised(normal(keys[4], N_EXPERTS, WIDTH, HIDDEN)),
            },
        }

    of_embedding, of_layers = jax.random.split(key)
    return {
        "embedding": normal(of_embedding, VOCABULARY, HIDDEN) * VOCABULARY**0.5,
        "layers": jax.vmap(layer)(jax.random.split(of_layers, N_LAYERS)),
    }


def attend(layer: Any, x: jax.Array, cache: jax.Array, step: jax.Array) -> Any:
    """One token of every sequence `[batch, hidden]` over a cache `[batch, context, 2, hidden]`."""
    q, *kv = jnp.split(x @ layer["qkv"], 3, axis=1)
    cache = lax.dynamic_update_index_in_dim(cache, jnp.stack(kv, axis=1), step, axis=1)
    scores = jnp.einsum("bh,bch->bc", q, cache[:, :, 0]) * HIDDEN**-0.5
    seen = jnp.arange(cache.shape[1]) <= step
    shares = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
    return jnp.einsum("bc,bch->bh", shares, cache[:, :, 1]), cache


def norm(x: jax.Array) -> jax.Array:
    """Root-mean-square norm."""
    return x * lax.rsqrt(jnp.square(x).mean(axis=1, keepdims=True) + 1e-6)


def generate(
    weights: Any,
    first: jax.Array,
    placement: Placement,
    n_steps: int,
    balance: Literal["lplb", "none"],
) -> tuple[jax.Array, moe.Traffic]:
    """`n_steps` more tokens of this rank's sequences, int32 `[n_steps, batch]`, and the traffic."""

    def one_step(carry: Any, step: jax.Array) -> Any:
        token, caches = carry

        def one_layer(stream: jax.Array, layer: Any) -> Any:
            layer, placement, cache = layer
            mixed, cache = attend(layer, norm(stream), cache, step)
            stream = stream + mixed
            x = norm(stream)
            ids, gates = gpt_oss.route(x @ layer["router"] + layer["router_bias"], TOP_K)
            out, traffic = moe.moe_layer(
                x, ids, gates, layer["experts"], placement=placement, axis_name="ep", ffn=ffn,
                balance=balance, capacity_factor=float(placement.ep_size),
            )  # fmt: skip
            return stream + out, (cache, traffic)

        stream = weights["embedding"][token]
        stream, (caches, traffic) = lax.scan(
            one_layer, stream, (weights["layers"], placement, caches)
        )
        token = (norm(stream) @ weights["embedding"].T).argmax(axis=1).astype(jnp.int32)
        return (token, caches), (token, traffic)

    caches = jnp.zeros((N_LAYERS, len(first), n_steps, 2, HIDDEN))
    caches = lax.pcast(caches, "ep", to="varying")
    _, (tokens, traffic) = lax.scan(one_step, (first, caches), jnp.arange(n_steps))
    return tokens, traffic


def specs(weights: Any) -> Any:
    """Experts are sharded along their second axis, after layers; the rest is replicated."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: P(None, "ep") if is_expert(path) else P(), weights
    )


def fetch_copies(weights: Any, placement: Placement, mesh: Mesh) -> Any:
    """The weights of all slots, `[layers, n_physical, …]`, until the placement changes."""

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(None, "ep"), P()), out_specs=P(None, "ep")
    )
    def fetch(experts: Any, placement: Placement) -> Any:
        def of_layer(layer: Any) -> Any:
            experts, placement = layer
            return moe.replicate_weights(experts, axis_name="ep", placement=placement)

        return lax.map(of_layer, (experts, placement))

    experts = fetch(weights["layers"]["experts"], placement)
    return weights | {"layers": weights["layers"] | {"experts": experts}}


def main(arguments: list[str] | None = None) -> dict[str, np.ndarray]:
    """Runs the program; returns the tokens for each kind of balance."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--ranks", type=int, help="None for all GPUs, or else 8 CPU devices")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a device")
    options = parser.parse_args(arguments)
    mesh = make_mesh(options.ranks)
    fresh = init(jax.random.key(0))
    first = jax.device_put(
        np.random.default_rng(0).integers(0, VOCABULARY, mesh.size * options.batch, np.int32),
        NamedSharding(mesh, P("ep")),
    )
    results, history = {}, np.ones((N_LAYERS, N_EXPERTS))
    for balance in ("none", "lplb"):
        # The second run's placement is made from the first run's loads.
        placement = place_experts(
            history, n_logical=N_EXPERTS, ep_size=mesh.size, redundants_per_rank=1
        )
        weights = moe.to_home_order(fresh, placement, where=is_expert)
        shardings = jax.tree.map(
            functools.partial(NamedSharding, mesh), specs(weights),
            is_leaf=lambda leaf: isinstance(leaf, P),
        )  # fmt: skip
        weights = jax.device_put(weights, shardings)
        if balance == "lplb":
            weights = fetch_copies(weights, placement, mesh)
        run = jax.shard_map(
            functools.partial(generate, n_steps=options.steps, balance=balance),
            mesh=mesh,
            in_specs=(specs(weights), P("ep"), P()),
            out_specs=(P(None, "ep"), P()),
        )
        tokens, traffic = jax.jit(run)(weights, first, placement)
        ranks = metrics.rank_loads(traffic.slot_loads, mesh.size)  # [steps, layers, ranks]
        busiest, mean = float(ranks.max(-1).mean()), float(ranks.mean())
        print(f"{balance}: busiest rank {busiest:.1f} rows of {mean:.1f} in the mean")
        print(f"  {int(traffic.overflow.sum())} found no room")
        results[balance] = np.asarray(tokens)
        history = np.asarray(traffic.expert_loads).swapaxes(0, 1)
    same = (results["none"] == results["lplb"]).mean()
    print(f"{100 * same:.1f} % of the tokens are the same; the others were tied but for rounding")
    return results


if __name__ == "__main__":
    main()
