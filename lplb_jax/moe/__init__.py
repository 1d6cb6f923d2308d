"""An expert-parallel mixture-of-experts layer on top of `rebalance`. Start with `moe_layer`."""

from lplb_jax.moe.exchange import Plan, capacity_for, combine, dispatch
from lplb_jax.moe.experts import Experts, expert_ffn
from lplb_jax.moe.layer import Traffic, moe_layer
from lplb_jax.moe.moves import move_experts
from lplb_jax.moe.replicas import replicate_weights
from lplb_jax.moe.transfers import COMPILER_OPTIONS

__all__ = [
    "COMPILER_OPTIONS",
    "Experts",
    "Plan",
    "Traffic",
    "capacity_for",
    "combine",
    "dispatch",
    "expert_ffn",
    "moe_layer",
    "move_experts",
    "replicate_weights",
]
