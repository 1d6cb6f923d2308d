"""Times kernels by themselves: captured into a CUDA graph, replayed, between CUDA events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from cuda.bindings import runtime


def check(result: tuple) -> Any:
    """The value of a CUDA runtime call, or an exception."""
    error, *values = result
    if error != runtime.cudaError_t.cudaSuccess:
        raise RuntimeError(f"{error!r}: {runtime.cudaGetErrorString(error)[1].decode()}")
    return values[0] if values else None


def microseconds(launch: Callable[[int], None], *, launches: int = 20, replays: int = 20) -> float:
    """Median time of one launch, in µs: `launches` in a row per graph, `replays` of the graph.

    `launch(stream)` launches once on a raw stream. Inputs stay in the L2 cache between launches.
    """
    stream = check(runtime.cudaStreamCreate())
    mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    check(runtime.cudaStreamBeginCapture(stream, mode))
    for _ in range(launches):
        launch(int(stream))
    graph = check(runtime.cudaStreamEndCapture(stream))
    executable = check(runtime.cudaGraphInstantiate(graph, 0))
    events = [check(runtime.cudaEventCreate()) for _ in range(2)]
    times = []
    for _ in range(replays + 2):  # The first two warm up.
        check(runtime.cudaEventRecord(events[0], stream))
        check(runtime.cudaGraphLaunch(executable, stream))
        check(runtime.cudaEventRecord(events[1], stream))
        check(runtime.cudaEventSynchronize(events[1]))
        times.append(check(runtime.cudaEventElapsedTime(*events)) * 1e3 / launches)
    for event in events:
        check(runtime.cudaEventDestroy(event))
    check(runtime.cudaGraphExecDestroy(executable))
    check(runtime.cudaGraphDestroy(graph))
    check(runtime.cudaStreamDestroy(stream))
    return float(np.median(times[2:]))


def pointer(array: jax.Array) -> int:
    """Device address of an array."""
    return jax.block_until_ready(array).unsafe_buffer_pointer()
