"""refresh(): whether a new placement is worth the cost of moving experts."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import inspect
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lplb_jax import _cost, _host
from lplb_jax._portfolio import imbalances
from lplb_jax._problem import check_count
from lplb_jax.history import LoadHistory
from lplb_jax.placement import Placement, place_experts

# Of the batches kept, this share is not placed from, but judges.
_JUDGES = 0.25
# Tokens of an expert in a batch; sums and products with the ranks' number stay below 2⁶³.
_MOST_TOKENS = 1 << 40


class Refresh(NamedTuple):
    """What `refresh` decided, by layer.

    Attributes:
      placement: the placement to use from now on, stacked like the given one.
      moved: bool `[layers]`, which layers have a new placement.
      before: float `[layers]`, largest over mean rank load of the given placement, on the newest
        batches.
      after: the same of the returned placement.
      saved_s: float `[layers]`, seconds that a new placement saves until the next refresh, minus
        the time to move experts; also for layers that were not changed.
      fetched: int `[layers]`, the most experts that any rank receives; 0 if nothing moves.
      reason: the decision in words.
    """

    placement: Placement
    moved: np.ndarray
    before: np.ndarray
    after: np.ndarray
    saved_s: np.ndarray
    fetched: np.ndarray
    reason: str


def refresh(
    history: LoadHistory | Any,
    placement: Placement,
    *,
    steps: int,
    row_s: float,
    bytes_per_expert: float,
    inference: bool = False,
    link: float = _cost.LINK,
    most_layers: int | None = None,
    most_bytes: float | None = None,
) -> Refresh:
    """Updates the placements of layers where that pays off, on the host, with few moves.

    A new placement is made from all batches except the newest quarter, and both placements are
    balanced exactly on that quarter. A layer switches if the tokens saved on its busiest rank save
    more time until the next refresh than the move takes. The layers with the largest possible gain
    come first.

    Args:
      history: a `LoadHistory`, or loads `[layers, batches, n_logical]`, the oldest first: whole
        tokens in any real dtype.
      placement: the current placement, stacked, `[layers, …]`; along topologies or not.
      steps: steps until the next refresh.
      row_s: seconds per row (a token counts once for each expert it chooses):
        6 · parameters of an expert / FLOP/s in training, 2 · … in inference.
      bytes_per_expert: bytes that move with an expert: its weights and, in training, its
        optimizer state.
      inference: copies stay in place between steps, so they have to be moved as well. Otherwise
        only homes count, because copies are fetched in every step.
      link: bytes per second at which a rank receives experts.
      most_layers: the most layers to change in one call; None for all.
      most_bytes: the most bytes that a rank may receive in one call; None for no limit.

    Returns:
      A `Refresh`. If nothing pays off, its placement is the given one.

    Raises:
      TypeError, ValueError: an argument is not as above; the message names it.

    Example: experts 0 and 1, both on rank 0, have become hot; moving one takes 4 ms.

    >>> placement = Placement.from_phy2log([[[0, 1], [2, 3]]], ep_size=2)
    >>> history = np.array([[[300, 300, 100, 100]] * 4])  # 600 and 200 tokens on the ranks
    >>> costs = {"row_s": 1e-7, "bytes_per_expert": 1e9, "link": 2.5e11}
    >>> refresh(history, placement, steps=100, **costs).reason
    'no: moving experts takes longer than it saves, or exceeds the limits'
    >>> result = refresh(history, placement, steps=1000, **costs)
    >>> result.reason, result.before.tolist(), result.after.tolist()
    ('1 of 1 layers placed anew: 0.016 s saved', [1.5], [1.0])
    """
    _check_options(
        steps=steps,
        row_s=row_s,
        bytes_per_expert=bytes_per_expert,
        inference=inference,
        link=link,
        most_layers=most_layers,
        most_bytes=most_bytes,
    )
    placement = _on_host(placement)
    batches = _batches_of(history, placement)
    n_layers, n_batches, _ = batches.shape
    result = Refresh(
        placement,
        moved=np.zeros(n_layers, bool),
        before=np.ones(n_layers),
        after=np.ones(n_layers),
        saved_s=np.zeros(n_layers),
        fetched=np.zeros(n_layers, int),
        reason="no: the history holds no batch yet",
    )
    if n_batches == 0:
        return result
    n_judges = max(1, round(_JUDGES * n_batches))
    judges, earlier = batches[:, -n_judges:], batches[:, : n_batches - n_judges or None]
    seconds, move_s = steps * row_s, bytes_per_expert / link
    mean = judges.sum(axis=2).mean(axis=1) / placement.ep_size
    now = np.array([_largest(*pair) for pair in zip(_layers(placement), judges, strict=True)])
    result.before[:] = result.after[:] = now / np.where(mean > 0, mean, now + (now == 0))
    # No placement can save more than the excess over the mean. In training, new copies are free.
    most_saved = (now - mean) * seconds
    worth_a_try = most_saved > (move_s if inference else 0)
    hopeful = np.argsort(-most_saved, kind="stable")[: worth_a_try.sum()][:most_layers]
    if len(hopeful) == 0:
        why = "no: the busiest ranks are too little above the mean for a move to pay off"
        return result._replace(reason=why)

    layers, room = _layers(placement), np.inf if most_bytes is None else most_bytes
    for i in hopeful:
        new = _anew(earlier[i], layers[i])
        fetched = _most_fetched(layers[i], new, inference)
        largest = _largest(new, judges[i])
        result.saved_s[i] = (now[i] - largest) * seconds - fetched * move_s
        if result.saved_s[i] <= 0 or fetched * bytes_per_expert > room:
            continue
        room -= fetched * bytes_per_expert
        layers[i] = new
        result.moved[i], result.fetched[i], result.after[i] = True, fetched, largest / mean[i]
    if not result.moved.any():
        why = "no: moving experts takes longer than it saves, or exceeds the limits"
        return result._replace(reason=why)
    saved_s = result.saved_s[result.moved].sum()
    why = f"{result.moved.sum()} of {n_layers} layers placed anew: {saved_s:.2g} s saved"
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    return result._replace(placement=stacked, reason=why)


_ARGUMENTS = inspect.signature(refresh)


def _check_options(
    *,
    steps: int,
    row_s: float,
    bytes_per_expert: float,
    inference: bool,
    link: float,
    most_layers: int | None,
    most_bytes: float | None,
) -> None:
    """Raises if an option of `refresh` is not as its docstring says."""
    check_count("steps", steps)
    rates = {"row_s": row_s, "bytes_per_expert": bytes_per_expert, "link": link}
    for name, value in rates.items():
        if not isinstance(value, numbers.Real) or not 0 < value < np.inf:
            raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")
    if not isinstance(inference, bool | np.bool_):
        raise TypeError(f"inference: expected a bool, got {inference!r}")
    if most_layers is not None and (
        not isinstance(most_layers, int | np.integer) or most_layers < 1
    ):
        raise ValueError(
            f"most_layers: expected None or an integer of at least 1, got {most_layers!r}"
        )
    if most_bytes is not None and not (isinstance(most_bytes, numbers.Real) and most_bytes > 0):
        raise ValueError(f"most_bytes: expected None or a number above 0, got {most_bytes!r}")


class Refresher:
    """`refresh` in a background thread: `start` it, and `poll` in later steps.

    The next call of either method raises any error of the thread.

    Args:
      options: keyword arguments of `refresh`.

    Raises:
      TypeError, ValueError: an option is missing, unknown or not as `refresh` takes it.

    >>> placement = Placement.from_phy2log([[[0, 1], [2, 3]]], ep_size=2)
    >>> refresher = Refresher(steps=1000, row_s=1e-7, bytes_per_expert=1e9)
    >>> refresher.start(np.array([[[300, 300, 100, 100]]]), placement)
    >>> refresher.poll(wait=True).moved.tolist(), refresher.poll()
    ([True], None)
    """

    def __init__(self, **options: Any) -> None:
        given = _ARGUMENTS.bind(None, None, **options)
        given.apply_defaults()
        _check_options(**given.kwargs)
        self._options = options
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "lplb_jax-refresh")
        self._running: concurrent.futures.Future[Refresh] | None = None

    def start(self, history: LoadHistory | Any, placement: Placement) -> None:
        """Starts with copies of the loads and the placement; both may be donated afterwards.

        Raises:
          RuntimeError: the last run goes on, or its result, which is kept, has not been polled.
          TypeError, ValueError: an argument is not as `refresh` takes it.
          Exception: whatever the last run raised; then nothing is started.
        """
        if self._running is not None:
            if self._running.done() and self._running.exception() is not None:
                self.poll()  # Raises it.
            raise RuntimeError("start: expected the last result to be polled first")
        on_host = _on_host(placement)
        self._running = self._thread.submit(refresh, _copied(history), on_host, **self._options)

    def poll(self, *, wait: bool = False) -> Refresh | None:
        """The result, once; None if it is not ready or nothing was started.

        Args:
          wait: wait for the result.

        Raises:
          Exception: whatever `refresh` raised.
        """
        if self._running is None or not (wait or self._running.done()):
            return None
        running, self._running = self._running, None
        return running.result()


def _copied(history: LoadHistory | Any) -> Any:
    """The same loads in other memory; on the device if they are there."""
    if isinstance(history, LoadHistory | jax.Array):
        return jax.tree.map(jnp.copy, history)
    return np.array(_host.array_of("history", history))  # JAX would cut int64 to 32 bits.


def _on_host(placement: Placement) -> Placement:
    """A stacked placement in NumPy arrays, with `log2phy` as wide as that of any new one."""
    if not isinstance(placement, Placement):
        raise TypeError(
            f"placement: expected a lplb_jax.Placement, got {type(placement).__name__}; make one "
            f"with place_experts"
        )
    placement = jax.device_get(placement)
    if np.ndim(placement.phy2log) != 2:
        raise ValueError(
            f"placement: expected a layer axis, phy2log [layers, n_physical], got "
            f"{list(np.shape(placement.phy2log))}; stack the placements of layers"
        )
    width = placement.log2phy.shape[-1]
    along = placement.topology is not None
    more = max(0, (2 if along else placement.n_physical - placement.n_logical + 1) - width)
    wide = np.pad(placement.log2phy, [(0, 0), (0, 0), (0, more)], constant_values=-1)
    return dataclasses.replace(placement, log2phy=wide)


def _layers(placement: Placement) -> list[Placement]:
    n_layers = len(placement.phy2log)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], placement) for i in range(n_layers)]


def _batches_of(history: LoadHistory | Any, placement: Placement) -> np.ndarray:
    """int64 `[layers, batches, n_logical]`."""
    kept = history.batches() if isinstance(history, LoadHistory) else history
    kept = _host.array_of("history", kept)
    expected = len(placement.phy2log), placement.n_logical
    if kept.ndim != 3 or (kept.shape[0], kept.shape[2]) != expected:
        raise ValueError(
            f"history: expected [layers, batches, n_logical] = [{expected[0]}, …, {expected[1]}] "
            f"as placement has, got {list(kept.shape)}"
        )
    tokens = _host.as_floats(kept)
    if tokens is None:
        raise TypeError(f"history: expected an array of real numbers, got {kept.dtype}")
    wrong = ~((tokens >= 0) & (tokens < _MOST_TOKENS) & (tokens == np.rint(tokens)))
    if wrong.any():
        raise ValueError(
            f"history: expected whole tokens, at least 0 and below 2⁴⁰, got {tokens[wrong][0]:g} "
            f"in {kept.dtype}; multiply shares by the tokens of their batch and round them"
        )
    return tokens.astype(np.int64)


def _largest(placement: Placement, batches: np.ndarray) -> float:
    """Tokens on the busiest rank, balanced exactly, averaged over batches."""
    totals = batches.sum(axis=1)
    some = batches[totals > 0]
    if len(some) == 0:
        return 0.0
    largest = imbalances(placement.phy2log, placement.ep_size, some) * some.sum(axis=1)
    return float(largest.sum() / placement.ep_size / len(batches))


def _anew(batches: np.ndarray, previous: Placement) -> Placement:
    """A placement for these batches that moves few experts, as wide as the current one."""
    sizes: dict[str, Any] = {
        "n_logical": previous.n_logical,
        "ep_size": previous.ep_size,
        "n_nodes": previous.n_nodes,
    }
    if previous.topology is None:
        sizes["n_physical"] = previous.n_physical
    else:
        sizes["redundants_per_rank"] = previous.redundants_per_rank
    stacked = jax.tree.map(lambda leaf: leaf[None], previous)
    new = place_experts(batches[None], previous.topology, **sizes, previous=stacked)
    new = jax.tree.map(lambda leaf: leaf[0], new)
    more = previous.log2phy.shape[1] - new.log2phy.shape[1]
    wide = np.pad(new.log2phy, [(0, 0), (0, more)], constant_values=-1)
    return dataclasses.replace(new, log2phy=wide)


def _most_fetched(old: Placement, new: Placement, copies: bool) -> int:
    """The most experts that any rank receives: homes alone, or copies as well."""

    def hosts(placement: Placement) -> np.ndarray:
        """Whether a rank has an expert, bool `[n_logical, ep_size]`."""
        slots = np.arange(placement.n_physical)
        if not copies:
            slots = placement.log2phy[:, 0]
        experts, rank = placement.phy2log[slots], slots * placement.ep_size // placement.n_physical
        found = np.zeros((placement.n_logical, placement.ep_size), bool)
        found[experts[experts >= 0], rank[experts >= 0]] = True
        return found

    return int((hosts(new) & ~hosts(old)).sum(axis=0).max())
