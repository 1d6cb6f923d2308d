"""Advice: its figures against independent ones, what it refuses, and what it writes."""

import io
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import best_cut
from test_cli import containing, folder, refused

import lplb_jax
from lplb_jax import Placement, _progress, cli, place_copies, place_experts, rebalance, topologies
from lplb_jax._cost import Costs
from lplb_jax._models import MODELS, synthetic_loads
from lplb_jax._study import ANY, BATCH, EVEN, GIVEN, PACKED
from lplb_jax.data import load_traces

N_RANKS, N_LOGICAL = 4, 12


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def drawn(rng, n_layers=2, n_batches=6, n_logical=N_LOGICAL):
    """Loads with the same skew in all batches of a layer."""
    skew = rng.lognormal(4, 0.8, (n_layers, 1, n_logical))
    return rng.poisson(skew * np.ones((n_layers, n_batches, 1))) + 1


def figures(advice):
    return {(choice.placement, choice.redundants): choice for choice in advice.choices}


def optimum(phy2log, batch):
    """The optimal largest over mean rank load, by the oracle."""
    table = np.reshape(phy2log, (N_RANKS, -1))
    hosts = np.array([(table == expert).any(axis=1) for expert in range(len(batch))])
    return best_cut(batch, hosts) * N_RANKS / batch.sum()


def test_figures_are_those_of_an_oracle(rng):
    """Every kind, rebuilt from the first half and evaluated on the second."""
    loads = drawn(rng)
    advice = lplb_jax.advise(loads, ep_size=N_RANKS, redundants=[1, 3])
    ring = topologies.ring(N_RANKS)
    sizes: dict[str, Any] = {"n_logical": N_LOGICAL, "ep_size": N_RANKS}

    def placed(kind, n, history):
        if kind == GIVEN:
            return Placement.from_phy2log(np.arange(N_LOGICAL), ep_size=N_RANKS)
        if kind == "ring":
            return place_experts(history.sum(axis=0), ring, redundants_per_rank=n, **sizes)
        if kind == "complete":
            r2o = topologies.complete(N_RANKS)
            return place_experts(history.sum(axis=0), r2o, redundants_per_rank=n, **sizes)
        method = "eplb" if kind == EVEN else "auto"
        stacked = place_experts(history[None], redundants_per_rank=n, method=method, **sizes)
        return jax.tree.map(lambda array: array[0], stacked)

    found = figures(advice)
    kinds = [(GIVEN, 0), (PACKED, 0), ("ring", 1), ("ring", 3), ("complete", 3)]
    kinds += [(kind, n) for kind in (ANY, EVEN) for n in (1, 3)]
    assert found.keys() == {*kinds, (BATCH, 1), (BATCH, 3)}
    for kind, n in kinds:
        tables = [placed(kind, n, layer[:3]).phy2log for layer in loads]
        pairs = list(zip(tables, loads, strict=True))
        bounds = [optimum(t, batch) for t, layer in pairs for batch in layer[3:]]
        np.testing.assert_allclose(found[kind, n].bound, np.mean(bounds), rtol=1e-12)
        if kind == EVEN:
            bounds = [evenly(t, batch) for t, layer in pairs for batch in layer[3:]]
        np.testing.assert_allclose(found[kind, n].mean, np.mean(bounds), rtol=1e-12)
        np.testing.assert_allclose(found[kind, n].p99, np.max(bounds), rtol=1e-12)


