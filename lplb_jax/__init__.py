"""Exact load balancing for mixture-of-experts layers in JAX. Start with `rebalance`."""

from lplb_jax import metrics, moe, reference, topologies
from lplb_jax.advice import Advice, advise
from lplb_jax.assignment import Assignment, assign
from lplb_jax.balancer import rebalance
from lplb_jax.batch_copies import place_copies
from lplb_jax.certificate import verify
from lplb_jax.comm import Comm, init_comm
from lplb_jax.exporting import export_checks
from lplb_jax.history import LoadHistory
from lplb_jax.loads import count_loads, sync_loads
from lplb_jax.placement import Placement, place_experts
from lplb_jax.refreshing import Refresh, Refresher, refresh
from lplb_jax.solver import Split, TileSplit, solve
from lplb_jax.status import Status

__version__ = "0.1.0"

__all__ = [
    "Advice",
    "Assignment",
    "Comm",
    "LoadHistory",
    "Placement",
    "Refresh",
    "Refresher",
    "Split",
    "Status",
    "TileSplit",
    "advise",
    "assign",
    "count_loads",
    "export_checks",
    "init_comm",
    "metrics",
    "moe",
    "place_copies",
    "place_experts",
    "rebalance",
    "reference",
    "refresh",
    "solve",
    "sync_loads",
    "topologies",
    "verify",
]
