"""Routing of a real mixture-of-experts model, for demonstrations, tests and benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

AUX_LOSSES = ("1e-3", "1e-2")


class Traces(NamedTuple):
    """What a router chose, and how loaded its experts were before.

    Attributes:
      indices: unsigned integers `[layers, tokens, top_k]`, logical expert ids. Of the packaged
        traces: uint8, at step 1200 of training.
      history: int32 `[layers, n_logical]`, tokens per expert; of the packaged traces: at step 300.
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


def read_traces(path: str | Path) -> Traces:
    """Reads traces of your own, such as `examples/train_moe.py --traces` writes.

    Args:
      path: an .npz file with `indices`, uint8 or uint16 `[layers, tokens, top_k]`, below n_logical,
        and `history`, int32 `[layers, n_logical]`, at least 0, as in `Traces`. No size is 0.

    Returns:
      `Traces` of NumPy arrays.

    Raises:
      OSError: the file cannot be read.
      ValueError: it holds something else.

    >>> import io
    >>> from lplb_jax.data import read_traces
    >>> file = io.BytesIO()
    >>> np.savez(file, indices=np.zeros((1, 8, 2), np.uint8), history=np.ones((1, 4), np.int32))
    >>> _ = file.seek(0)
    >>> read_traces(file).indices.shape
    (1, 8, 2)
    """
    arrays = _arrays(path, ("indices", "history"))
    indices, history = arrays["indices"], arrays["history"]
    fits = (
        indices.dtype in (np.uint8, np.uint16)
        and history.dtype == np.int32
        and indices.ndim == 3
        and history.ndim == 2
        and len(indices) == len(history)
        and indices.size > 0
        and history.size > 0
    )
    if not fits:
        raise ValueError(
            f"path: expected indices uint8 or uint16 [layers, tokens, top_k] and history int32 "
            f"[layers, n_logical], without empty axes, got {indices.dtype} {list(indices.shape)} "
            f"and {history.dtype} {list(history.shape)} in {path}"
        )
    n_logical = history.shape[1]
    if indices.max() >= n_logical:
        raise ValueError(
            f"path: expected expert ids below n_logical = {n_logical}, the length of history's "
            f"rows, got {indices.max()} in {path}"
        )
    if history.min() < 0:
        raise ValueError(f"path: expected loads of at least 0, got {history.min()} in {path}")
    return Traces(indices, history)


def _arrays(path: str | Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """All those of an .npz file."""
    arrays = arrays_of(path, names)
    for name in names:
        if name not in arrays:
            raise ValueError(
                f"path: expected an .npz file with the arrays {' and '.join(names)}, got {path}, "
                f"which has no array {name}"
            )
    return arrays


def arrays_of(path: str | Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The named arrays of an .npz file. NumPy raises many types of errors for damaged ones."""
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in names if name in file}
    except OSError:
        raise
    except Exception:
        raise ValueError(
            f"path: expected an .npz file as written by numpy.savez, got {path}, which is not one "
            f"or is damaged"
        ) from None
    return {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}
