"""Routing of a real mixture-of-experts model, for demonstrations, tests and benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

AUX_LOSSES = ("1e-3", "1e-2")


class Traces(NamedTuple):
    """What a router chose, and how loaded its experts were 900 training steps earlier.

    Attributes:
      indices: uint8 `[layers, tokens, top_k]`, logical expert ids at step 1200.
      history: int32 `[layers, n_logical]`, tokens per expert at step 300.
    """

    indices: np.ndarray
    history: np.ndarray


def load_traces(aux_loss: str = "1e-3") -> Traces:
    """Reads the packaged routing traces: 4 layers, 32,768 tokens, top-8 of 256 experts.

    The tokens are 32 consecutive sequences of 1,024; give consecutive sequences to consecutive
    ranks. Where they come from: `lplb_jax/data/README.md`.

    Args:
      aux_loss: weight of the balancing loss in training, "1e-3" (less even) or "1e-2".

    Returns:
      `Traces` of NumPy arrays.

    Raises:
      ValueError: there are no traces of this `aux_loss`.

    >>> from lplb_jax.data import load_traces
    >>> traces = load_traces("1e-2")
    >>> traces.indices.shape, traces.history.shape
    ((4, 32768, 8), (4, 256))
    """
    if aux_loss not in AUX_LOSSES:
        raise ValueError(f"aux_loss: expected one of {', '.join(AUX_LOSSES)}, got {aux_loss!r}")
    with np.load(Path(__file__).with_name("routing_traces.npz")) as file:
        return Traces(file[f"aux{aux_loss}_step1200"], file[f"aux{aux_loss}_step300_loads"])
