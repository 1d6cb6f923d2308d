"""A mixture-of-experts layer as a Flax NNX module, on a data × ep mesh.

    pip install flax optax
    python examples/nnx_layer.py               # on 8 GPUs, or 8 virtual CPU devices

The module's experts are in home order. Its placement is a variable, so it is saved and replaced
like any other state, without retracing. The experts are gpt-oss's.
"""

from __future__ import annotations

import argparse
from typing import Any

import gpt_oss
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from model import is_expert
from scanned_layers import HIDDEN, N_EXPERTS, TOKENS, TOP_K, WIDTH, make_mesh

from lplb_jax import Placement, metrics, moe, place_experts


class Tables(nnx.Variable):
    """A placement: neither trained nor static."""


class Traffic(nnx.Variable):
    """The traffic of the last call."""


class MoE(nnx.Module):
    """A router and experts for tokens `[tokens, hidden]`, sharded over both axes of a mesh."""

    def __init__(self, placement: Placement, mesh: Mesh, *, rngs: nnx.Rngs) -> None:
        self.mesh = mesh
        self.router = nnx.Linear(HIDDEN, N_EXPERTS, rngs=rngs)
        fresh = gpt_oss.init(rngs.params(), N_EXPERTS, HIDDEN, WIDTH)
        sharding = NamedSharding(mesh, P("ep"))
        experts = jax.device_put(moe.to_home_order(fresh, placement), sharding)
        self.experts = nnx.Dict({name: nnx.Param(array) for name, array in experts.items()})
        self.placement = Tables(jax.device_put(placement, NamedSharding(mesh, P())))
        self.traffic = Traffic(None)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        ids, gates = gpt_oss.route(self.router(tokens), TOP_K)
        experts = {
            name: weights[...].astype(jnp.bfloat16) for name, weights in self.experts.items()
        }

        def rank(tokens: Any, ids: Any, gates: Any, experts: Any, placement: Any) -> Any:
            out, traffic = moe.moe_layer(
                tokens, ids, gates, experts, placement=placement, axis_name="ep", ffn=gpt_oss.ffn,
                capacity_factor=2.0,
            )  # fmt: skip
            return out, traffic.reduced("data")

        layer = jax.shard_map(
            rank,
            mesh=self.mesh,
            in_specs=(TOKENS, TOKENS, TOKENS, P("ep"), P()),
            out_specs=(TOKENS, P()),
        )
        half = tokens.astype(jnp.bfloat16)
        out, traffic = layer(half, ids, gates, experts, self.placement.get_value())
        self.traffic.set_value(traffic)
        return out.astype(tokens.dtype)


def place(model: MoE, optimizer: nnx.Optimizer) -> int:
    """Places the experts by the last batch's loads, and moves their weights and moments.

    Returns the number of moved homes. `lplb_jax.refresh` decides when that is worth it.
    """
    old = jax.device_get(model.placement.get_value())
    loads = np.asarray(model.traffic.get_value().expert_loads)
    sizes = {"n_logical": old.n_logical, "ep_size": old.ep_size}
    new = place_experts(loads, **sizes, n_physical=old.n_physical)
    for part in (model, optimizer):
        state = nnx.to_pure_dict(nnx.state(part, nnx.Not(Tables)))
        nnx.update(part, moe.move_experts(state, old, new, where=is_expert))
    model.placement.set_value(jax.device_put(new, NamedSharding(model.mesh, P())))
    return int(metrics.homes_moved(old, new))


@nnx.jit
def train(model: MoE, optimizer: nnx.Optimizer, tokens: jax.Array, target: jax.Array) -> jax.Array:
    """Takes one step; returns the mean squared error before it."""

    def loss(model: MoE) -> jax.Array:
        return jnp.square(tokens + model(tokens) - target).mean()

    value, slopes = nnx.value_and_grad(loss)(model)
    optimizer.update(model, slopes)
    return value


def main(arguments: list[str] | None = None) -> list[float]:
    """Runs the program; returns the losses."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=512, help="of a batch, over all devices")
    options = parser.parse_args(arguments)
    mesh = make_mesh()
    placement = place_experts(
        np.ones(N_EXPERTS), n_logical=N_EXPERTS, ep_size=mesh.shape["ep"], redundants_per_rank=1
    )
    model = MoE(placement, mesh, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
    random, losses = np.random.default_rng(1), []
    teacher = random.normal(0, HIDDEN**-0.5, (HIDDEN, HIDDEN)).astype(np.float32)
    for step in range(options.steps):
        tokens = random.normal(0, 1, (options.tokens, HIDDEN)).astype(np.float32)
        batch = tokens, np.sin(2 * tokens @ teacher)
        batch = jax.device_put(batch, NamedSharding(mesh, TOKENS))
        losses.append(float(train(model, optimizer, *batch)))
        if (step + 1) % 10 == 0:
            traffic = model.traffic.get_value()
            ranks = metrics.rank_loads(traffic.slot_loads, mesh.shape["ep"])
            print(f"step {step + 1}: loss {losses[-1]:.3f}, rows of the ranks {ranks.tolist()}")
            print(f"  {int(traffic.overflow)} found no room; {place(model, optimizer)} homes moved")
    return losses


if __name__ == "__main__":
    main()
