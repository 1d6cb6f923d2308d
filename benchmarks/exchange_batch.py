"""A batch of tokens that ranks exchange, made in NumPy: kernels' inputs and expected results."""

from __future__ import annotations

from collections.abc import Callable

import jax
import ml_dtypes
import numpy as np
from graph import pointer

_TYPES = {"bfloat16": 0, "float16": 1, "float32": 2, "float64": 3}  # cuda/exchange.h


class ExchangeBatch:
    """A batch; `ranks_of` [n_ranks, tokens, top_k] is each choice's destination, −1 for none.

    Attributes:
      row: int32 of that shape, rank · capacity + row; −1 also for choices without room.
      sizes, per_entry, n_bytes, row_type, blocks, first_row: arguments of a launch.
      tokens, gates: the inputs of every rank.
      sent: tokens from each rank to each other.
    """

    def __init__(
        self,
        put: Callable[[int, np.ndarray], jax.Array],
        ranks_of: np.ndarray,
        capacity: int,
        hidden: int,
        rng: np.random.Generator,
        *,
        dtype: str = "bfloat16",
        blocks: tuple[int, int] = (8, 4),
        first_row: int = 0,
        per_entry: tuple[int, ...] = (1,),
        listed: bool = False,
    ) -> None:
        n_ranks, n_tokens, top_k = ranks_of.shape
        self.row = np.full(ranks_of.shape, -1, np.int32)
        for rank in range(n_ranks):
            goes = ranks_of == rank
            place = np.cumsum(goes).reshape(goes.shape) - 1
            fits = goes & (place < capacity)
            self.row[fits] = rank * capacity + place[fits]
        rank = np.where(self.row < 0, -1, self.row // capacity)
        order = np.full(ranks_of.shape, -1, np.int32)
        self.sent = np.zeros((n_ranks, n_ranks), np.int32)
        room = np.zeros((n_ranks, n_ranks), np.int32)
        for source in range(n_ranks):
            for peer in range(n_ranks):
                if peer == source:
                    continue
                there = rank[source] == peer
                tokens = there.any(axis=1)
                order[source, tokens, there.argmax(axis=1)[tokens]] = np.arange(tokens.sum())
                self.sent[source, peer] = tokens.sum()
                room[source, peer] = min(n_tokens, there.sum())
        there, home = (np.cumsum(room, axis=axis) - room for axis in (0, 1))
        self._capacity = capacity
        n_received = min((n_ranks - 1) * n_tokens, capacity)
        self.sizes = [n_tokens, top_k, capacity, n_received]
        self.blocks, self.row_type, self.first_row = list(blocks), _TYPES[dtype], first_row
        self.per_entry = list(per_entry)
        self.dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
        self.n_bytes = [hidden * self.dtype.itemsize, 4]
        # Sums of small integers are exact in every dtype and order.
        self.tokens = rng.integers(-8, 8, (n_ranks, n_tokens, hidden), np.int8).astype(self.dtype)
        self.gates = rng.random(ranks_of.shape).astype(np.float32)
        self._put, self._ranks = put, []
        self._listed: list[jax.Array | None] = [None] * n_ranks
        for r in range(n_ranks):
            lists = np.stack([self.sent[r], there[r], there[:, r], home[:, r], home[r]])
            routing = [put(r, array) for array in (self.row[r], order[r], lists.astype(np.int32))]
            arrays = self._parted(self.tokens[r])
            if listed:
                at = rng.permutation(n_tokens // sum(per_entry))
                self._listed[r] = put(r, np.argsort(at).astype(np.int32))
                arrays = [array[at] for array in arrays]
            given = [put(r, array) for array in (*arrays, self.gates[r])]
            self._ranks.append((routing, given, [], []))
        self.clear()

    def clear(self) -> None:
        """Clears all results, so that correct values were written afterwards."""
        (n_tokens, top_k, capacity, n_received), n_ranks = self.sizes, len(self.row)
        out = [
            *self._parted(np.zeros((capacity, self.tokens.shape[2]), self.dtype)),
            np.zeros(capacity, np.float32),
            np.full((max(n_received, 1), top_k), -7, np.int32),
            np.zeros(n_ranks, np.int32),
        ]
        home = self._parted(np.zeros_like(self.tokens[0]))
        home.append(np.zeros((n_tokens, top_k), np.float32))
        for rank, (_, _, *results) in enumerate(self._ranks):
            for of_way, arrays in zip(results, (out, home), strict=True):
                of_way[:] = [self._put(rank, array) for array in arrays]

    def of(
        self, rank: int, claimed: jax.Array
    ) -> tuple[list[int], list[jax.Array], list[jax.Array], list[jax.Array]]:
        """Pointers to the routing; tokens and gates; and the results there and back."""
        routing, *arrays = self._ranks[rank]
        return ([pointer(array) for array in (claimed, *routing)], *arrays)

    def listed(self, rank: int) -> int:
        """Pointer to the entries that the rank's tokens are, in order; 0 for all in their order."""
        listed = self._listed[rank]
        return 0 if listed is None else pointer(listed)

    def check(self) -> None:
        """Raises if a row, gate, sum or number of tokens is wrong."""
        n_ranks = len(self.row)
        there = [self._joined(of_rank[2]) for of_rank in self._ranks]
        rows, row_gates, _, sizes = map(np.stack, zip(*there, strict=True))
        np.testing.assert_array_equal(sizes, self.sent.T)
        source, token, choice = np.nonzero(self.row >= 0)
        place = self.row[source, token, choice]
        rows, row_gates = rows.reshape(-1, rows.shape[2]), row_gates.reshape(-1)
        np.testing.assert_array_equal(rows[place], self.tokens[source, token])
        np.testing.assert_array_equal(row_gates[place], self.gates[source, token, choice])
        times = (self.row >= 0).sum(axis=2)[..., None]
        for rank in range(n_ranks):
            tokens, gates = self._joined(self._ranks[rank][3])
            expected = self.tokens[rank].astype(np.float64) * times[rank]
            np.testing.assert_array_equal(tokens.astype(np.float64), expected)
            np.testing.assert_array_equal(gates, np.where(self.row[rank] >= 0, self.gates[rank], 0))

    def is_poisoned(self, rank: int) -> bool:
        """Whether everything that the rank received is NaN, but nothing before first_row."""
        rows, gates = (a.astype(np.float64) for a in self._joined(self._ranks[rank][2])[:2])
        lost = np.isnan(rows)
        spared = not lost[: self.first_row].any()
        return bool(spared and lost[self.first_row :].all() and np.isnan(gates).all())

    def _parted(self, rows: np.ndarray) -> list[np.ndarray]:
        """Rows in several arrays: an entry's are numbered through them, see cuda/exchange.h."""
        ends = np.cumsum(self.per_entry)
        entries = rows.reshape(-1, ends[-1], rows.shape[1])
        return [np.ascontiguousarray(part) for part in np.split(entries, ends[:-1], axis=1)]

    def _joined(self, arrays: list[jax.Array]) -> list[np.ndarray]:
        """The inverse for the first of `arrays`, with the others."""
        found, n = list(map(np.asarray, arrays)), len(self.per_entry)
        rows = np.concatenate(found[:n], axis=1)
        return [rows.reshape(-1, rows.shape[2]), *found[n:]]
