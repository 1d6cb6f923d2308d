"""Loads on the host: in any dtype they mean what the same numbers mean in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lplb_jax
from lplb_jax import Refresher, _native, place_experts, refresh, topologies

N_LAYERS, N_BATCHES, N_LOGICAL, N_RANKS = 2, 6, 16, 4
SIZES: dict[str, Any] = {"n_logical": N_LOGICAL, "ep_size": N_RANKS, "redundants_per_rank": 1}
COSTS: dict[str, Any] = {"steps": 1000, "row_s": 1e-3, "bytes_per_expert": 1e6}
BFLOAT16 = jnp.bfloat16.dtype
FLOATS = [np.float16, BFLOAT16, np.float32, np.float64, np.longdouble]
INTEGERS = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]


def drawn(rng, dtype, kind):
    """Tokens, more of them in a batch than one number of the dtype can hold, or shares."""
    loads = rng.dirichlet(np.full(N_LOGICAL, 0.5), (N_LAYERS, N_BATCHES))
    if kind == "tokens":
        limits = np.iinfo if np.issubdtype(dtype, np.integer) else jnp.finfo
        loads = np.rint(loads / loads.max() * min(float(limits(dtype).max), 2.0**20))
    return loads.astype(dtype)


DTYPES = pytest.mark.parametrize(
    ("dtype", "kind"),
    [(dtype, "tokens") for dtype in FLOATS + INTEGERS] + [(dtype, "shares") for dtype in FLOATS],
)


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@DTYPES
def test_advice(rng, dtype, kind, tmp_path):
    loads = drawn(rng, dtype, kind)
    options: dict[str, Any] = {"ep_size": N_RANKS, "redundants": [1], "most_layers": 1}
    expected = lplb_jax.advise(loads.astype(np.float64), **options).as_dict()
    given = [loads, loads.tolist() if loads.dtype.kind != "V" else jnp.asarray(loads)]
    for each in given:
        assert lplb_jax.advise(each, **options).as_dict() == expected
    if loads.dtype != BFLOAT16:  # NumPy's files do not know it.
        np.savez(tmp_path / "own.npz", loads=loads)
        found = lplb_jax.advise(tmp_path / "own.npz", **options).as_dict()
        assert found["choices"] == expected["choices"]


@DTYPES
@pytest.mark.parametrize("how", ["auto", "eplb", "ring", "previous"])
def test_placements(rng, dtype, kind, how):
    loads = drawn(rng, dtype, kind)
    options = {
        "auto": {},
        "eplb": {"method": "eplb"},
        "ring": {"r2o": topologies.ring(N_RANKS)},
        "previous": {"previous": place_experts(np.ones((N_LAYERS, N_LOGICAL)), **SIZES)},
    }[how]
    expected = place_experts(loads.astype(np.float64), **SIZES, **options)
    same(place_experts(loads, **SIZES, **options), expected)
    if loads.dtype == BFLOAT16:
        same(place_experts(jnp.asarray(loads), **SIZES, **options), expected)


@DTYPES
def test_refreshes(rng, dtype, kind):
    loads, placement = (
        drawn(rng, dtype, kind),
        place_experts(np.ones((N_LAYERS, N_LOGICAL)), **SIZES),
    )
    if kind == "shares":
        with pytest.raises(ValueError, match=rf"whole tokens.* in {loads.dtype}; multiply shares"):
            refresh(loads, placement, **COSTS)
        return
    expected = refresh(loads.astype(np.int64), placement, **COSTS)
    refresher = Refresher(**COSTS)
    refresher.start(loads, placement)
    for found in (refresh(loads, placement, **COSTS), refresher.poll(wait=True)):
        assert found is not None
        same(found._asdict() | {"reason": 0}, expected._asdict() | {"reason": 0})


@pytest.mark.parametrize(
    "unit", [2.0**-1026, 2.0**16], ids=["2²⁰ over a total is infinite", "more tokens than int32"]
)
def test_advice_is_free_of_units(rng, unit):
    """Loads that are not whole tokens of one batch count by their proportions."""
    tokens = drawn(rng, np.float64, "tokens") + 1
    found, expected = (
        lplb_jax.advise(tokens * each, ep_size=N_RANKS, redundants=[1]) for each in (unit, 2.0**-40)
    )
    assert found.choices == expected.choices
    assert (found.before, found.after) == (expected.before, expected.after)


NOT_NUMBERS = {
    "text": np.array([["a", "b"]]),
    "complex": np.ones((N_LAYERS, N_BATCHES, N_LOGICAL), np.complex64),
    "ragged": [[1.0, 2.0], [3.0]],
    "nothing": None,
}


@pytest.mark.parametrize("wrong", NOT_NUMBERS.values(), ids=NOT_NUMBERS)
def test_no_numbers(wrong):
    placement = place_experts(np.ones((N_LAYERS, N_LOGICAL)), **SIZES)
    calls = [lambda: lplb_jax.advise(wrong, ep_size=N_RANKS)]
    calls += [lambda: refresh(wrong, placement, **COSTS)]
    calls += [lambda: Refresher(**COSTS).start(wrong, placement)] * isinstance(wrong, list)
    calls += [lambda: place_experts(wrong, **SIZES)] * (wrong is not None)  # None: equal loads.
    for call in calls:
        with pytest.raises((TypeError, ValueError), match=r"^(workload|history): expected "):
            call()


@pytest.mark.parametrize("dtype", sorted({*FLOATS, *INTEGERS} - {np.int32, np.float32}, key=str))
def test_loads_of_a_batch_have_a_type_that_is_named(dtype):
    """Those of a program keep theirs; the message converts shares to floats, tokens to int32."""
    of = "float32" if dtype in FLOATS else "int32"
    placement = place_experts(None, **SIZES)
    with pytest.raises(TypeError, match=rf"^loads: .* got {np.dtype(dtype)}; .*jnp\.{of}\)$"):
        lplb_jax.solve(np.ones(N_LOGICAL, dtype), placement=placement)


BAD_LOADS = {
    "negative": ([3, -1, 2, 2], "got -1 for expert 1 of batch 1"),
    "garbage of a float": ([0, 0, 0, np.iinfo(np.int64).min], "for expert 3 of batch 1"),
    "sum of more than 63 bits": ([1 << 62, 1 << 62, 0, 0], "sums below 2⁶³.*for expert 1"),
}


@pytest.mark.parametrize("case", BAD_LOADS)
def test_native_functions_refuse_what_they_cannot_balance(case):
    """With an error: their loops would not end, or end with nonsense."""
    cpu = _native.cpu()
    if cpu is None:
        pytest.skip("no native module")
    wrong, words = BAD_LOADS[case]
    batches = np.array([[1, 2, 3, 4], wrong], np.int64)
    phy2log, homes = np.array([0, 1, 2, 2, 3, 0], np.int32), np.array([0, 1, 3, 4], np.int32)
    with pytest.raises(ValueError, match=f"batches: expected .*{words}"):
        cpu.best_loads(phy2log, 2, batches.ravel(), np.empty(2, np.int64))
    with pytest.raises(ValueError, match=f"batches: expected .*{words}"):
        cpu.amend(phy2log, homes, 2, 1, False, batches.ravel(), np.ones(2), 10)
    with pytest.raises(ValueError, match="batches: expected 2 · 4 loads, got 7"):
        cpu.amend(phy2log, homes, 2, 1, False, batches.ravel()[:7], np.ones(2), 10)


@pytest.mark.parametrize("wrong", [-1.0, np.nan, np.inf])
def test_native_placing_refuses_what_it_cannot_pack(wrong):
    cpu = _native.cpu()
    if cpu is None:
        pytest.skip("no native module")
    table = np.empty(6, np.int32), np.empty(4, np.int32)
    with pytest.raises(ValueError, match=r"loads: expected finite.*for expert 2"):
        cpu.place(np.array([1, 1, wrong, 1]), None, 2, 1, False, 0.0, True, 0.0, *table)
