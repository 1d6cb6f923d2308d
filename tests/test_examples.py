"""The training example: balance changes where tokens go, not what is learned."""

import itertools
import json
import pathlib
import re
import shlex
import sys

import jax
import numpy as np
import pytest

pytest.importorskip("optax")
pytest.importorskip("tqdm")

from lplb_jax import demo, metrics

sys.path.append(str(pathlib.Path(__file__).parent.parent / "examples"))
import model
import train_moe

SMALL = shlex.split(
    "--ranks 8 --layers 2 --hidden 32 --heads 2 --experts 16 --top-k 2 --width 16 --context 32 "
    "--batch 16 --capacity-factor 8 --refresh 10 --learning-rate 3e-3"
)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch, rng):
    monkeypatch.chdir(tmp_path)
    words = rng.choice(["expert ", "rank ", "token ", "slot ", "load\n"], 2000)
    (tmp_path / "text").write_text("".join(words))


def trained(*arguments):
    return train_moe.main([*SMALL, "--picture", "", *arguments, "text"])


def test_balance_does_not_change_what_is_learnt(rng):
    """50 steps, with the experts placed anew every ten, or copies chosen in each."""
    same = ["--layers", "1", "--steps", "50", "--seed", str(rng.integers(1000))]
    runs = [trained("--balance", balance, *same) for balance in ("none", "lplb", "any", "batch")]
    none, *balanced = (np.array([record["bits_per_byte"] for record in run]) for run in runs)
    assert none[-1] < none[0] - 1, "nothing was learnt"
    for curve in balanced:
        # Usually 2e-7. A near tie in top-k may send a token elsewhere in one of the runs: that step
        # differs by the token's share of the loss, and later ones by its gradient.
        apart = np.sort(np.abs(curve - none) / none)
        assert np.median(apart) < 1e-5, apart
        assert apart[-3] < 1e-4, apart
        assert apart[-1] < 2e-3, apart
    before, after = (
        np.array([[record[f"imbalance_{when}"] for record in run] for run in runs])
        for when in ("before", "after")
    )
    assert not any(record["overflow"] for run in runs for record in run)
    np.testing.assert_array_equal(after[0], before[0])
    assert (after[1:] <= before[1:]).all()
    assert (after[1:, -1] < before[1:, -1]).all()


@pytest.mark.parametrize("balance", ["lplb", "any"])
def test_experts_move_exactly(rng, balance):
    """Every expert's weights and optimizer state, bit for bit; all else stays unchanged."""
    given = ["--steps", "5", "--balance", balance, "text"]
    options = train_moe.command_line().parse_args([*SMALL, *given])
    training = train_moe.Training(options, train_moe.make_mesh(8))
    batches = train_moe.sample(train_moe.read(options.text), 16, 32, 0)
    for _ in range(3):
        training.step(next(batches))
    # So that all experts move.
    loads = rng.integers(0, 1000, (training.config.layers, 16))
    new = [training._placed(row, None if balance == "any" else training.r2o) for row in loads]

    def by_expert():
        """Leaves in the order of expert ids, and the others."""
        found = []
        for path, leaf in jax.tree_util.tree_leaves_with_path((training.weights, training.state)):
            leaf = np.asarray(leaf)
            if model.is_expert(path):
                layer = path[path.index(jax.tree_util.DictKey("blocks")) + 1].idx
                in_home_order = np.argsort(training.placements[layer].log2phy[:, 0])
                leaf = leaf[np.argsort(in_home_order)]
            found.append(leaf)
        return found

    before, old = by_expert(), training.placements
    training.move(new)
    assert metrics.homes_moved(old[0], training.placements[0]) > 4
    for was, now in zip(before, by_expert(), strict=True):
        np.testing.assert_array_equal(was, now)
    moved = jax.tree.leaves(
        jax.tree_util.tree_map_with_path(
            lambda path, leaf: model.is_expert(path), (training.weights, training.state)
        )
    )
    assert sum(moved) == 2 * 2 * 3  # layers, matrices; weights and both moments of Adam


