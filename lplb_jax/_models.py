"""Sizes of published mixture-of-experts models, and synthetic routing like theirs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Model(NamedTuple):
    """The sizes that a layer's balance depends on.

    Attributes:
      n_layers: layers with experts.
      n_logical: experts per layer, without shared experts.
      top_k: experts that a token chooses.
      hidden, width: sizes of a gated expert, `[hidden, 2 · width]` and `[width, hidden]`.
    """

    n_layers: int
    n_logical: int
    top_k: int
    hidden: int
    width: int


# From the published configurations.
MODELS = {
    "mixtral-8x7b": Model(32, 8, 2, 4096, 14336),
    "mixtral-8x22b": Model(56, 8, 2, 6144, 16384),
    "deepseek-v3": Model(58, 256, 8, 7168, 2048),
    "kimi-k2": Model(60, 384, 8, 7168, 2048),
    "qwen3-30b-a3b": Model(48, 128, 8, 2048, 768),
    "qwen3-235b-a22b": Model(94, 128, 8, 4096, 1536),
    "gpt-oss-20b": Model(24, 32, 4, 2880, 2880),
    "gpt-oss-120b": Model(36, 128, 4, 2880, 2880),
}

# The standard deviation of the logarithm of an expert's popularity, and its correlation from one
# batch to the next.
_SPREAD, _STAYS = 0.6, 0.98


def synthetic_loads(
    model: Model, n_layers: int, n_batches: int, tokens: int, seed: int = 0
) -> np.ndarray:
    """Loads int64 `[n_layers, n_batches, n_logical]` of a router whose preferences drift.

    An expert's popularity is log-normal with a standard deviation of 0.6, and drifts: logarithms
    that are n batches apart correlate by 0.98ⁿ. Within a batch, tokens choose independently.

    Args:
      model: gives the experts and top-k.
      n_layers, n_batches: numbers of layers and batches.
      tokens: tokens of a batch, over all ranks.
      seed: seed of the random numbers.

    >>> from lplb_jax._models import MODELS, synthetic_loads
    >>> synthetic_loads(MODELS["mixtral-8x7b"], 1, 3, tokens=100).sum(axis=2).tolist()
    [[200, 200, 200]]
    """
    random = np.random.default_rng(seed)
    fresh = random.standard_normal((n_batches, n_layers, model.n_logical))
    logs = np.empty_like(fresh)
    logs[0] = fresh[0]
    for i in range(1, n_batches):
        logs[i] = _STAYS * logs[i - 1] + np.sqrt(1 - _STAYS**2) * fresh[i]
    popularity = np.exp(_SPREAD * logs).swapaxes(0, 1)
    shares = popularity / popularity.sum(axis=2, keepdims=True)
    return random.multinomial(tokens * model.top_k, shares)
