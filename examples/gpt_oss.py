"""gpt-oss's experts, with biases and clamped gated units, for `moe_layer(ffn=…)`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lplb_jax import moe

ALPHA, LIMIT = 1.702, 7.0


def init(key: jax.Array, n_experts: int, hidden: int, width: int) -> dict[str, jax.Array]:
    """Fresh weights in the order of expert ids; gate and up columns alternate."""
    first, last = jax.random.split(key)
    return {
        "gate_up": jax.random.normal(first, (n_experts, hidden, 2 * width)) * hidden**-0.5,
        "gate_up_bias": jnp.zeros((n_experts, 2 * width)),
        "down": jax.random.normal(last, (n_experts, width, hidden)) * width**-0.5,
        "down_bias": jnp.zeros((n_experts, hidden)),
    }


def ffn(rows: jax.Array, experts: dict[str, Any], group_sizes: jax.Array) -> jax.Array:
    """Applies every slot's expert to its rows."""

    def linear(x: jax.Array, name: str) -> jax.Array:
        bias = moe.per_row(experts[f"{name}_bias"], group_sizes, len(x))
        return moe.grouped_dot(x, experts[name], group_sizes) + bias

    gate_up = linear(rows, "gate_up")
    gate, up = jnp.minimum(gate_up[:, ::2], LIMIT), jnp.clip(gate_up[:, 1::2], -LIMIT, LIMIT)
    return linear(gate * jax.nn.sigmoid(ALPHA * gate) * (up + 1), "down")


def route(logits: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    """The experts of every token, and their gates: a softmax over the chosen logits."""
    chosen, ids = jax.lax.top_k(logits, top_k)
    return ids, jax.nn.softmax(chosen)