@pytest.mark.parametrize(
    ("n_ranks", "n_nodes", "along"),
    [
        (16, 1, {"hypercube", "ring", "torus", "cube of 8"}),
        (16, 4, {"hypercube", "ring", "torus", "cube of 8", "ring of 4", "torus of 4",
                 "complete of 4"}),
        (24, 3, {"ring", "torus", "cube of 8", "ring of 8", "torus of 8"}),
    ],
)  # fmt: skip
def test_groups_smaller_than_all_ranks(rng, n_ranks, n_nodes, along):
    """Each is evaluated by the oracle; experts have copies only in their own group."""
    loads = drawn(rng, n_layers=1, n_logical=4 * n_ranks)
    given: dict[str, Any] = {"ep_size": n_ranks, "n_nodes": n_nodes}
    advice = lplb_jax.advise(loads, redundants=[1, 2, 3], **given)
    found = {kind for kind, _ in figures(advice)} - {GIVEN, PACKED, EVEN, ANY, BATCH}
    assert found == along
    one = lplb_jax.advise(loads, redundants=[2], topology="cube", **given)
    assert figures(one)["cube of 8", 2] == figures(advice)["cube of 8", 2]
    names = {"history": loads[0, :3].sum(axis=0)}
    exec(one.code.partition("\nphysical")[0] if one.recommended.redundants else "", names)
    placement = place_experts(
        names["history"], topologies.cube(), n_logical=4 * n_ranks, redundants_per_rank=2, **given
    )
    assert names.get("placement", placement) == placement
    table = placement.phy2log.reshape(n_ranks, -1)
    for group in table.reshape(-1, 8, table.shape[1]):
        assert len(np.unique(group)) == 4 * 8
    hosts = np.array([(table == expert).any(axis=1) for expert in range(4 * n_ranks)])
    bounds = [largest_within_groups(batch, hosts) * n_ranks / batch.sum() for batch in loads[0, 3:]]
    np.testing.assert_allclose(figures(one)["cube of 8", 2].mean, np.mean(bounds), rtol=1e-12)


