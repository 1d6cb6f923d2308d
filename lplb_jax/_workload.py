"""The workload of `advise`: loads to place from, and others to evaluate on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lplb_jax import _host
from lplb_jax._models import MODELS, Model, synthetic_loads
from lplb_jax.data import Traces, arrays_of
from lplb_jax.history import LoadHistory

# The arrays of a workload.
_ARRAYS = "indices", "history", "loads"
# More layers and batches add little information and take longer.
_MOST_HISTORY, _MOST_JUDGED = 16, 64
# If the number of tokens per rank is not given.
_TOKENS_PER_RANK = 4096
_SYNTHETIC_BATCHES = 48
# Tokens of a batch that the solvers take.
_MOST_TOKENS = np.iinfo(np.int32).max


class Workload(NamedTuple):
    """Loads of some layers, and their sizes.

    Attributes:
      name: the source of the loads, in words.
      history: `[layers, batches, n_logical]`, to place from.
      batches: int64 `[layers, batches, n_logical]`, later batches to evaluate placements on; the
        same batch as in `history` if there is only one.
      n_layers: layers of the model; `history` may hold fewer.
      rows: rows of a batch: its tokens, times the experts per token.
      top_k: experts per token, None if unknown.
      model: sizes of the model, None if unknown.
      in_order: whether `batches` follow `history` in time, so that age is meaningful.
      note: an assumption about the ids, in a sentence; empty for none.
    """

    name: str
    history: np.ndarray
    batches: np.ndarray
    n_layers: int
    rows: float
    top_k: int | None
    model: Model | None
    in_order: bool
    note: str = ""

    @property
    def n_logical(self) -> int:
        """Experts of a layer."""
        return self.history.shape[-1]

    @property
    def held_out(self) -> bool:
        """Whether placements are evaluated on batches that they were not made from."""
        return self.history is not self.batches


def find_workload(
    workload: Any,
    *,
    ep_size: int,
    n_logical: int | None,
    tokens_per_rank: int | None,
    top_k: int | None,
    most_layers: int,
) -> Workload:
    """The workload that a file, the name of a model, or an array describes.

    Args:
      workload: see `lplb_jax.advise`.
      ep_size: ranks.
      n_logical: number of experts, for workloads of ids; None for the largest id + 1.
      tokens_per_rank: tokens of a rank in a batch; None for the workload's.
      top_k: experts per token, for workloads of loads.
      most_layers: layers to look at, evenly spaced.

    Raises:
      OSError: the file cannot be read.
      TypeError, ValueError: its contents are invalid; the message starts with an argument's name.
    """
    if isinstance(workload, str) and workload in MODELS and not Path(workload).exists():
        return _of_model(workload, ep_size, tokens_per_rank, most_layers)
    if isinstance(workload, str | Path):
        return _of_file(workload, ep_size, n_logical, tokens_per_rank, top_k, most_layers)
    sizes = ep_size, n_logical, tokens_per_rank, top_k, most_layers
    if isinstance(workload, Traces):
        return _of_arrays("traces", workload._asdict(), *sizes)
    if isinstance(workload, Mapping):
        given = {name: workload[name] for name in _ARRAYS if name in workload}
        arrays = {name: _host.array_of("workload", array) for name, array in given.items()}
        return _of_arrays(" and ".join(arrays) or "the dict", arrays, *sizes)
    if isinstance(workload, LoadHistory):
        return _of_arrays("loads", {"loads": workload.batches()}, *sizes)
    loads = _host.array_of("workload", workload)
    _check_no_ids(loads)
    return _of_arrays("loads", {"loads": loads}, *sizes)


def _of_model(name: str, ep_size: int, tokens_per_rank: int | None, most_layers: int) -> Workload:
    model = MODELS[name]
    tokens = (tokens_per_rank or _TOKENS_PER_RANK) * ep_size
    n_layers = min(most_layers, model.n_layers)
    loads = synthetic_loads(model, n_layers, _SYNTHETIC_BATCHES, tokens)
    loads = _split(f"{name} (synthetic routing)", loads)
    rows = float(tokens * model.top_k)
    return loads._replace(n_layers=model.n_layers, rows=rows, top_k=model.top_k, model=model)


def _of_file(path: str | Path, *sizes: Any) -> Workload:
    if not Path(path).exists():
        raise ValueError(
            f"workload: expected an .npz file that exists, or a model, one of {', '.join(MODELS)}, "
            f"got {str(path)!r}"
        )
    try:
        arrays = arrays_of(path, _ARRAYS)
    except ValueError as error:
        raise ValueError(str(error).replace("path", "workload", 1)) from None
    return _of_arrays(str(path), arrays, *sizes)


def _of_arrays(
    name: str,
    arrays: dict[str, np.ndarray],
    ep_size: int,
    n_logical: int | None,
    tokens_per_rank: int | None,
    top_k: int | None,
    most_layers: int,
) -> Workload:
    """From `indices` or `loads`, and an optional `history` of earlier batches."""
    if ("indices" in arrays) == ("loads" in arrays):
        held = "both" if "loads" in arrays else "neither"
        raise ValueError(
            f"workload: expected either an array `indices` [layers, tokens, top_k] or `loads` "
            f"[layers, batches, n_experts], got {held} in {name}"
        )
    history, note = None, ""
    if "history" in arrays:
        history = _checked_loads(arrays["history"], n_logical, name)
        n_logical = history.shape[-1]
    if "indices" in arrays:
        indices = _checked_ids(arrays["indices"], n_logical, name)
        top_k = indices.shape[2]
        if n_logical is None:
            n_logical = int(indices.max()) + 1
            note = _note_of_none(arrays["indices"], indices)
        layers = _some(len(indices), most_layers)
        parts = _parts(indices.shape[1], ep_size, tokens_per_rank, "history" in arrays)
        loads = np.array([[_count(part, n_logical) for part in parts(indices[i])] for i in layers])
        n_layers = len(indices)
    else:
        loads = _checked_loads(arrays["loads"], None if "history" in arrays else n_logical, name)
        n_layers, layers = len(loads), _some(len(loads), most_layers)
        loads = loads[layers]
    if history is not None:
        expected, got = (n_layers, loads.shape[-1]), (len(history), n_logical)
        if expected != got:
            raise ValueError(
                f"workload: expected the same layers and experts in history as in the batches, "
                f"{expected}, got {got} in {name}"
            )
        found = Workload(
            name, history[layers][:, -_MOST_HISTORY:], _as_tokens(loads), 0, 0.0, None, None, False
        )
    else:
        found = _split(name, loads)
    rows = _rows_of(found, ep_size, tokens_per_rank, top_k)
    return found._replace(n_layers=n_layers, rows=rows, top_k=top_k, note=note)


def _split(name: str, loads: np.ndarray) -> Workload:
    """The first half of the batches to place from, the rest to evaluate on."""
    n_batches = loads.shape[1]
    n_history = n_batches // 2
    tokens = _as_tokens(loads)
    if n_history == 0:
        return Workload(name, tokens, tokens, 0, 0.0, None, None, False)
    history = loads[:, max(0, n_history - _MOST_HISTORY) : n_history]
    judged = tokens[:, n_history : n_history + _MOST_JUDGED]
    return Workload(name, history, judged, 0, 0.0, None, None, True)


def _rows_of(
    workload: Workload, ep_size: int, tokens_per_rank: int | None, top_k: int | None
) -> float:
    if tokens_per_rank is not None and top_k is not None:
        return float(tokens_per_rank * top_k * ep_size)
    return float(workload.batches.sum(axis=2).mean())


def _some(n_layers: int, most: int) -> np.ndarray:
    """The layers to look at: all, or evenly spaced ones."""
    return np.unique(np.linspace(0, n_layers - 1, min(most, n_layers)).round().astype(int))


def _parts(n_tokens: int, ep_size: int, tokens_per_rank: int | None, has_history: bool) -> Any:
    """A function that cuts the tokens of a layer into batches."""
    if tokens_per_rank is None:
        n_batches = 1 if has_history or n_tokens < 2 else 2
        return lambda ids: np.array_split(ids, n_batches)
    size = tokens_per_rank * ep_size
    if n_tokens < size * (1 if has_history else 2):
        raise ValueError(
            f"tokens_per_rank: expected at most "
            f"{n_tokens // ep_size // (1 if has_history else 2)}, so that {n_tokens} tokens are "
            f"{'a batch' if has_history else 'two batches'} of {ep_size} ranks, got "
            f"{tokens_per_rank}"
        )
    return lambda ids: np.split(ids[: len(ids) // size * size], len(ids) // size)


def _count(ids: np.ndarray, n_logical: int) -> np.ndarray:
    return np.bincount(ids[ids >= 0].ravel(), minlength=n_logical)


def _as_tokens(loads: np.ndarray) -> np.ndarray:
    """int64 loads; batches in other units, or of too many tokens, are scaled to about a million."""
    total = loads.sum(axis=2, keepdims=True)
    if total.max() > _MOST_TOKENS or not np.array_equal(loads, np.rint(loads)):
        loads = loads / np.where(total > 0, total, 1) * (1 << 20)
    return np.rint(loads).astype(np.int64)


def _checked_ids(indices: np.ndarray, n_logical: int | None, name: str) -> np.ndarray:
    """Ids int64 `[layers, tokens, top_k]`, −1 for none."""
    if indices.dtype.kind not in "iu" or indices.ndim != 3 or indices.size == 0:
        raise ValueError(
            f"workload: expected indices as integers [layers, tokens, top_k], without empty axes, "
            f"got {indices.dtype} {list(indices.shape)} in {name}"
        )
    none = np.iinfo(indices.dtype).max if indices.dtype.kind == "u" else -1
    ids = _host.with_minus_one(indices, n_logical)
    most = n_logical if n_logical is not None else 1 << 20
    if ids.min() < -1 or ids.max() >= most:
        wrong = ids.min() if ids.min() < -1 else ids.max()
        raise ValueError(
            f"workload: expected expert ids below {most}, or {none} for none, got {wrong} in {name}"
        )
    if ids.max() < 0:
        raise ValueError(f"workload: expected indices that name experts, got none in {name}")
    return ids


def _note_of_none(given: np.ndarray, ids: np.ndarray) -> str:
    """Which id of an unsigned type was taken for none, as nothing else told it."""
    if given.dtype.kind != "u" or ids.min() >= 0:
        return ""
    none = np.iinfo(given.dtype).max
    return f"Index {none} was taken for none; if it is an expert, say that there are {none + 1}."


def _check_no_ids(loads: np.ndarray) -> None:
    """Raises if an array that should hold loads holds the router's choices, as far as one can tell.

    The choices of a token are distinct, and there are more tokens than experts. Loads of experts
    are larger than the number of batches, or often equal.
    """
    if loads.dtype.kind not in "iu" or loads.ndim < 2 or loads.size == 0:
        return
    ids = _host.with_minus_one(loads, None)
    rows = np.sort(ids.reshape(-1, ids.shape[-1]), axis=1)
    distinct = (rows[:, 1:] > rows[:, :-1]) | (rows[:, 1:] < 0)
    if ids.shape[-2] > rows.max() and distinct.all():
        raise ValueError(
            f"workload: expected an array of loads [layers, batches, n_experts], got "
            f"{loads.dtype} {list(loads.shape)} with distinct numbers up to {rows.max()} in every "
            f"row, which look like the router's choices; pass {{'indices': workload}} if they are, "
            f"[layers, tokens, top_k], otherwise {{'loads': workload}}"
        )


def _checked_loads(given: np.ndarray, n_logical: int | None, name: str) -> np.ndarray:
    """float64 loads `[layers, batches, n_logical]`, finite and at least 0."""
    floats = None if given.dtype.kind == "b" else _host.as_floats(given)
    if floats is None or not 1 <= given.ndim <= 3 or given.size == 0:
        raise ValueError(
            f"workload: expected loads as numbers [layers, batches, n_experts], [layers, "
            f"n_experts] or [n_experts], without empty axes, got {given.dtype} "
            f"{list(given.shape)} in {name}"
        )
    loads = floats if given.ndim == 3 else floats.reshape(-1, 1, given.shape[-1])
    if n_logical is not None and loads.shape[-1] != n_logical:
        raise ValueError(
            f"n_logical: expected {loads.shape[-1]}, the number of experts in {name}, got "
            f"{n_logical}; the router's choices are passed as {{'indices': …}}"
        )
    if not np.isfinite(loads).all() or loads.min() < 0 or loads.max() >= 1 << 40:
        raise ValueError(
            f"workload: expected finite loads of at least 0 and below 2⁴⁰, got {loads.min()} to "
            f"{loads.max()} in {name}; the router's choices are passed as {{'indices': …}}"
        )
    if not loads.any(axis=2).all():
        layer, batch = np.argwhere(~loads.any(axis=2))[0]
        raise ValueError(
            f"workload: expected tokens in every batch, got none in layer {layer}, batch {batch} "
            f"of {name}"
        )
    return loads
