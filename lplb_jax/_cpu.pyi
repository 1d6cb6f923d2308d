# Of xla_ffi/cpu/module.cc; tests/test_native.py compares the two.
import numpy as np
from numpy.typing import NDArray

def handlers() -> dict: ...
def jaxlib_version() -> str: ...
def ffi_version() -> str: ...
def homes(phy2log: NDArray[np.int32], ep_size: int, homes: NDArray[np.int32], /) -> None: ...
def place(
    loads: NDArray[np.float64],
    home_ranks: NDArray[np.int32] | None,
    ep_size: int,
    n_nodes: int,
    stay: bool,
    theta: float,
    all: bool,
    meet: float,
    phy2log: NDArray[np.int32],
    homes: NDArray[np.int32],
    /,
) -> None: ...
def best_loads(
    phy2log: NDArray[np.int32],
    ep_size: int,
    batches: NDArray[np.int64],
    most: NDArray[np.int64],
    /,
) -> None: ...
def amend(
    phy2log: NDArray[np.int32],
    homes: NDArray[np.int32],
    ep_size: int,
    n_nodes: int,
    swaps_only: bool,
    batches: NDArray[np.int64],
    goals: NDArray[np.float64],
    most_solves: int,
    /,
) -> float: ...