def largest_within_groups(batch, hosts):
    """Tokens of the busiest rank, group by group of 8."""
    largest = 0
    for ranks in np.split(np.arange(hosts.shape[1]), hosts.shape[1] // 8):
        mine = hosts[:, ranks].any(axis=1)
        largest = max(largest, best_cut(batch[mine], hosts[mine][:, ranks]))
    return largest


def evenly(phy2log, batch):
    ranks = np.zeros(N_RANKS)
    for slot, expert in enumerate(phy2log):
        if expert >= 0:
            ranks[slot * N_RANKS // len(phy2log)] += batch[expert] / np.sum(phy2log == expert)
    return ranks.max() / ranks.mean()


def test_copies_per_batch(rng):
    """Chosen anew for every batch, over homes packed by load."""
    loads = drawn(rng, n_layers=1)
    advice = lplb_jax.advise(loads, ep_size=N_RANKS, redundants=[2])
    sizes: dict[str, Any] = {"n_logical": N_LOGICAL, "ep_size": N_RANKS, "redundants_per_rank": 0}
    homes = jax.tree.map(lambda array: array[0], place_experts(loads[:, :3], **sizes)).phy2log
    table = np.pad(homes.reshape(N_RANKS, -1), [(0, 0), (0, 2)], constant_values=-1)
    placement = Placement.from_phy2log(table, ep_size=N_RANKS)
    bounds = [
        optimum(place_copies(batch.astype(np.int32), placement).phy2log, batch)
        for batch in loads[0, 3:]
    ]
    np.testing.assert_allclose(figures(advice)[BATCH, 2].mean, np.mean(bounds), rtol=1e-12)


def test_the_packaged_traces():
    """Experts packed, and along the cube: means of the busiest ranks in README's table."""
    found = figures(lplb_jax.advise(load_traces(), ep_size=8, redundants=[4]))
    packed, cube = np.mean([1.324, 1.287, 1.134, 1.097]), np.mean([1.143, 1.208, 1.000, 1.000])
    assert abs(found[PACKED, 0].mean - packed) < 1e-3
    assert abs(found["cube", 4].mean - cube) < 1e-3


# hidden, width; imbalance, copies; ms of a layer without copies and balanced: README, docs/moe.md.
MEASURED = [
    (4096, 1536, 1.1, 1, 33.0, 30.4),
    (4096, 1536, 1.3, 2, 38.4, 30.5),
    (4096, 1536, 1.6, 4, 47.0, 30.7),
    (2048, 1024, 1.1, 1, 12.2, 11.4),
    (2048, 1024, 1.3, 2, 14.3, 11.4),
    (2048, 1024, 1.6, 4, 17.0, 11.4),
]


@pytest.mark.parametrize(("hidden", "width", "imbalance", "n", "before", "after"), MEASURED)
def test_times_are_near_measured_ones(hidden, width, imbalance, n, before, after):
    parameters = 3 * hidden * width
    costs = Costs(16384 * 8, 8, hidden, parameters, 2 * parameters, 2, 1, inference=False)
    none, balanced = costs.layer(imbalance, 32, 0), costs.layer(1, 32 + n, costs.traffic(n, False))
    assert abs(1e3 * none / before - 1) < 0.13
    assert abs(1e3 * balanced / after - 1) < 0.13
    assert abs((none / balanced) / (before / after) - 1) < 0.1


def test_what_costs_are_made_of():
    """Reading weights limits small batches, copies hide behind products, and nodes are slower."""
    sizes: dict[str, Any] = {
        "hidden": 1000,
        "parameters": 1e6,
        "bytes_per_expert": 2e6,
        "inference": True,
    }
    rates: dict[str, Any] = {"flops": 1e12, "link": 1e9, "node_link": 1e8, "memory": 1e9}
    small = Costs(2, 1, ep_size=1, n_nodes=1, **sizes, **rates)
    assert small.layer(1.0, 10, 0) == pytest.approx(10 * 2e6 / 1e9)
    large = Costs(1e6, 1, ep_size=1, n_nodes=1, **sizes, **rates)
    assert large.layer(1.5, 10, 1e6) == pytest.approx(1.5 * 1e6 * 2e6 / 1e12)
    assert large.layer(1.5, 10, 5e9) == pytest.approx(5)
    # Two ranks: half of the tokens go to the other one and come back.
    pair = Costs(1e6, 1, ep_size=2, n_nodes=1, **sizes, **rates)
    assert pair.exchange(1.0) == pytest.approx(2 * 0.5e6 * 2000 / 1e9)
    apart = Costs(1e6, 1, ep_size=2, n_nodes=2, **sizes, **rates)
    assert apart.exchange(1.0) == pytest.approx(2 * 0.5e6 * 2000 / 1e8)


@pytest.mark.parametrize("model", MODELS)
def test_models(model):
    """Every model on eight ranks, as many experts as ranks included."""
    advice = lplb_jax.advise(model, ep_size=8, redundants=[1], most_layers=1)
    best, first = advice.recommended, advice.choices[0]
    assert best.mean < first.mean
    assert (best.seconds or np.inf) < (first.seconds or 0)
    sizes = MODELS[model]
    memory = 6 * sizes.hidden * sizes.width * sizes.n_layers
    assert figures(advice)[ANY, 1].memory == memory
    assert figures(advice)[ANY, 1].traffic == 12 * sizes.hidden * sizes.width


def test_inference_fetches_only_copies_of_the_batch():
    found = figures(lplb_jax.advise("mixtral-8x7b", ep_size=8, inference=True, most_layers=1))
    assert found[ANY, 1].traffic == 0
    assert found[BATCH, 1].traffic == 6 * 4096 * 14336


def test_a_budget(rng):
    """A budget for 2 copies of 100 bytes in each of two layers, where more would be better."""
    loads = drawn(rng)
    given: dict[str, Any] = {
        "ep_size": N_RANKS,
        "redundants": [1, 2, 3],
        "bytes_per_expert": 100,
        "hidden": 8,
    }
    advice = lplb_jax.advise(loads, memory_budget=400, **given)
    assert [choice.fits for choice in advice.choices] == [c.redundants < 3 for c in advice.choices]
    assert advice.recommended.redundants <= 2
    nothing = lplb_jax.advise(loads, memory_budget=199, **given)
    assert nothing.recommended.redundants == 0
    assert "more memory than the budget" in str(nothing)


def test_age(rng):
    """Placed once and anew, for batches that drift."""
    logs = np.cumsum(rng.normal(0, 0.4, (24, N_LOGICAL)), axis=0)
    loads = np.round(np.exp(6 + logs)).astype(int)[None]
    given: dict[str, Any] = {"ep_size": N_RANKS, "redundants": [1], "topology": "ring"}
    advice = lplb_jax.advise(loads, **given)
    assert advice.ageing[:3] == ("ring", 1, [1.5, 3.5, 5.5, 7.5, 9.5, 11.5])

    def judged(end, span):
        """A placement from the twelve batches before `end`, by two later ones."""
        sizes: dict[str, Any] = {
            "n_logical": N_LOGICAL,
            "ep_size": N_RANKS,
            "redundants_per_rank": 1,
        }
        history = loads[0, end - 12 : end].sum(axis=0)
        table = place_experts(history, topologies.ring(N_RANKS), **sizes).phy2log
        return np.mean([optimum(table, batch) for batch in loads[0, span : span + 2]])

    spans = range(12, 24, 2)
    kept, fresh = [judged(12, span) for span in spans], [judged(span, span) for span in spans]
    np.testing.assert_allclose(advice.ageing.kept, kept, rtol=1e-12)
    np.testing.assert_allclose(advice.ageing.fresh, fresh, rtol=1e-12)
    too_old = [s - 12 for s, k, f in zip(spans, kept, fresh, strict=True) if k > f + 0.02]
    assert advice.ageing.refresh_after == (too_old[0] if too_old else None)
    assert lplb_jax.advise(loads[:, :1].repeat(24, axis=1), **given).ageing.refresh_after is None


def test_synthetic_routing_drifts():
    """Neighboring batches are alike, distant ones less so."""
    loads = synthetic_loads(MODELS["deepseek-v3"], 1, 60, tokens=1 << 18, seed=3)[0]
    assert (loads.sum(axis=1) == 8 << 18).all()
    logs = np.log(loads)
    near = np.corrcoef(logs[0], logs[1])[0, 1]
    far = np.corrcoef(logs[0], logs[50])[0, 1]
    assert near > 0.95
    assert far < 0.7
    assert 0.5 < logs.std(axis=1).mean() < 0.7


def test_types_of_ids(rng):
    """−1 and the largest value of an unsigned dtype are no expert; the advice is the same."""
    ids = rng.integers(0, N_LOGICAL, (2, 4 * 40, 3))
    missing = rng.random(ids.shape) < 0.1
    results = []
    for dtype in (np.uint8, np.uint16, np.int32, np.int64):
        none = np.iinfo(dtype).max if np.iinfo(dtype).min == 0 else -1
        np.savez("own.npz", indices=np.where(missing, none, ids).astype(dtype))
        given: dict[str, Any] = {"ep_size": 4, "redundants": [1], "tokens_per_rank": 10}
        results.append(lplb_jax.advise("own.npz", **given, n_logical=N_LOGICAL))
        assert lplb_jax.advise("own.npz", **given).choices == results[-1].choices
    assert all(result == results[0] for result in results)
    counts = [[np.bincount(b[b >= 0], minlength=N_LOGICAL) for b in np.split(layer, 4)]
              for layer in np.where(missing, -1, ids)]  # fmt: skip
    same = lplb_jax.advise(np.array(counts), ep_size=4, redundants=[1])
    assert [c[:5] for c in same.choices] == [c[:5] for c in results[0].choices]


def test_a_type_full_of_experts(rng):
    """256 experts in uint8: 255 is one of them."""
    ids = rng.integers(0, 256, (1, 512, 2), np.uint8)
    np.savez("own.npz", indices=ids, history=np.ones((1, 256), np.int32))
    notes = lplb_jax.advise("own.npz", ep_size=8, redundants=[1]).notes
    assert "128 rows per rank" in notes[1]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, np.float32, np.float64])
