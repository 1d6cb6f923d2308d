"""The demo's results, for its table and its picture."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Run(NamedTuple):
    """The result of `rebalance` for one batch on one placement.

    Attributes:
      name: where its copies are, in a word or two.
      loads: int `[ep_size]`, tokens per rank, counted from the physical indices it returned.
      lower_bound: proven lower bound on the busiest rank's tokens over these copies.
      n_copies: filled slots that are not their expert's home.
      moved: tokens served by a slot other than their expert's home.
      seconds: median time of a call.
      faults: errors in the result, in words; empty if there are none.
    """

    name: str
    loads: np.ndarray
    lower_bound: int
    n_copies: int
    moved: int
    seconds: float
    faults: list[str]


class Layer(NamedTuple):
    """The results for one layer's batch. Loads are int `[ep_size]`, in tokens per rank.

    Attributes:
      home: loads without replicas.
      even: loads if experts' tokens are split evenly over their copies along the topology.
      runs: the results of `rebalance`, one per placement.
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
        """The faults of all runs."""
        return [f"{run.name}: {fault}" for run in self.runs for fault in run.faults]
