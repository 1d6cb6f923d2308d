"""Times kernels alone: captured into a CUDA graph and replayed between CUDA events."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

runtime: Any = importlib.import_module("cuda.bindings.runtime")  # only installed with GPUs


def check(result: tuple) -> Any:
    """The value of a CUDA runtime call, or an exception."""
    error, *values = result
    if error != runtime.cudaError_t.cudaSuccess:
        raise RuntimeError(f"{error!r}: {runtime.cudaGetErrorString(error)[1].decode()}")
    return values[0] if values else None


class Graph:
    """`launches` launches in a row, captured on the current device; `launch(stream)` runs one."""

    def __init__(self, launch: Callable[[int], None], launches: int):
        self._stream = check(runtime.cudaStreamCreate())
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        check(runtime.cudaStreamBeginCapture(self._stream, mode))
        for _ in range(launches):
            launch(int(self._stream))
        self._graph = check(runtime.cudaStreamEndCapture(self._stream))
        self._executable = check(runtime.cudaGraphInstantiate(self._graph, 0))
        # Upload now: a start must not do it while another graph's kernels wait for this one's.
        check(runtime.cudaGraphUpload(self._executable, self._stream))
        check(runtime.cudaStreamSynchronize(self._stream))
        self._events = [check(runtime.cudaEventCreate()) for _ in range(2)]

    def start(self) -> None:
        check(runtime.cudaEventRecord(self._events[0], self._stream))
        check(runtime.cudaGraphLaunch(self._executable, self._stream))
        check(runtime.cudaEventRecord(self._events[1], self._stream))

    def seconds(self) -> float:
        """Waits for the last start; returns its duration."""
        check(runtime.cudaEventSynchronize(self._events[1]))
        return check(runtime.cudaEventElapsedTime(*self._events)) * 1e-3

    def close(self) -> None:
        for event in self._events:
            check(runtime.cudaEventDestroy(event))
        check(runtime.cudaGraphExecDestroy(self._executable))
        check(runtime.cudaGraphDestroy(self._graph))
        check(runtime.cudaStreamDestroy(self._stream))


def microseconds(launch: Callable[[int], None], *, launches: int = 20, replays: int = 20) -> float:
    """Median time of one launch, in µs: `launches` in a row per graph, `replays` of the graph.

    Inputs stay in the L2 cache between launches.
    """
    graph = Graph(launch, launches)
    times = []
    for _ in range(replays + 2):  # The first two warm up.
        graph.start()
        times.append(graph.seconds() * 1e6 / launches)
    graph.close()
    return float(np.median(times[2:]))


def pointer(array: jax.Array) -> int:
    """Device address of an array."""
    return jax.block_until_ready(array).unsafe_buffer_pointer()
