"""What the demonstration finds, for its table and its picture."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Run(NamedTuple):
    """What `rebalance` made of one batch on one placement.

    Attributes:
      loads: int `[ep_size]`, tokens per rank, counted from the physical indices it returned.
      lower_bound: what no routing over these copies can bring the busiest rank below.
      moved: tokens that another slot than their expert's home serves.
      seconds: median time of a call.
      faults: what is wrong with the result, in words; empty if all is well.
    """

    loads: np.ndarray
    lower_bound: int
    moved: int
    seconds: float
    faults: list[str]


class Layer(NamedTuple):
    """What one layer's batch came to. Loads are int `[ep_size]`, in tokens per rank.

    Attributes:
      home: loads without replicas.
      even: loads where the tokens of experts copied along the topology are split evenly.
      along: what `rebalance` made of the copies along the topology.
      anywhere: the same of a placement that may have any number of copies on any ranks.
    """

    home: np.ndarray
    even: np.ndarray
    along: Run
    anywhere: Run

    @property
    def over_mean(self) -> list[np.ndarray]:
        """`home`, `even`, and the loads of `along` and `anywhere`, divided by the mean load."""
        stages = (self.home, self.even, self.along.loads, self.anywhere.loads)
        return [loads / self.home.mean() for loads in stages]

    @property
    def busiest(self) -> list[float]:
        """The largest load of each stage in `over_mean`."""
        return [float(loads.max()) for loads in self.over_mean]

    @property
    def faults(self) -> list[str]:
        """Those of both runs."""
        anywhere = [f"any placement: {fault}" for fault in self.anywhere.faults]
        return self.along.faults + anywhere
