"""What the demonstration finds, for its table and its picture."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Run(NamedTuple):
    """What `rebalance` made of one batch on one placement.

    Attributes:
      name: where its copies are, in a word or two.
      loads: int `[ep_size]`, tokens per rank, counted from the physical indices it returned.
      lower_bound: what no routing over these copies can bring the busiest rank below.
      n_copies: slots with an expert whose home is another one.
      moved: tokens that another slot than their expert's home serves.
      seconds: median time of a call.
      faults: what is wrong with the result, in words; empty if all is well.
    """

    name: str
    loads: np.ndarray
    lower_bound: int
    n_copies: int
    moved: int
    seconds: float
    faults: list[str]


class Layer(NamedTuple):
    """What one layer's batch came to. Loads are int `[ep_size]`, in tokens per rank.

    Attributes:
      home: loads without replicas.
      even: loads where the tokens of experts copied along the topology are split evenly.
      runs: what `rebalance` made of the batch, on one placement after the other.
    """

    home: np.ndarray
    even: np.ndarray
    runs: tuple[Run, ...]

    @property
    def over_mean(self) -> list[np.ndarray]:
        """`home`, `even`, and the loads of all runs, divided by the mean load."""
        stages = (self.home, self.even, *(run.loads for run in self.runs))
        return [loads / self.home.mean() for loads in stages]

    @property
    def busiest(self) -> list[float]:
        """The largest load of each stage in `over_mean`."""
        return [float(loads.max()) for loads in self.over_mean]

    @property
    def faults(self) -> list[str]:
        """Those of all runs."""
        return [f"{run.name}: {fault}" for run in self.runs for fault in run.faults]
