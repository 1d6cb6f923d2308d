"""The kernels' launches on simulated chips: needs the CUDA module, but no GPU."""

import re
import types

import jax
import numpy as np
import pytest
from chips import CHIPS, chip

from lplb_jax import Placement, _native, balancer
from lplb_jax._problem import anywhere
from lplb_jax.assignment import workspace_shape

pytestmark = pytest.mark.skipif(
    _native.cuda() is None, reason="no CUDA module in this installation"
)

QUOTAS = ["given", "solved", "synced"]
# And with copies chosen for the batch, which may be on any ranks.
KINDS = [(quotas, False) for quotas in QUOTAS] + [("solved", True), ("synced", True)]


def sizes_of(ep_size, group_size, n_columns, n_local, n_redundant, quotas="solved", chooses=False):
    """Sizes as the module expects; assign has no r2o, and copies of the batch no columns."""
    group = (0, 0) if quotas == "given" else (ep_size, 0) if chooses else (group_size, n_columns)
    return (ep_size, *group, ep_size * n_local, ep_size * (n_local + n_redundant), 2)


def random_sizes(rng):
    """Everything from one expert on one rank to more than any chip supports."""
    group_size = int(rng.choice([1, 2, 5, 8, 16, 32, 33, 64, 128]))
    ep_size = group_size * int(rng.choice([1, 1, 2, 4]))
    n_columns = int(rng.choice([1, 2, 3, 4, 5, 8]))
    n_local = int(rng.integers(1, max(2, 2 ** rng.integers(1, 13) // ep_size)))
    n_redundant = n_columns * int(rng.integers(0, n_local // n_columns + 1))
    return ep_size, group_size, n_columns, n_local, n_redundant


# By experts: tokens up to which a shape is taken, blocks of its cluster (0: tiles) and threads; as
# measured on the H100 and the H200.
FASTEST = {
    512: [(512, 2, 256), (1024, 4, 256), (8192, 8, 256), (32_768, 16, 256), (131_072, 16, 512)],
    1024: [(512, 2, 256), (1024, 4, 256), (16_384, 8, 256), (65_536, 8, 512)],
    2048: [(512, 2, 256), (16_384, 4, 256)],
}


@pytest.mark.parametrize("name", ["H100", "B200"])
@pytest.mark.parametrize("quotas", QUOTAS)
@pytest.mark.parametrize(
    "sizes",
    [
        (8, 8, 1, 1, 1),
        (8, 8, 2, 32, 4),
        (32, 32, 4, 8, 4),
        (64, 64, 2, 8, 2),
        (8, 8, 2, 65, 2),
        (64, 64, 2, 16, 2),
        (128, 128, 8, 8, 8),
        (8, 8, 2, 129, 4),
        (64, 64, 8, 32, 8),
        (8, 8, 1, 256, 256),
    ],
)
def test_large_chips_get_the_fastest_shapes(rng, sizes, quotas, name):
    sizes = sizes_of(*sizes, quotas)
    n_logical = sizes[3]
    shapes = FASTEST[min(most for most in FASTEST if n_logical <= most)]
    shapes = [*shapes, (20_000_000, 0, 512 if n_logical <= 1024 else 256)]
    first = 0
    for last, cluster, threads in shapes:
        for n_tokens in {first, last, *rng.integers(first, last, 5).tolist(), min(first + 1, last)}:
            rounds = max(-(-n_tokens // (cluster * threads)), 1) if cluster else 0
            got = _native.built_cuda().route_shape(
                sizes, quotas, False, n_tokens, chip(*CHIPS[name])
            )
            assert tuple(got[:3]) == (cluster, threads, rounds), n_tokens
        first = last + 1


def shape_or_refusal(sizes, quotas, n_tokens, device, chooses=False):
    try:
        return _native.built_cuda().route_shape(sizes, quotas, chooses, n_tokens, device)
    except ValueError as refusal:
        return str(refusal)


@pytest.mark.parametrize(("quotas", "chooses"), KINDS)
@pytest.mark.parametrize("name", CHIPS)
def test_every_shape_fits_its_chip(rng, name, quotas, chooses):
    """Every problem without a shape gets a message with the sizes, the limit and a remedy."""
    capability, shared_bytes, largest_cluster, _ = CHIPS[name]
    for _ in range(300):
        sizes = sizes_of(*random_sizes(rng), quotas, chooses)
        n_tokens = int(rng.integers(0, 2 ** rng.integers(1, 24)))
        got = shape_or_refusal(sizes, quotas, n_tokens, chip(*CHIPS[name]), chooses)
        if isinstance(got, str):
            assert f"n_logical = {sizes[3]}" in got
            assert f"n_physical = {sizes[4]}" in got
            assert re.search(r": use .* or the CPU$", got), got
            if "at most 2048 experts" not in got:
                assert f"{capability // 10}.{capability % 10}) has {shared_bytes}" in got
                assert int(re.search(r"need (\d+) bytes", got)[1]) > shared_bytes
            continue
        cluster, threads, rounds, used = got
        assert used <= shared_bytes
        assert cluster == 0 or 2 <= cluster <= largest_cluster
        assert cluster.bit_count() <= 1
        assert threads.bit_count() == 1
        assert 64 <= threads <= 512
        if chooses:
            assert threads >= 256  # The most that the solver of any placement uses.
        elif cluster == 0:
            assert threads >= sizes[1]  # A thread for every rank of a group.
        if cluster > 0:
            # A lane has room for 16 tokens, and no round is empty.
            assert 1 <= rounds <= 16
            assert cluster * threads * rounds >= n_tokens
            assert rounds == 1 or cluster * threads * (rounds - 1) < n_tokens


@pytest.mark.parametrize(("quotas", "chooses"), KINDS)
def test_the_bytes_of_a_refusal_are_the_least(rng, quotas, chooses):
    """A chip with exactly these bytes accepts the problem; with one byte less it does not."""
    # The blocks of a cluster share the choice of copies, so a single block does not need the least.
    cluster = 0 if chooses else 16
    for _ in range(100):
        sizes = sizes_of(*random_sizes(rng), quotas, chooses)
        n_tokens = int(rng.integers(0, 2 ** rng.integers(1, 24)))
        refusal = shape_or_refusal(sizes, quotas, n_tokens, chip(90, 0, cluster, True), chooses)
        if "at most 2048 experts" in refusal:
            assert sizes[3] > 2048
            continue
        least = int(re.search(r"need (\d+) bytes", refusal)[1])
        shape = shape_or_refusal(sizes, quotas, n_tokens, chip(90, least, cluster, True), chooses)
        assert not isinstance(shape, str)
        assert shape[3] == least
        smaller = chip(90, least - 1, cluster, True)
        assert shape_or_refusal(sizes, quotas, n_tokens, smaller, chooses) == (
            refusal.replace("has 0", f"has {least - 1}")
        )


@pytest.mark.parametrize(
    ("name", "sizes", "quotas", "expected"),
    [
        ("A100", (64, 64, 2, 16, 2), "solved", (0, 512)),
        ("A100", (64, 64, 2, 16, 2), "synced", (0, 256)),
        ("A100", (64, 64, 2, 32, 2), "given", (0, 128)),
        ("A100", (64, 64, 2, 32, 2), "solved", (0, 128)),
        ("A100", (64, 64, 2, 32, 2), "synced", (0, 128)),
        ("L40", (64, 64, 2, 16, 2), "solved", (0, 256)),
        ("L40", (128, 128, 8, 8, 8), "synced", (0, 128)),
        ("RTX 5090", (64, 64, 2, 16, 2), "solved", (8, 128)),
        ("L40", (64, 64, 2, 32, 2), "given", (0, 64)),
        ("L40", (64, 64, 8, 32, 8), "synced", "has 101376: use fewer experts"),
        ("RTX 3090", (8, 8, 1, 512, 8), "given", "at most 2048 experts .* n_logical = 4096"),
    ],
)
def test_large_problems_on_small_chips(name, sizes, quotas, expected):
    """1,024 and 2,048 experts work with fewer warps, or are refused before the launch."""
    got = shape_or_refusal(sizes_of(*sizes, quotas), quotas, 16_384, chip(*CHIPS[name]))
    if isinstance(expected, str):
        assert re.search(expected, got)
    else:
        assert tuple(got[:2]) == expected


@pytest.mark.parametrize(
    ("name", "sizes", "quotas"),
    [
        ("L40", (64, 64, 0, 8, 2), "solved"),
        ("A100", (64, 64, 0, 16, 2), "solved"),
        ("H100", (256, 256, 0, 4, 2), "synced"),
    ],
)
def test_copies_of_the_batch_step_by_step(monkeypatch, name, sizes, quotas):
    """Where one launch has no room to choose them, each step has, and `rebalance` takes those."""
    device, placed = chip(*CHIPS[name]), sizes_of(*sizes, quotas)
    assert "use fewer experts" in shape_or_refusal(placed, quotas, 16_384, device, True)
    assert not isinstance(shape_or_refusal(placed, quotas, 16_384, device), str)
    assert solver_bytes("exact", placed, device) <= device.shared_bytes
    assert solver_bytes("copies", placed, device) <= device.shared_bytes
    table = np.full((sizes[0], sizes[3] + sizes[4]), -1)
    table[:, : sizes[3]] = np.arange(placed[3]).reshape(sizes[0], -1)
    problem = anywhere(Placement.from_phy2log(table, ep_size=sizes[0]))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    fake = types.SimpleNamespace(
        current_device=lambda: device, route_shape=_native.cuda().route_shape
    )
    monkeypatch.setattr(_native, "cuda", lambda: fake)
    assert not balancer._fits(problem, 16_384, chooses=True, synced=quotas == "synced")
    assert balancer._fits(problem, 16_384, chooses=False, synced=quotas == "synced")


def solver_bytes(solver, sizes, device, options=(False, False, False)):
    if solver == "exact":
        return _native.built_cuda().solve_bytes(sizes, device)
    if solver == "copies":
        return _native.built_cuda().copies_bytes(sizes, device)
    return _native.built_cuda().ipm_bytes(sizes, (*options, False), device)


@pytest.mark.parametrize("solver", ["exact", "interior point"])
def test_solvers_fit_or_are_refused(rng, solver):
    """A group that needs more than a block has gets a message; exactly as much is enough."""
    for _ in range(200):
        sizes = sizes_of(*random_sizes(rng))
        options = tuple(rng.integers(2, size=3).astype(bool).tolist())
        needed = solver_bytes(solver, sizes, chip(89, 1 << 30, 0, False), options)
        assert solver_bytes(solver, sizes, chip(89, needed, 0, False), options) == needed
        words = rf"^r2o: .* {sizes[1]} ranks .* need {needed} bytes .* 8.9\) has {needed - 1}: use"
        with pytest.raises(ValueError, match=words):
            solver_bytes(solver, sizes, chip(89, needed - 1, 0, False), options)


@pytest.mark.parametrize("solver", ["exact", "interior point", "copies"])
def test_solvers_of_any_placement_fit_or_are_refused(rng, solver):
    for _ in range(100):
        ep_size = int(rng.integers(1, 129))
        n_logical = int(rng.integers(1, 500))
        slots = ep_size * (-(-n_logical // ep_size) + int(rng.integers(0, 9)))
        sizes = [ep_size, ep_size, 0, n_logical, slots, int(rng.integers(1, 9))]
        options = tuple(rng.integers(2, size=3).astype(bool).tolist())
        needed = solver_bytes(solver, sizes, chip(89, 1 << 30, 0, False), options)
        assert solver_bytes(solver, sizes, chip(89, needed, 0, False), options) == needed
        words = rf"^placement: .* {ep_size} ranks need {needed} bytes .* has {needed - 1}: use"
        with pytest.raises(ValueError, match=words):
            solver_bytes(solver, sizes, chip(89, needed - 1, 0, False), options)


@pytest.mark.parametrize(
    ("solver", "most"), [("exact", 512), ("interior point", 128), ("copies", 512)]
)
def test_too_many_ranks_of_any_placement_are_refused(solver, most):
    sizes, device = [most + 1, most + 1, 0, 600, 2 * (most + 1), 2], chip(*CHIPS["H100"])
    with pytest.raises(ValueError, match=rf"^placement: .*at most {most} ranks, got {most + 1}"):
        solver_bytes(solver, sizes, device)


def test_the_exact_solver_takes_what_a_chip_has():
    sizes = sizes_of(128, 128, 8, 64, 64)
    for name in ("A100", "H100"):
        assert solver_bytes("exact", sizes, chip(*CHIPS[name])) > 101_376
    with pytest.raises(ValueError, match=r"128 ranks with 8 columns and 64 experts .* has 101376"):
        solver_bytes("exact", sizes, chip(*CHIPS["L40"]))


@pytest.mark.parametrize("solver", ["exact", "interior point"])
def test_too_large_groups_are_refused(solver):
    sizes, device = sizes_of(200, 200, 1, 1, 1), chip(*CHIPS["H100"])
    with pytest.raises(ValueError, match=r"^r2o: .*at most 128 ranks.* use smaller groups"):
        solver_bytes(solver, sizes, device)


def test_the_workspace_is_as_large_as_the_kernels_take_it(rng):
    """Python allocates it when tracing, maybe on a machine without the CUDA module."""
    for n_logical in [1, 256, *rng.integers(1, 2049, 20).tolist()]:
        n_tiles, n_words = workspace_shape(int(rng.integers(0, 1 << 24)), n_logical)
        assert n_tiles >= 1
        assert n_words == _native.built_cuda().workspace_words(n_logical)
