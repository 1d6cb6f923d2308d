# Of xla_ffi/bench/module.cc, which says what is in each sequence; tests/test_native.py compares the
# two. Arrays and streams are addresses.
from collections.abc import Sequence

def launch_solve(
    problem: Sequence[int],
    sources: Sequence[int],
    batch: int,
    inputs: Sequence[int],
    outputs: Sequence[int],
    stream: int,
    /,
) -> None: ...
def launch_place_copies(
    problem: Sequence[int],
    sources: Sequence[int],
    batch: int,
    inputs: Sequence[int],
    fan_out: int,
    width: int,
    outputs: Sequence[int],
    stream: int,
    /,
) -> None: ...
def launch_ipm(
    problem: Sequence[int],
    sources: Sequence[int],
    options: Sequence[bool],
    batch: int,
    inputs: Sequence[int],
    outputs: Sequence[int],
    stream: int,
    /,
) -> None: ...
def launch_sync(
    comm: int, device: int, rank: int, counts: int, n: int, matrix: int, stream: int, /
) -> None: ...
def launch_there(
    comm: int,
    device: int,
    sizes: Sequence[int],
    first_row: int,
    per_entry: Sequence[int],
    n_bytes: Sequence[int],
    blocks: Sequence[int],
    routing: Sequence[int],
    inputs: Sequence[int],
    outputs: Sequence[int],
    stream: int,
    /,
) -> None: ...
def launch_back(
    comm: int,
    device: int,
    sizes: Sequence[int],
    per_entry: Sequence[int],
    n_bytes: Sequence[int],
    row_type: int,
    blocks: Sequence[int],
    routing: Sequence[int],
    inputs: Sequence[int],
    outputs: Sequence[int],
    stream: int,
    /,
) -> None: ...
def launch_empty(stream: int, /) -> None: ...
def launch_rebalance(
    problem: Sequence[int],
    batch: int,
    n_tokens: int,
    tiles: Sequence[int],
    inputs: Sequence[int],
    outputs: Sequence[int],
    fan_out: int,
    width: int,
    copies: Sequence[int],
    tile: int,
    costs: Sequence[int],
    stream: int,
    /,
) -> None: ...
def launch_synced_rebalance(
    comm: int,
    device: int,
    rank: int,
    problem: Sequence[int],
    n_tokens: int,
    tiles: Sequence[int],
    inputs: Sequence[int],
    outputs: Sequence[int],
    fan_out: int,
    width: int,
    copies: Sequence[int],
    tile: int,
    costs: Sequence[int],
    stream: int,
    /,
) -> None: ...
