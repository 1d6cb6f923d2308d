"""What the demonstration finds, for its table and its picture."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Layer(NamedTuple):
    """What one layer's batch came to. Loads are int `[ep_size]`, in tokens per rank.

    Attributes:
      home: loads without replicas.
      even: loads where every replicated expert's tokens are split evenly over its slots.
      balanced: loads after `rebalance`, counted from the physical indices it returned.
      lower_bound: what no routing over these replicas can bring the busiest rank below.
      moved: tokens that a replica serves.
      seconds: median time of a call.
      faults: what is wrong with the result, in words; empty if all is well.
    """

    home: np.ndarray
    even: np.ndarray
    balanced: np.ndarray
    lower_bound: int
    moved: int
    seconds: float
    faults: list[str]

    @property
    def over_mean(self) -> list[np.ndarray]:
        """`home`, `even` and `balanced`, divided by the mean load."""
        return [loads / self.home.mean() for loads in (self.home, self.even, self.balanced)]

    @property
    def busiest(self) -> list[float]:
        """The largest load of each stage in `over_mean`."""
        return [float(loads.max()) for loads in self.over_mean]
