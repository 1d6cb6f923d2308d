"""Layers under lax.scan on a data × ep mesh, each with its own placement, in plain JAX.

    python examples/scanned_layers.py          # on 8 GPUs, or 8 virtual CPU devices

Tokens are sharded over both axes, experts over "ep". The scan's body is rematerialized and computes
in bfloat16; optax updates float32 weights. Every few steps `refresh` decides whether to place
experts anew; if so, one call moves the whole training state. The model learns to imitate a network
with random weights.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from typing import Any

import gpt_oss
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from model import is_expert

from lplb_jax import LoadHistory, Placement, metrics, moe, place_experts, refresh

HIDDEN, WIDTH, N_EXPERTS, TOP_K, N_LAYERS = 32, 48, 16, 2, 3
TOKENS = P(("data", "ep"))


def make_mesh() -> Mesh:
    """Two slices of data, with the other devices along "ep"."""
    with contextlib.suppress(RuntimeError):  # JAX refuses it once initialized.
        jax.config.update("jax_num_cpu_devices", 8)
    return Mesh(np.array(jax.devices()[:8]).reshape(2, -1), ("data", "ep"))


def specs(tree: Any) -> Any:
    """Experts are sharded along their second axis, after layers; the rest is replicated."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: P(None, "ep") if is_expert(path) else P(), tree
    )


def init(key: jax.Array, placement: Placement) -> dict[str, Any]:
    """Weights of all layers, stacked; experts in home order."""

    def layer(key: jax.Array) -> dict[str, Any]:
        of_router, of_experts = jax.random.split(key)
        return {
            "norm": jnp.ones(HIDDEN),
            "router": jax.random.normal(of_router, (HIDDEN, N_EXPERTS)) * HIDDEN**-0.5,
            "router_bias": jnp.zeros(N_EXPERTS),
            "experts": gpt_oss.init(of_experts, N_EXPERTS, HIDDEN, WIDTH),
        }

    weights = jax.vmap(layer)(jax.random.split(key, N_LAYERS))
    return moe.to_home_order(weights, placement, where=is_expert)


def forward(
    weights: dict[str, Any], tokens: jax.Array, placement: Placement
) -> tuple[jax.Array, moe.Traffic]:
    """Applies all layers to this rank's tokens `[tokens, hidden]`, inside `jax.shard_map`."""

    @jax.checkpoint
    def body(stream: jax.Array, layer: Any) -> tuple[jax.Array, moe.Traffic]:
        layer, placement = layer
        x = stream * lax.rsqrt(jnp.square(stream).mean(axis=1, keepdims=True) + 1e-6)
        x = x * layer["norm"]
        ids, gates = gpt_oss.route(x @ layer["router"] + layer["router_bias"], TOP_K)
        out, traffic = moe.moe_layer(
            x.astype(jnp.bfloat16),
            ids,
            gates,
            jax.tree.map(lambda array: array.astype(jnp.bfloat16), layer["experts"]),
            placement=placement,
            axis_name="ep",
            ffn=gpt_oss.ffn,
            capacity_factor=2.0,
        )
        return stream + out.astype(stream.dtype), traffic

    return lax.scan(body, tokens, (weights, placement))


class Training:
    """Weights, optimizer state, placements and loads, and the steps that change them."""

    def __init__(self, mesh: Mesh, seed: int = 0) -> None:
        self.mesh, ep_size = mesh, mesh.shape["ep"]
        even = np.ones((N_LAYERS, N_EXPERTS))
        self.placement = place_experts(
            even, n_logical=N_EXPERTS, ep_size=ep_size, redundants_per_rank=1
        )
        self.optimizer = optax.adamw(3e-3)
        weights = init(jax.random.key(seed), self.placement)
        self.weights, self.state = self._spread((weights, self.optimizer.init(weights)))
        history = LoadHistory.empty(n_layers=N_LAYERS, n_logical=N_EXPERTS, n_batches=8)
        self.history = jax.device_put(history, NamedSharding(mesh, P()))
        random = np.random.default_rng(seed)
        self.teacher = random.normal(0, HIDDEN**-0.5, (HIDDEN, HIDDEN)).astype(np.float32)
        self._step = self._compiled_step()

    def step(self, tokens: np.ndarray) -> tuple[float, moe.Traffic]:
        """Learns from a batch `[tokens, hidden]`; returns the loss and all layers' traffic."""
        tokens = jax.device_put(tokens, NamedSharding(self.mesh, TOKENS))
        self.weights, self.state, self.history, loss, traffic = self._step(
            self.weights, self.state, self.history, tokens, self.placement
        )
        return float(loss), jax.tree.map(np.asarray, traffic)

    def place(self, steps: int) -> str:
        """Places experts anew if `steps` steps repay it; returns the decision in words."""
        parameters = 3 * HIDDEN * WIDTH
        found = refresh(
            self.history,
            self.placement,
            steps=steps,
            row_s=6 * parameters / 5.5e14,
            bytes_per_expert=12 * parameters,
        )
        if found.moved.any():
            self.weights, self.state = moe.move_experts(
                (self.weights, self.state), self.placement, found.placement, where=is_expert
            )
            self.placement = found.placement
        return found.reason

    def _spread(self, tree: Any) -> Any:
        shardings = jax.tree.map(
            functools.partial(NamedSharding, self.mesh), specs(tree),
            is_leaf=lambda leaf: isinstance(leaf, P),
        )  # fmt: skip
        return jax.device_put(tree, shardings)

    def _compiled_step(self) -> Any:
        def loss(weights: Any, tokens: Any, placement: Any) -> tuple[jax.Array, moe.Traffic]:
            out, traffic = forward(weights, tokens, placement)
            error = jnp.square(out - jnp.sin(2 * tokens @ self.teacher)).mean()
            return lax.pmean(error, ("data", "ep")), traffic.reduced("data")

        loss = jax.shard_map(
            loss,
            mesh=self.mesh,
            in_specs=(specs(self.weights), TOKENS, P()),
            out_specs=(P(), P()),
        )

        @functools.partial(jax.jit, donate_argnums=(0, 1, 2), compiler_options=moe.COMPILER_OPTIONS)
        def step(weights: Any, state: Any, history: Any, tokens: Any, placement: Any) -> Any:
            pulled = jax.value_and_grad(loss, has_aux=True)
            (value, traffic), slopes = pulled(weights, tokens, placement)
            updates, state = self.optimizer.update(slopes, state, weights)
            history = history.update(traffic.expert_loads)
            return optax.apply_updates(weights, updates), state, history, value, traffic

        return step


def main(arguments: list[str] | None = None) -> list[float]:
    """Runs the program; returns the losses."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=512, help="of a batch, over all devices")
    options = parser.parse_args(arguments)
    training = Training(make_mesh())
    random, losses = np.random.default_rng(1), []
    for step in range(options.steps):
        tokens = random.normal(0, 1, (options.tokens, HIDDEN)).astype(np.float32)
        loss, traffic = training.step(tokens)
        losses.append(loss)
        if (step + 1) % 10 == 0:
            home = metrics.home_quota(traffic.expert_loads, training.placement)
            ranks = [metrics.rank_loads(loads, training.mesh.shape["ep"])
                     for loads in (home, traffic.slot_loads)]  # fmt: skip
            before, after = (float(metrics.imbalance(loads).mean()) for loads in ranks)
            print(f"step {step + 1}: loss {loss:.3f}, busiest rank {before:.2f} → {after:.2f}")
            print(f"  {traffic.overflow.sum()} rows found no room; {training.place(10**6)}")
    return losses


if __name__ == "__main__":
    main()