def test_log_picture_and_traces(capsys):
    records = train_moe.main(
        [*SMALL, "--steps", "12", "--picture", "out.png", "--traces", "traces.npz", "text"]
    )
    lines = pathlib.Path("train_moe.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == records
    assert pathlib.Path("out.png").read_bytes().startswith(b"\x89PNG")
    assert [record["step"] for record in records if "refresh" in record] == [9]
    out = capsys.readouterr().out
    assert "0 rows found no room" in out
    assert re.search("placed anew [01] of 1 times", out)
    assert demo.demonstrate(traces="traces.npz", repeats=1, picture=None) == 0
    assert "16 experts, traces.npz" in capsys.readouterr().out


def test_default_text_is_the_standard_library():
    text = train_moe.read([])
    assert text.dtype == np.uint8
    assert len(text) > 1_000_000


COUNTS = shlex.split(
    "layers hidden heads experts top-k width context redundants batch steps refresh"
)
# Invalid options, the flag that the message names, and its reason.
BAD = [
    *(
        (f"--{flag} {value}", f"--{flag}", "at least 1, got")
        for flag in COUNTS
        for value in ("0", "-1", "1.5", "x")
    ),
    ("--ranks 1", "--ranks", "at least 2, got '1'"),
    ("--ranks x", "--ranks", "at least 2, got 'x'"),
    ("--seed -1", "--seed", "at least 0, got '-1'"),
    ("--seed 4294967296", "--seed", "below 2³², got 4294967296"),
    ("--learning-rate nan", "--learning-rate", "at least 0, got 'nan'"),
    ("--learning-rate inf", "--learning-rate", "at least 0, got 'inf'"),
    ("--aux-loss -1", "--aux-loss", "at least 0, got '-1'"),
    ("--capacity-factor 0.5", "--capacity-factor", "at least 1, got '0.5'"),
    ("--balance all", "--balance", "invalid choice: 'all'"),
    ("--dtype int8", "--dtype", "invalid choice: 'int8'"),
    ("--hidden 33", "--hidden", "multiple of the 2 heads, got 33"),
    ("--experts 10", "--experts", "multiple of the 8 ranks, got 10"),
    ("--batch 12", "--batch", "multiple of the 8 ranks, got 12"),
    ("--top-k 99", "--top-k", "at most the 16 experts, got 99"),
    ("--redundants 3", "--redundants", "at most the experts of a rank, 2, got 3"),
    ("--log absent/log", "--log", "folder that exists, got 'absent/log'"),
    ("--log .", "--log", "can be written, got '.'"),
    ("--picture noext", "--picture", r"ends in \.png.*got 'noext'"),
    ("--picture absent/a.png", "--picture", "folder that exists, got 'absent/a.png'"),
    ("--traces traces", "--traces", r"ends in \.npz, got 'traces'"),
    ("--traces absent/a.npz", "--traces", "folder that exists, got 'absent/a.npz'"),
    ("--context 999999", "text", "more than 999999 bytes, got"),
    ("absent", "text", "No such file or directory: absent"),
    (".", "text", r"Is a directory: \."),
]


@pytest.mark.parametrize(("given", "flag", "words"), BAD, ids=[bad[0] for bad in BAD])
def test_bad_options(capsys, given, flag, words):
    """Status 2 and a sentence that names the flag, before anything is written."""
    before = sorted(pathlib.Path().iterdir())
    with pytest.raises(SystemExit) as exit_:
        trained(*given.split())
    assert exit_.value.code == 2
    *_, sentence = capsys.readouterr().err.strip().split("\n")
    assert f"argument {flag}: " in sentence
    assert re.search(words, sentence), sentence
    assert sorted(pathlib.Path().iterdir()) == before


def test_every_option_has_a_bad_value():
    """A new option must be added above."""
    flags = {flag for _, flag, _ in BAD}
    for action in train_moe.command_line()._actions:
        assert {"-h", *action.option_strings, action.dest} & {"--help", *flags}, action.dest


@pytest.mark.parametrize("experts", ["8", "16"])
def test_the_topology_fits_the_experts(experts):
    options = train_moe.command_line().parse_args([*SMALL, "--experts", experts])
    train_moe.check(options, ranks=8)
    r2o, redundants = train_moe.topology(options, ranks=8)
    assert redundants == r2o.shape[1] == {"8": 1, "16": 2}[experts]


@pytest.mark.parametrize("balance", ["lplb", "any", "batch", "none"])
@pytest.mark.parametrize("n_steps", [1, 2, 5, 300])
def test_labels_are_beside_the_frame(rng, balance, n_steps):
    """Labels overlap neither it nor one another, and are in the picture; also with equal curves."""
    pytest.importorskip("matplotlib")
    options = train_moe.command_line().parse_args(
        ["--steps", str(n_steps), "--balance", balance, "--refresh", "1"]
    )
    keys = ("bits_per_byte", "imbalance_before", "imbalance_after")
    records = [
        {"step": step, **dict.fromkeys(keys, 1 + rng.random())} for step in range(options.steps)
    ]
    figure = train_moe.draw(options, records)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[1].texts]
    assert len(boxes) == (1 if balance == "none" else 2)
    for box in boxes:
        assert box.x0 > figure.axes[1].get_window_extent().x1
        assert box.x1 < figure.bbox.x1
    assert all(not a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    ticks = figure.axes[1].get_xticks()
    assert all(tick == round(tick) for tick in ticks)
