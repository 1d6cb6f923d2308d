"""How long a layer takes, from how even its ranks are: a model that fits on a page.

The busiest rank's matrix products, or reading its experts' weights if that takes longer; the
transfer of copies beside them, as far as it is longer still; and the exchange of tokens there and
back, beside which nothing is done.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

# What two H200s reach in docs/moe.md and README.md: products of 16-bit floats, rows of tokens
# between GPUs of one host, memory that is read; and 400 Gb/s per GPU between hosts, at 90 %.
FLOPS, LINK, NODE_LINK, MEMORY = 5.5e14, 2.7e11, 4.5e10, 2.7e12


def passes(inference: bool) -> int:
    """Products of the size of the forward ones: with gradients, three times as many."""
    return 1 if inference else 3


def ways(inference: bool) -> int:
    """How often a copy's bytes travel: as weights, and as gradients back."""
    return 1 if inference else 2


def forward_seconds(rows: Any, parameters: float, flops: float) -> Any:
    """Seconds of the products of so many rows with an expert's weights."""
    return rows * 2 * parameters / flops


def check_positive(values: dict[str, float | None]) -> None:
    """Raises where a number is not finite or not above 0; None is no number."""
    for name, value in values.items():
        if value is None:
            continue
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < value < math.inf
        ):
            raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")


@dataclasses.dataclass(frozen=True)
class Costs:
    """Sizes and rates of a layer.

    Attributes:
      rows: tokens of a rank on average, each as often as it chooses an expert.
      top_k: experts of a token.
      hidden: width of a token, 16-bit floats.
      parameters: of one expert.
      bytes_per_expert: its weights.
      ep_size, n_nodes: ranks and nodes.
      inference: forward alone, with weights that stay as they are.
      flops: floating-point operations per second that products reach.
      link, node_link: bytes per second out of a rank, within a node and between nodes.
      memory: bytes per second that weights are read with.
    """

    rows: float
    top_k: int
    hidden: int
    parameters: float
    bytes_per_expert: float
    ep_size: int
    n_nodes: int
    inference: bool
    flops: float = FLOPS
    link: float = LINK
    node_link: float = NODE_LINK
    memory: float = MEMORY

    def products(self, imbalance: float, slots_per_rank: int) -> float:
        """Seconds of the busiest rank's products."""
        compute = forward_seconds(imbalance * self.rows, self.parameters, self.flops)
        reading = slots_per_rank * self.bytes_per_expert / self.memory
        return passes(self.inference) * max(compute, reading)

    def exchange(self, imbalance: float) -> float:
        """Seconds of the tokens' way there and back, and of their gradients'."""
        if self.ep_size == 1:
            return 0.0
        # A token goes once to each rank that serves it. Experts are taken to be chosen alike.
        n_others = (self.ep_size - 1) * (1 - (1 - 1 / self.ep_size) ** self.top_k)
        sent = imbalance * self.rows / self.top_k * n_others * 2 * self.hidden
        ways = 2 if self.inference else 4
        abroad = self.ep_size * (1 - 1 / self.n_nodes) / (self.ep_size - 1)
        return ways * sent * ((1 - abroad) / self.link + abroad / self.node_link)

    def traffic(self, n_copies: int, per_batch: bool) -> float:
        """Bytes of copies that a rank receives, and of their gradients that it sends, per step."""
        travels = per_batch or not self.inference  # In inference, static copies are there.
        return ways(self.inference) * n_copies * self.bytes_per_expert * travels

    def layer(self, imbalance: float, slots_per_rank: int, traffic: float) -> float:
        """Seconds of a layer."""
        copies = traffic / (self.link if self.n_nodes == 1 else self.node_link)
        return max(self.products(imbalance, slots_per_rank), copies) + self.exchange(imbalance)
