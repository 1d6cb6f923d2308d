"""The specification: every step in plain JAX, one function per step, written to be read.

It is the oracle of the tests, the fallback where there is no native code, and, through
`jax.eval_shape`, the source of the native calls' result types. Its results are integers, and the
native code equals them bit for bit.
"""

from lplb_jax.reference.assignment import assign
from lplb_jax.reference.balancer import rebalance
from lplb_jax.reference.loads import count
from lplb_jax.reference.solver import solve

__all__ = ["assign", "count", "rebalance", "solve"]
