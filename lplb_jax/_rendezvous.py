"""Agreement between the processes of a mesh, through JAX's distributed key-value store."""

from __future__ import annotations

import time
from collections.abc import Sequence

import jax


class Rendezvous:
    """A meeting point of a mesh's processes, which all call the same methods in the same order."""

    def __init__(self, prefix: str, processes: Sequence[int], timeout_s: float):
        self.processes = list(processes)
        self._prefix = prefix
        self._timeout_ms = max(int(timeout_s * 1000), 1)
        self._round = 0

    @property
    def rank(self) -> int:
        """This process's index in `processes`."""
        return self.processes.index(jax.process_index())

    def say(self, name: str, value: str) -> str:
        """Tells the others this process's value without waiting for theirs; returns their key."""
        self._round += 1
        key = f"{self._prefix}/{self._round}-{name}"
        here = jax.process_index()
        if self.processes != [here]:
            _client().key_value_set(f"{key}/{here}", value)
        return key

    def exchange(self, name: str, value: str) -> list[str]:
        """Every process's value, in the order of `processes`."""
        key = self.say(name, value)
        if len(self.processes) == 1:
            return [value]
        client = _client()
        values = []
        end = time.monotonic() + self._timeout_ms / 1000  # for all of them together
        for process in self.processes:
            left_ms = max(int(1000 * (end - time.monotonic())), 1)
            try:
                values.append(client.blocking_key_value_get(f"{key}/{process}", left_ms))
            except Exception as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
                raise TimeoutError(
                    f"init_comm: process {process} did not come to {name!r} within "
                    f"{self._timeout_ms / 1000:g} s; all processes of the mesh must call init_comm "
                    f"in the same order and with the same arguments"
                ) from None
        return values

    def first_reason(self, reason: str | None) -> str | None:
        """The first process's reason why it cannot continue; None if all can."""
        for process, said in zip(
            self.processes, self.exchange("reason", reason or ""), strict=True
        ):
            if said:
                return said if len(self.processes) == 1 else f"{said} (process {process})"
        return None


def _client():
    from jax._src import distributed  # JAX has no public API for its key-value store.

    client = distributed.global_state.client
    if client is None:
        raise RuntimeError("init_comm: call jax.distributed.initialize() first")
    return client