def test_types_of_loads(rng, dtype):
    loads = drawn(rng)
    np.savez("own.npz", loads=loads.astype(dtype))
    given: dict[str, Any] = {"ep_size": N_RANKS, "redundants": [1]}
    from_file = lplb_jax.advise("own.npz", **given)
    assert from_file.choices == lplb_jax.advise(loads, **given).choices


def test_shares_of_loads(rng):
    """Frequencies instead of tokens: only the rounding differs."""
    loads = drawn(rng)
    given: dict[str, Any] = {"ep_size": N_RANKS, "redundants": [1]}
    a_token = N_RANKS / loads.sum(axis=2).min()
    shares = lplb_jax.advise(loads / 1024, **given)
    for choice, expected in zip(
        shares.choices, lplb_jax.advise(loads, **given).choices, strict=True
    ):
        # Copies per batch may be fewer for 1/512 of the mean.
        most = a_token + (1 / 512 if choice.placement == BATCH else 0)
        assert choice.mean == pytest.approx(expected.mean, abs=most)


@pytest.mark.parametrize("n_logical", [3, 9, 10])
def test_experts_that_do_not_divide_by_the_ranks(rng, n_logical):
    advice = lplb_jax.advise(drawn(rng, n_logical=n_logical), ep_size=N_RANKS)
    assert {choice.placement for choice in advice.choices} == {GIVEN, PACKED, EVEN, ANY, BATCH}


