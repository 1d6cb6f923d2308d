"""An expert-parallel mixture-of-experts layer on top of `rebalance`. Start with `moe_layer`."""

from lplb_jax.moe.exchange import capacity_for, combine, dispatch
from lplb_jax.moe.experts import Experts, expert_ffn
from lplb_jax.moe.layer import LayerResult, moe_layer
from lplb_jax.moe.moves import move_experts, to_home_order, to_id_order
from lplb_jax.moe.plan import Plan
from lplb_jax.moe.products import grouped_dot, per_row
from lplb_jax.moe.replicas import replicate_weights
from lplb_jax.moe.traffic import Traffic
from lplb_jax.moe.transfers import COMPILER_OPTIONS
from lplb_jax.moe.weights import InSlots, Own, WithRoom

__all__ = [
    "COMPILER_OPTIONS",
    "Experts",
    "InSlots",
    "LayerResult",
    "Own",
    "Plan",
    "Traffic",
    "WithRoom",
    "capacity_for",
    "combine",
    "dispatch",
    "expert_ffn",
    "grouped_dot",
    "moe_layer",
    "move_experts",
    "per_row",
    "replicate_weights",
    "to_home_order",
    "to_id_order",
]
