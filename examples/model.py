"""A byte-level language model with mixture-of-experts layers, in plain JAX.

Tokens and experts are sharded over one mesh axis, "ep"; everything else is replicated. The
functions see one rank's tokens and run inside `jax.shard_map`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from lplb_jax import Placement, moe

AXIS = "ep"
VOCABULARY = 256


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model, and the balancing of its experts' load.

    Attributes:
      layers: transformer blocks, each with attention and a mixture of experts.
      hidden: width of the residual stream.
      heads: attention heads, a divisor of `hidden`.
      experts: experts of every layer, a multiple of the ranks.
      top_k: experts that serve a token.
      width: hidden width of an expert.
      context: bytes of a sequence.
      aux_loss: weight of the loss that pulls the router towards equal loads.
      balance: "lplb", "eplb" or "none", see `lplb_jax.moe.moe_layer`; "any": "lplb" on placements
        without topology; "batch": with copies chosen for each batch.
      capacity_factor: see `lplb_jax.moe.moe_layer`.
      dtype: the experts' compute dtype; weights are kept in float32.
    """

    layers: int = 2
    hidden: int = 128
    heads: int = 4
    experts: int = 32
    top_k: int = 4
    width: int = 128
    context: int = 256
    aux_loss: float = 1e-3
    balance: str = "lplb"
    capacity_factor: float = 2.5
    dtype: str = "float32"


def init(key: jax.Array, config: Config) -> dict[str, Any]:
    """Weights of the whole model, with experts in the order of their ids."""
    c = config

    def normal(shape: tuple[int, ...], fan_in: int) -> jax.Array:
        nonlocal key
        key, own = jax.random.split(key)
        return jax.random.normal(own, shape) * fan_in**-0.5

    def block() -> dict[str, Any]:
        return {
            "norm_attention": jnp.ones(c.hidden),
            "qkv": normal((c.hidden, 3 * c.hidden), c.hidden),
            "out": normal((c.hidden, c.hidden), c.hidden),
            "norm_experts": jnp.ones(c.hidden),
            "router": normal((c.hidden, c.experts), c.hidden),
            "experts": moe.Experts(
                gate_up=normal((c.experts, c.hidden, 2 * c.width), c.hidden),
                down=normal((c.experts, c.width, c.hidden), c.width),
            ),
        }

    return {
        "embedding": normal((VOCABULARY, c.hidden), c.hidden),
        "position": normal((c.context, c.hidden), c.hidden),
        "blocks": [block() for _ in range(c.layers)],
        "norm": jnp.ones(c.hidden),
    }


def is_expert(path: tuple[Any, ...]) -> bool:
    """Whether a leaf of the weights or of an optimizer's state belongs to experts, by its path."""
    return jax.tree_util.DictKey("experts") in path


def specs(tree: Any) -> Any:
    """The sharding of every leaf: experts along the mesh, the rest replicated."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: P(AXIS) if is_expert(path) else P(), tree
    )


def loss(
    weights: dict[str, Any],
    text: jax.Array,
    placements: list[Placement],
    config: Config,
) -> tuple[jax.Array, dict[str, Any]]:
    """Mean cross entropy of the next byte, over all ranks.

    Args:
      weights: from `init`; experts `[experts / ranks, …]` in the order of the rank's slots.
      text: uint8 `[sequences, context + 1]` of this rank.
      placements: one per block.
      config: sizes.

    Returns:
      The loss in nats, with the balancing loss, and a dict: `nats` without it; `traffic`, one
      `moe.Traffic` per block; `indices`, int32 `[blocks, sequences · context, top_k]`.
    """
    stream = weights["embedding"][text[:, :-1].astype(jnp.int32)] + weights["position"]
    uneven, traffic, indices = jnp.float32(0), [], []
    for block, placement in zip(weights["blocks"], placements, strict=True):
        experts = jax.tree.map(lambda array: array.astype(config.dtype), block["experts"])
        if config.balance not in ("none", "batch"):
            # Before attention, so that attention can hide the transfer.
            experts = moe.replicate_weights(experts, axis_name=AXIS, placement=placement)
        stream = stream + attention(block, stream, config.heads)
        tokens = norm(stream, block["norm_experts"]).reshape(-1, config.hidden)
        ids, gates, aux = route(block["router"], tokens, config.top_k)
        out, seen = moe.moe_layer(
            tokens.astype(config.dtype),
            ids,
            gates,
            experts,
            placement=placement,
            axis_name=AXIS,
            balance=config.balance if config.balance in ("eplb", "none") else "lplb",
            copies="batch" if config.balance == "batch" else "placement",
            capacity_factor=config.capacity_factor,
        )
        stream = stream + out.astype(stream.dtype).reshape(stream.shape)
        uneven = uneven + aux
        traffic.append(seen)
        indices.append(ids)
    logits = norm(stream, weights["norm"]) @ weights["embedding"].T
    chosen = jnp.take_along_axis(
        jax.nn.log_softmax(logits), text[:, 1:, None].astype(jnp.int32), axis=-1
    )
    nats = -lax.pmean(chosen.mean(), AXIS)
    total = nats + config.aux_loss * uneven
    return total, {"nats": nats, "traffic": traffic, "indices": jnp.stack(indices)}


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Root-mean-square norm."""
    return x * lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-6) * scale


def attention(block: dict[str, Any], stream: jax.Array, heads: int) -> jax.Array:
    """Causal self-attention of `[sequences, context, hidden]`."""
    split = functools.partial(jnp.reshape, shape=(*stream.shape[:2], heads, -1))
    qkv = jnp.split(norm(stream, block["norm_attention"]) @ block["qkv"], 3, axis=-1)
    mixed = jax.nn.dot_product_attention(*map(split, qkv), is_causal=True)
    return mixed.reshape(stream.shape) @ block["out"]


def route(
    router: jax.Array, tokens: jax.Array, top_k: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The router: experts and gates of every token, and the imbalance of its choices.

    Returns:
      `(ids, gates, aux)`: int32 and float32 `[tokens, top_k]`; and the balancing loss of the
      Switch Transformer (Fedus et al. 2021), 1 if all experts are chosen equally often.
    """
    probabilities = jax.nn.softmax(tokens @ router)
    gates, ids = lax.top_k(probabilities, top_k)
    n_experts = router.shape[1]
    # Over all ranks, since the load of the whole batch matters.
    share = lax.pmean(jax.nn.one_hot(ids, n_experts).mean(axis=(0, 1)), AXIS)
    aux = n_experts * (share * lax.pmean(probabilities.mean(axis=0), AXIS)).sum()
    return ids, gates / gates.sum(axis=1, keepdims=True), aux
