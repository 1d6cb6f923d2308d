"""Times jitted calls by wall time, warm."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def median_seconds(function: Callable[..., Any], *arguments: Any, repeats: int) -> float:
    """Median duration of synchronized calls, after one warm-up call."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return float(np.median(times))
