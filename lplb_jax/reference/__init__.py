"""The specification: every step in plain JAX, one function per step, written to be read.

It is the oracle of the tests, the fallback where there is no native code, and, through
`jax.eval_shape`, the source of the native calls' result types. The native code equals it bit for
bit, except that the interior point is float32 and equals it to rounding.
"""

from lplb_jax.reference.assignment import assign
from lplb_jax.reference.balancer import rebalance, synced_rebalance
from lplb_jax.reference.ipm import ipm
from lplb_jax.reference.loads import count, sync
from lplb_jax.reference.solver import solve

__all__ = ["assign", "count", "ipm", "rebalance", "solve", "sync", "synced_rebalance"]