def test_the_python_runs(rng):
    """As printed, for its own batch, and with the loads that advise was given."""
    loads = drawn(rng, n_layers=1)
    kept = lplb_jax.LoadHistory.empty(n_layers=1, n_logical=N_LOGICAL)
    for batch in loads.swapaxes(0, 1):
        kept = kept.update(batch.astype(np.int32))
    made = set()
    for given in ({}, {"topology": "ring"}, {"redundants": [1]}):
        advice = lplb_jax.advise(loads, ep_size=N_RANKS, **given)
        made.add(advice.recommended.placement)
        history, indices = loads[0, :3].sum(axis=0), rng.integers(0, N_LOGICAL, 64).astype(np.int32)
        names = {"history": history, "indices": indices}
        exec(advice.code.replace(', axis_name="ep"', ""), names)
        assert rebalance(indices, None, placement=names["placement"])[1].status.tolist() == [0]
        placing = advice.code.partition("\nphysical")[0]
        for same_loads in (loads[:, :3], kept.batches()[:, :3]):
            stacked = {"history": same_loads}
            exec(placing, stacked)
            first = jax.tree.map(lambda array: array[0], stacked["placement"])
            assert first.topology is None or first == names["placement"]
            assert rebalance(indices, None, placement=first)[1].status.tolist() == [0]
        assert max(map(len, str(advice).splitlines())) <= 100
    assert "ring" in made


def saved(**arrays):
    def write(rng):
        np.savez("own.npz", **{name: make(rng) for name, make in arrays.items()})
        return "own.npz"

    return write


def array_file(rng):
    buffer = io.BytesIO()
    np.save(buffer, np.ones((1, 2, 8)))
    return containing(buffer.getvalue(), "own.npy")(rng)


def ids(shape, dtype=np.int32, most=8):
    return lambda rng: rng.integers(0, most, shape).astype(dtype)


def loads(*shape, put=None, dtype=np.float64):
    def make(rng):
        array = rng.integers(1, 100, shape).astype(dtype)
        if put is not None:
            array[(0,) * len(shape)] = put
        return array

    return make


FILES = {
    "no such file": (lambda rng: "absent.npz", "file that exists, or a model.*got 'absent.npz'"),
    "no name": (lambda rng: "", "No such file or directory: ''"),
    "a folder": (folder, "Is a directory"),
    "no such model": (lambda rng: "gpt-17", "mixtral-8x7b.*got 'gpt-17'"),
    "empty": (containing(b"", "own.npz"), "not one or is damaged"),
    "text": (containing(b"1 2 3", "own.npz"), "not one or is damaged"),
    "an array": (array_file, "not one or is damaged"),
    "objects": (saved(loads=lambda rng: np.array([{}], object)), "not one or is damaged"),
    "wrong keys": (saved(tokens=ids((1, 8, 2))), "indices.*loads.*got neither"),
    "both": (saved(indices=ids((1, 8, 2)), loads=loads(1, 2, 8)), "got both"),
    "no layers": (saved(indices=ids((0, 8, 2))), r"without empty axes.*\[0, 8, 2\]"),
    "no tokens": (saved(indices=ids((2, 0, 2))), r"without empty axes.*\[2, 0, 2\]"),
    "two axes": (saved(indices=ids((8, 2))), r"\[8, 2\]"),
    "four axes": (saved(loads=loads(1, 1, 2, 8)), r"\[1, 1, 2, 8\]"),
    "float ids": (saved(indices=ids((1, 8, 2), np.float32)), "got float32"),
    "text loads": (saved(loads=lambda rng: np.array(["a", "b"])), "as numbers.*got <U1"),
    "no experts chosen": (saved(indices=lambda rng: np.full((1, 8, 2), -1)), "got none"),
    "ids below -1": (saved(indices=lambda rng: np.full((1, 8, 2), -2)), "got -2"),
    "ids without end": (
        saved(indices=lambda rng: np.full((1, 8, 2), 1 << 40)),
        "got 1099511627776",
    ),
    "ids beyond history": (
        saved(indices=ids((1, 64, 2), most=9), history=loads(1, 4)),
        "ids below 4",
    ),
    "history of other layers": (saved(indices=ids((1, 8, 2)), history=loads(2, 8)), "layers"),
    "history of other experts": (saved(loads=loads(1, 2, 8), history=loads(1, 6)), "experts"),
    "NaN": (saved(loads=loads(1, 2, 8, put=np.nan)), "finite loads"),
    "infinite": (saved(loads=loads(1, 2, 8, put=np.inf)), "finite loads"),
    "negative": (saved(loads=loads(1, 2, 8, put=-1)), "at least 0"),
    "a batch of nothing": (
        saved(loads=lambda rng: np.array([[[1, 2, 3], [0, 0, 0]]])),
        "tokens in every batch, got none in layer 0, batch 1",
    ),
}


