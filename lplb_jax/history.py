"""LoadHistory: the loads of the last batches, kept in the training state."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lplb_jax._problem import check_count


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["loads", "n_seen"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True, eq=False)
class LoadHistory:
    """The loads of the last batches: a small pytree for the training state, updated inside `jit`.

    Nothing is copied to the host until `batches` or `refresh` is called.

    Attributes:
      loads: int32 `[layers, n_batches, n_logical]`, a ring buffer: batch i is at index
        i mod n_batches.
      n_seen: int32 scalar, the number of batches so far.

    >>> history = LoadHistory.empty(n_layers=1, n_logical=3, n_batches=2)
    >>> for loads in ([5, 1, 0], [6, 0, 0], [7, 0, 2]):
    ...     history = history.update(jnp.array([loads]))
    >>> history.batches().tolist()
    [[[6, 0, 0], [7, 0, 2]]]
    """

    loads: Any
    n_seen: Any

    @classmethod
    def empty(cls, *, n_layers: int, n_logical: int, n_batches: int = 16) -> LoadHistory:
        """A history without batches.

        Args:
          n_layers: layers with experts.
          n_logical: experts of a layer.
          n_batches: how many batches to keep.

        Raises:
          ValueError: a size is not a positive integer.
        """
        sizes = {"n_layers": n_layers, "n_batches": n_batches, "n_logical": n_logical}
        shape = tuple(check_count(name, size) for name, size in sizes.items())
        return cls(jnp.zeros(shape, jnp.int32), jnp.int32(0))

    def update(self, loads: Any) -> LoadHistory:
        """The history with one more batch, which replaces the oldest one if it is full.

        Args:
          loads: int32 `[layers, n_logical]`, tokens per expert of the whole batch; see
            `metrics.expert_loads` for loads by slot.

        Raises:
          TypeError, ValueError: the loads have another dtype or shape.
        """
        loads = jnp.asarray(loads)
        n_layers, n_batches, n_logical = self.loads.shape
        if loads.dtype != jnp.int32:
            raise TypeError(f"loads: expected int32, got {loads.dtype}")
        if loads.shape != (n_layers, n_logical):
            raise ValueError(
                f"loads: expected [layers, n_logical] = [{n_layers}, {n_logical}], got "
                f"{list(loads.shape)}"
            )
        place = self.n_seen % jnp.int32(n_batches)
        ring = lax.dynamic_update_index_in_dim(self.loads, loads, place, axis=1)
        return LoadHistory(ring, self.n_seen + jnp.int32(1))

    def batches(self) -> np.ndarray:
        """The batches kept, int32 `[layers, batches, n_logical]` on the host, the oldest first."""
        loads, n_seen = jax.device_get((self.loads, self.n_seen))
        kept = min(int(n_seen), loads.shape[1])
        places = (int(n_seen) - kept + np.arange(kept)) % loads.shape[1]
        return loads[:, places]
