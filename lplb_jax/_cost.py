"""Estimates the time of a layer from the balance of its ranks: a one-page model.

The time of the busiest rank's GEMMs, or of reading its experts' weights if that is longer; plus the
part of the copies' transfer that they do not hide; plus the exchange of tokens in both directions,
which nothing hides.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

# Rates of two H200s in docs/moe.md and README.md: GEMMs of 16-bit floats, rows of tokens between
# GPUs of one host, memory reads; and 400 Gb/s per GPU between hosts, at 90 %.
FLOPS, LINK, NODE_LINK, MEMORY = 5.5e14, 2.7e11, 4.5e10, 2.7e12


def passes(inference: bool) -> int:
    """Multiples of the forward pass's GEMMs: three with gradients."""
    return 1 if inference else 3


def ways(inference: bool) -> int:
    """How often a copy's bytes travel: as weights there, and as gradients back."""
    return 1 if inference else 2


def forward_seconds(rows: Any, parameters: float, flops: float) -> Any:
    """Seconds of the GEMMs of `rows` rows with an expert's weights."""
    return rows * 2 * parameters / flops


def check_positive(values: dict[str, float | None]) -> None:
    """Raises if a number is not finite or not positive; None is skipped."""
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
      rows: mean rows of a rank: its tokens, times the experts per token.
      top_k: experts per token.
      hidden: width of a token, 16-bit floats.
      parameters: parameters of one expert.
      bytes_per_expert: bytes of an expert's weights.
      ep_size, n_nodes: ranks and nodes.
      inference: forward pass only, with constant weights.
      flops: floating-point operations per second of GEMMs.
      link, node_link: bytes per second out of a rank, within a node and between nodes.
      memory: bytes per second when reading weights.
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
        """Seconds of the busiest rank's GEMMs."""
        compute = forward_seconds(imbalance * self.rows, self.parameters, self.flops)
        reading = slots_per_rank * self.bytes_per_expert / self.memory
        return passes(self.inference) * max(compute, reading)

    def exchange(self, imbalance: float) -> float:
        """Seconds of sending tokens there and back, and their gradients."""
        if self.ep_size == 1:
            return 0.0
        # A token is sent once to each rank that serves it, assuming uniformly chosen experts.
        n_others = (self.ep_size - 1) * (1 - (1 - 1 / self.ep_size) ** self.top_k)
        sent = imbalance * self.rows / self.top_k * n_others * 2 * self.hidden
        ways = 2 if self.inference else 4
        abroad = self.ep_size * (1 - 1 / self.n_nodes) / (self.ep_size - 1)
        return ways * sent * ((1 - abroad) / self.link + abroad / self.node_link)

    def traffic(self, n_copies: int, per_batch: bool) -> float:
        """Bytes per step of the copies that a rank receives, and of the gradients that it sends."""
        travels = per_batch or not self.inference  # In inference, static copies stay in place.
        return ways(self.inference) * n_copies * self.bytes_per_expert * travels

    def layer(self, imbalance: float, slots_per_rank: int, traffic: float) -> float:
        """Seconds of a layer."""
        copies = traffic / (self.link if self.n_nodes == 1 else self.node_link)
        return max(self.products(imbalance, slots_per_rank), copies) + self.exchange(imbalance)