def model(*given):
    return lambda rng: ["mixtral-8x7b", *given]


# By the flag that the message must name.
BAD = {
    **{
        f"file: {name}": (lambda rng, make=make: [make(rng), "--ranks", "4"], "WORKLOAD", words)
        for name, (make, words) in FILES.items()
    },
    "no ranks": (model(), "--ranks", "required"),
    "ranks 0": (model("--ranks", "0"), "--ranks", "at least 1, got '0'"),
    "nodes": (model("--ranks", "8", "--nodes", "3"), "--nodes", "divisor of --ranks = 8, got 3"),
    "topology": (model("--ranks", "8", "--topology", "star"), "--topology", "'star'"),
    "topology of other ranks": (
        model("--ranks", "6", "--topology", "cube"),
        "--topology",
        "no topology fits 8 experts on 6 ranks, got 'cube'",
    ),
    "topology of more experts": (
        model("--ranks", "8", "--topology", "cube"),
        "--topology",
        "8 ranks of 1 experts each, got 'cube'; these fit: ring",
    ),
    "redundants of a topology": (
        lambda rng: ["qwen3-30b-a3b", "--ranks", "8", "--topology", "cube", "--redundants", "3"],
        "--redundants",
        "multiples of the 2 columns of the cube.*got 3",
    ),
    "redundants 0": (model("--ranks", "8", "--redundants", "1,0"), "--redundants", "got '0'"),
    "redundants x": (model("--ranks", "8", "--redundants", "a"), "--redundants", "got 'a'"),
    "experts": (
        lambda rng: [saved(loads=loads(1, 2, 8))(rng), "--ranks", "4", "--experts", "9"],
        "--experts",
        "expected 8.*got 9",
    ),
    "ids beyond experts": (
        lambda rng: [saved(indices=ids((1, 64, 2)))(rng), "--ranks", "4", "--experts", "2"],
        "WORKLOAD",
        "ids below 2",
    ),
    "tokens per rank": (
        lambda rng: [
            saved(indices=ids((1, 80, 2)))(rng), "--ranks", "4", "--tokens-per-rank", "11",
        ],
        "--tokens-per-rank",
        "at most 10.*got 11",
    ),
    "budget": (model("--ranks", "8", "--memory-budget", "-1"), "--memory-budget", "got '-1'"),
    "no budget": (model("--ranks", "8", "--memory-budget", "0"), "--memory-budget", "above 0"),
    "flops": (model("--ranks", "8", "--flops", "nan"), "--flops", "got 'nan'"),
    "layers": (model("--ranks", "8", "--layers", "0"), "--layers", "at least 1"),
    "picture": (model("--ranks", "8", "--picture", "a.doc"), "--picture", r"ends in \.png"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(capsys, rng, name):
    make, flag, words = BAD[name]
    given = make(rng)
    before = sorted(os.listdir())
    refused(capsys, lambda: cli.main(["advise", *given]), flag, words)
    assert sorted(os.listdir()) == before


def test_the_command(capsys):
    assert cli.main(["advise", "mixtral-8x7b", "--ranks", "8", "--picture", "own.png"]) == 0
    out = capsys.readouterr().out
    assert str(lplb_jax.advise("mixtral-8x7b", ep_size=8)) in out
    assert pathlib.Path("own.png").read_bytes().startswith(b"\x89PNG")


def test_json(capsys, rng):
    name = saved(loads=loads(1, 4, 8, dtype=np.int64))(rng)
    assert cli.main(["advise", name, "--ranks", "4", "--json", "--picture", ""]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads(lplb_jax.advise(name, ep_size=4).to_json())
    assert said["recommended"] in said["choices"]
    assert sum(said["before"]) == sum(said["after"])


def test_a_bar_appears_after_two_seconds(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(_progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    bar = _progress.Bar("placing")
    bar(0.25)
    assert not capsys.readouterr().err
    now[0] = 2.5
    bar(0.5)
    assert "placing" in (shown := capsys.readouterr().err)
    assert "50%" in shown
    bar.close()
    assert capsys.readouterr().err == "\r\x1b[K"


def choices(rng, shape, n_logical, dtype=np.int64):
    """Distinct experts for every token."""
    return rng.random((*shape, n_logical)).argsort(axis=-1)[..., :2].astype(dtype)


def test_python_takes_what_files_hold(rng):
    """A dict, also of JAX arrays, of lists by layer, or with other entries; an opened file."""
    ids, history = choices(rng, (2, 64), 12), rng.integers(1, 99, (2, 12))
    np.savez("own.npz", indices=ids, history=history)
    expected = lplb_jax.advise("own.npz", ep_size=N_RANKS).choices
    on_device = {"indices": jnp.asarray(ids, jnp.int32), "history": jnp.asarray(history)}
    with np.load("own.npz") as opened:
        for given in (
            {"indices": ids, "history": history},
            {"indices": list(ids), "history": history.tolist(), "step": 3},
            on_device,
            opened,
        ):
            assert lplb_jax.advise(given, ep_size=N_RANKS).choices == expected
    loads = drawn(rng)
    expected = lplb_jax.advise(loads, ep_size=N_RANKS).choices
    assert lplb_jax.advise({"loads": loads}, ep_size=N_RANKS).choices == expected
    kept = lplb_jax.LoadHistory.empty(n_layers=2, n_logical=N_LOGICAL)
    for batch in loads.swapaxes(0, 1):
        kept = kept.update(batch.astype(np.int32))
    assert lplb_jax.advise(kept, ep_size=N_RANKS).choices == expected


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.uint16])
@pytest.mark.parametrize("padded", [False, True])
def test_choices_are_not_taken_for_loads(rng, dtype, padded):
    """An array holds loads; the message says how to pass choices, and loads that look like them."""
    ids = choices(rng, (2, 256), 24, dtype)
    if padded:
        ids[:, ::5] = -1 if np.dtype(dtype).kind == "i" else np.iinfo(dtype).max
    for given in (ids, list(ids), ids[0], ids[..., :1], list(ids[0])):
        with pytest.raises(ValueError, match=r"^workload: expected .*'indices': workload"):
            lplb_jax.advise(given, ep_size=N_RANKS)
    if not padded:
        assert lplb_jax.advise({"loads": ids[:, :4] + 1}, ep_size=2).choices
    for given, words in (
        ({"history": ids}, "got neither in history"),
        ({}, "got neither in the dict"),
        ({"indices": ids, "loads": ids}, "got both in indices and loads"),
        ({"indices": [ids[0], ids[1, :9]]}, "rows of equal length"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^workload: expected .*{words}"):
            lplb_jax.advise(given, ep_size=N_RANKS)


def test_loads_with_another_number_of_experts(rng):
    words = r"^n_logical: expected 12, .* got 24; .*\{'indices': …\}"
    with pytest.raises(ValueError, match=words):
        lplb_jax.advise(drawn(rng), ep_size=N_RANKS, n_logical=24)


@pytest.mark.parametrize("n_logical", [None, 256])
def test_experts_that_use_a_whole_unsigned_type(rng, n_logical):
    """255 is one if 254 occurs as well."""
    ids = np.stack([rng.permutation(np.arange(512) % 256).reshape(-1, 2) for _ in range(2)])
    found, expected = (
        lplb_jax.advise({"indices": each}, ep_size=8, n_logical=n_logical, redundants=[1])
        for each in (ids.astype(np.uint8), ids)
    )
    assert (found.choices, found.notes) == (expected.choices, expected.notes)


def test_an_index_taken_for_none_is_noted(rng):
    ids = choices(rng, (2, 256), 24, np.uint8)
    ids[:, ::5, 1] = 255
    advice = lplb_jax.advise({"indices": ids}, ep_size=8, redundants=[1])
    assert "24 experts" in advice.notes[0]
    assert any("255 was taken for none" in note and "256" in note for note in advice.notes)
    sure = lplb_jax.advise({"indices": ids}, ep_size=8, redundants=[1], n_logical=24)
    assert sure.choices == advice.choices
    assert not any("255" in note for note in sure.notes)
