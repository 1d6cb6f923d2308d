"""More ranks than GPUs: tests accesses to peer memory by many ranks on few GPUs.

XLA has one device per GPU, so kernels run without it, on raw pointers and streams.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from exchange_batch import ExchangeBatch
from graph import check, pointer, runtime
from rebalance_call import RebalanceCall

from lplb_jax import Placement, _bench, _native
from lplb_jax.comm import Windows
from lplb_jax.topologies import Topology


class VirtualRanks:
    """Ranks distributed over `gpus`, each the only device of a communicator, with its own stream.

    At most four ranks per GPU: a GPU has few queues for streams, and kernels of two streams in one
    queue wait for one another. A context manager that ends the ranks.

    Attributes:
      ids: every rank's communicator.
      devices: every rank's GPU.
    """

    def __init__(
        self,
        gpus: Sequence[Any],
        size: int,
        max_experts: int,
        timeout_s: float = 20.0,
        windows: Windows | None = None,
    ) -> None:
        self._native = native = _native.built_cuda()
        self.ids = [10_000 + rank for rank in range(size)]
        self.devices = [gpus[rank % len(gpus)] for rank in range(size)]
        self._ordinals = [device.local_hardware_id for device in self.devices]
        for a, b in itertools.permutations(set(self._ordinals), 2):
            native.comm_enable_peer(a, b)
        stride = max_experts + 1
        n_bytes = native.comm_inbox_bytes(size, stride)
        self._inboxes = [native.Window(ordinal, n_bytes) for ordinal in self._ordinals]
        self._windows = []
        if windows is not None:
            self._windows = [native.Window(o, windows.n_bytes) for o in self._ordinals]
        inboxes = [inbox.address for inbox in self._inboxes]
        self._claimed, self._streams = [], []
        for rank, (identifier, ordinal) in enumerate(zip(self.ids, self._ordinals, strict=True)):
            native.comm_attach(identifier, ordinal, rank, inboxes, stride, timeout_s)
            if windows is not None:
                addresses = [window.address for window in self._windows]
                native.comm_attach_windows(identifier, ordinal, addresses, windows.shape)
            self._claimed.append(self.put(rank, np.int32(rank)))
            native.comm_use_device(ordinal)
            flag = runtime.cudaStreamNonBlocking
            self._streams.append(int(check(runtime.cudaStreamCreateWithFlags(flag))))

    def __enter__(self) -> VirtualRanks:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        for identifier in self.ids:
            self._native.comm_detach(identifier)
        self._windows.clear()
        self._inboxes.clear()
        for stream in self._streams:
            check(runtime.cudaStreamDestroy(stream))

    def put(self, rank: int, array: Any) -> jax.Array:
        """The array on the rank's GPU."""
        return jax.block_until_ready(jax.device_put(array, self.devices[rank]))

    def call(
        self,
        rank: int,
        r2o: Topology | np.ndarray,
        placement: Placement,
        indices: np.ndarray,
        fan_out: int = 0,
        **costs: Any,
    ) -> RebalanceCall:
        """The arguments of `rebalance` on this rank."""
        return RebalanceCall(r2o, placement, indices, self.devices[rank], fan_out, **costs)

    def sync(
        self,
        rank: int,
        counts: jax.Array,
        matrix: jax.Array,
        stream: int | None = None,
        claimed: jax.Array | None = None,
    ) -> None:
        """Launches `sync_loads` as this rank; a different rank `claimed` must be refused."""
        claimed = self._claimed[rank] if claimed is None else claimed
        pointers = pointer(claimed), pointer(counts), counts.size, pointer(matrix)
        _bench.launch_sync(*self._who(rank), *pointers, self._on(rank, stream))

    def rebalance(self, rank: int, call: RebalanceCall, stream: int | None = None) -> None:
        """Launches `rebalance` as this rank."""
        claimed = pointer(self._claimed[rank])
        launch: Any = _bench.launch_synced_rebalance
        launch(*self._who(rank), claimed, *call.arguments, self._on(rank, stream))

    def there(self, rank: int, batch: ExchangeBatch, stream: int | None = None) -> None:
        """Launches the way there of `batch` as this rank."""
        routing, given, out = batch.of(rank, self._claimed[rank])[:3]
        _bench.launch_there(
            *self._who(rank), batch.sizes, batch.first_row, batch.per_entry, batch.n_bytes,
            batch.blocks, routing, [*map(pointer, given), batch.listed(rank)],
            list(map(pointer, out)), self._on(rank, stream),
        )  # fmt: skip

    def back(self, rank: int, batch: ExchangeBatch, stream: int | None = None) -> None:
        """Launches the way back of what `there` sent."""
        routing, _, out, home = batch.of(rank, self._claimed[rank])
        _bench.launch_back(
            *self._who(rank), batch.sizes, batch.per_entry, batch.n_bytes, batch.row_type,
            batch.blocks, routing, list(map(pointer, out)), list(map(pointer, home)),
            self._on(rank, stream),
        )  # fmt: skip

    def failures(self) -> list[str]:
        """Every rank's error report; "" if there is none."""
        return [self._native.comm_failure(identifier) for identifier in self.ids]

    def use_device(self, rank: int) -> None:
        """Makes the rank's GPU the current one."""
        self._native.comm_use_device(self._ordinals[rank])

    def wait(self) -> None:
        """Waits until all launches are done."""
        for stream in self._streams:
            check(runtime.cudaStreamSynchronize(stream))

    def _who(self, rank: int) -> tuple[int, int]:
        return self.ids[rank], self._ordinals[rank]

    def _on(self, rank: int, stream: int | None) -> int:
        """The stream to launch on; any other than the rank's own belongs to the current device."""
        if stream is None:
            self.use_device(rank)
        return self._streams[rank] if stream is None else stream
