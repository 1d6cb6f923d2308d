"""The command line: its errors and its output."""

import io
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import lplb_jax
from lplb_jax import cli, demo

N_TOKENS = 64


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def arrays(rng, n_logical=16, n_tokens=N_TOKENS, n_layers=2, top_k=2):
    """Traces as `read_traces` expects them."""
    return {
        "indices": rng.integers(0, max(n_logical, 1), (n_layers, n_tokens, top_k), np.uint8),
        "history": rng.integers(0, 100, (n_layers, n_logical), np.int32),
    }


def traces(rng, **sizes):
    """Writes a file of traces; returns its name."""
    np.savez("traces.npz", **arrays(rng, **sizes))
    return "traces.npz"


def changed(name, change):
    """A file in which one array is replaced by `change` of it."""

    def write(rng):
        right = arrays(rng)
        np.savez("traces.npz", **{**right, name: change(right[name])})
        return "traces.npz"

    return write


def without(name):
    def write(rng):
        right = arrays(rng)
        del right[name]
        np.savez("traces.npz", **right)
        return "traces.npz"

    return write


def containing(content, name="traces.npz"):
    def write(rng):
        pathlib.Path(name).write_bytes(content)
        return name

    return write


def damaged(rng):
    """The right size and a valid zip directory, but corrupted bytes in an array."""
    name = traces(rng)
    content = bytearray(pathlib.Path(name).read_bytes())
    at = content.index(b"NUMPY") + 200
    content[at : at + 16] = bytes(16 * [255])
    pathlib.Path(name).write_bytes(content)
    return name


def array_file(rng):
    buffer = io.BytesIO()
    np.save(buffer, arrays(rng)["indices"])
    return containing(buffer.getvalue(), "traces.npy")(rng)


def pickled(rng):
    np.savez("traces.npz", **{**arrays(rng), "indices": np.array([{}, None], object)})
    return "traces.npz"


def folder(rng):
    pathlib.Path("folder.png").mkdir()
    return "folder.png"


TRACES = {
    "no such file": (lambda rng: "absent.npz", "No such file or directory: 'absent.npz'"),
    "no name": (lambda rng: "", "No such file or directory: ''"),
    "a folder": (folder, "Is a directory"),
    "an empty file": (containing(b""), r"\.npz file .*not one or is damaged"),
    "text": (containing(b"1 2 3\n"), r"\.npz file .*not one or is damaged"),
    "an array": (array_file, r"\.npz file .*not one or is damaged"),
    "half a file": (containing(b"PK\3\4 and no more"), r"\.npz file .*not one or is damaged"),
    "damaged": (damaged, r"\.npz file .*not one or is damaged"),
    "objects": (pickled, r"\.npz file .*not one or is damaged"),
    "no indices": (without("indices"), "no array indices"),
    "no history": (without("history"), "no array history"),
    "no layers": (lambda rng: traces(rng, n_layers=0), r"without empty axes.*\[0, 64, 2\]"),
    "no tokens": (lambda rng: traces(rng, n_tokens=0), r"without empty axes.*\[2, 0, 2\]"),
    "no choices": (lambda rng: traces(rng, top_k=0), r"without empty axes.*\[2, 64, 0\]"),
    "no experts": (lambda rng: traces(rng, n_logical=0), r"without empty axes.*\[2, 0\]"),
    "9 experts": (lambda rng: traces(rng, n_logical=9), "multiple of 8 experts.* got 9"),
    "4 experts": (lambda rng: traces(rng, n_logical=4), "multiple of 8 experts.* got 4"),
    "63 tokens": (lambda rng: traces(rng, n_tokens=63), "multiple of 8 tokens.* got 63"),
    "other layers": (changed("history", lambda a: a[:1]), r"\[1, 16\]"),
    "fewer dimensions": (changed("indices", lambda a: a[0]), r"\[64, 2\]"),
    "int64 indices": (changed("indices", np.int64), "uint8 or uint16.*got int64"),
    "float indices": (changed("indices", np.float32), "uint8 or uint16.*got float32"),
    "float history": (changed("history", np.float64), "history int32.*float64"),
    "large ids": (changed("indices", lambda a: a + np.uint8(200)), "below n_logical = 16.*got 2"),
    "no expert": (changed("indices", lambda a: a * 0 + np.uint8(255)), "got 255"),
    "negative loads": (changed("history", lambda a: a - 200), "at least 0, got -"),
}


def options(rng, **sizes):
    return ["--traces", traces(rng, **sizes)]


# Invalid arguments, by the flag that the message must name.
BAD = {
    **{
        f"traces: {name}": (lambda rng, make=make: ["--traces", make(rng)], "--traces", words)
        for name, (make, words) in TRACES.items()
    },
    "aux loss": (["--aux-loss", "1e-4"], "--aux-loss", "invalid choice: '1e-4'"),
    "aux loss of other traces": (
        lambda rng: ["--aux-loss", "1e-2", *options(rng)],
        "--aux-loss",
        "packaged.*traces.npz",
    ),
    "topology": (["--topology", "star"], "--topology", "invalid choice: 'star'"),
    "cube for few experts": (
        lambda rng: ["--topology", "cube", *options(rng, n_logical=8)],
        "--topology",
        "as a rank has experts, 1, got cube with 2",
    ),
    "complete for few experts": (
        lambda rng: ["--topology", "complete", *options(rng, n_logical=48)],
        "--topology",
        "as a rank has experts, 6, got complete with 7",
    ),
    "redundants 0": (["--redundants", "0"], "--redundants", "at least 1, got '0'"),
    "redundants -2": (["--redundants", "-2"], "--redundants", "at least 1, got '-2'"),
    "redundants 2.5": (["--redundants", "2.5"], "--redundants", "at least 1, got '2.5'"),
    "redundants for one column": (
        ["--topology", "cube", "--redundants", "3"],
        "--redundants",
        "multiple of the columns of the cube, 2, .*got 3",
    ),
    "redundants for most experts": (
        ["--redundants", "33"],
        "--redundants",
        "at most the experts of a rank, 32, got 33",
    ),
    "repeats 0": (["--repeats", "0"], "--repeats", "at least 1, got '0'"),
    "repeats x": (["--repeats", "many"], "--repeats", "at least 1, got 'many'"),
    "picture without ending": (["--picture", "noext"], "--picture", r"ends in \.png.*'noext'"),
    "picture of no kind": (["--picture", "a.doc"], "--picture", r"ends in \.png.*'a\.doc'"),
    "hidden picture": (["--picture", ".png"], "--picture", r"ends in \.png.*'\.png'"),
    "picture nowhere": (["--picture", "absent/a.png"], "--picture", "folder that exists.*absent"),
    "picture a folder": (
        lambda rng: ["--picture", folder(rng)],
        "--picture",
        "can be written, got 'folder.png'",
    ),
    "no such flag": (["--token", "1"], "--token", "unrecognized arguments"),
    "no value": (["--traces"], "--traces", "expected one argument"),
}


def refused(capsys, run, flag, words):
    """Status 2, the flag and the reason in one sentence, and nothing done."""
    with pytest.raises(SystemExit) as exit_:
        run()
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    *usage, sentence = err.strip().split("\n")
    assert usage[0].startswith("usage: ")
    assert all(line.startswith("  ") for line in usage[1:])
    assert flag in sentence
    assert re.search(words, sentence), sentence
    assert "Traceback" not in err
    assert not re.search(r"redundants_per_rank|aux_loss|r2o|path:|pickle|broadcast", sentence)


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(capsys, rng, name):
    given, flag, words = BAD[name]
    given: Any = given(rng) if callable(given) else given
    before = sorted(os.listdir())
    refused(capsys, lambda: cli.main(["demo", *given]), flag, words)
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("given", [[], ["demonstration"], ["--verbose"]])
def test_no_command(given):
    with pytest.raises(SystemExit) as exit_:
        cli.main(given)
    assert exit_.value.code == 2


def test_an_error_of_the_program_is_not_the_users(monkeypatch):
    """Only a message that starts with an argument is about it."""

    def fail(**_):
        raise ValueError("operands could not be broadcast together")

    monkeypatch.setattr(demo, "demonstrate", fail)
    with pytest.raises(ValueError, match="broadcast"):
        cli.main(["demo"])


def test_a_picture_that_cannot_be_written_at_the_end(capsys, rng, monkeypatch):
    """A folder that vanishes meanwhile must not give the status of a wrong result."""

    def remove_folder(*_):
        pathlib.Path("out").rmdir()
        return ""

    pathlib.Path("out").mkdir()
    monkeypatch.setattr(demo, "table", remove_folder)
    given = ["demo", *options(rng, n_layers=1), "--repeats", "1", "--picture", "out/a.png"]
    with pytest.raises(SystemExit) as exit_:
        cli.main(given)
    assert exit_.value.code == 2
    assert "argument --picture: No such file or directory: 'out/a.png'" in capsys.readouterr().err


@pytest.mark.parametrize("picture", ["a.png", "b.SVG", ""])
def test_the_picture_has_the_name_that_is_printed(capsys, rng, picture):
    given = ["demo", *options(rng), "--repeats", "1", "--picture", picture]
    before = set(os.listdir())
    assert cli.main(given) == 0
    printed = re.findall(r"^picture: (.*)$", capsys.readouterr().out, re.M)
    assert printed == ([picture] if picture else [])
    assert set(os.listdir()) - before == set(printed)


@pytest.mark.parametrize("ending", demo.PICTURES)
def test_matplotlib_knows_every_ending(ending):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    figure.savefig(f"a{ending}")
    assert pathlib.Path(f"a{ending}").stat().st_size > 0


@pytest.mark.parametrize(
    ("n_logical", "given", "chosen"),
    [
        (8, [], "ring topology, 1 redundant slots"),
        (16, [], "cube topology, 2 redundant slots"),
        (32, [], "cube topology, 4 redundant slots"),
        (24, ["--redundants", "3"], "ring topology, 3 redundant slots"),
        (56, ["--topology", "complete"], "complete topology, 7 redundant slots"),
    ],
)
def test_defaults_that_fit(capsys, rng, n_logical, given, chosen):
    """For any experts and other flags, defaults never cause an error."""
    options_ = [*options(rng, n_logical=n_logical), "--repeats", "1", "--picture", ""]
    assert cli.main(["demo", *options_, *given]) == 0
    assert chosen in capsys.readouterr().out


@pytest.mark.parametrize("topology", cli.TOPOLOGIES)
def test_the_table_is_narrow(rng, topology):
    """Columns are aligned, and 100 are enough, whatever the topology's name and the numbers."""
    loads = rng.integers(0, 2**31 // 8, (2, 8))
    loads = [*loads, loads[0]]
    runs = [
        demo.Run("", row, int(row.max()), 1, int(row.sum()) // 3000, 0.099, []) for row in loads
    ]
    lines = demo.table([demo.Layer(*loads[:2], tuple(runs))] * 12, topology).split("\n")
    assert len({len(line) for line in lines[1:]}) == 1
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("module", ["lplb_jax", "lplb_jax.cli"])
def test_the_package_runs_as_the_command(module):
    """`python -m lplb_jax`: the same output, and its exit status."""

    def run(*arguments):
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"lplb_jax {lplb_jax.__version__}\n")
    done = run("advise", "absent.npz", "--ranks", "8")
    assert (done.returncode, done.stdout) == (2, "")
    assert "lplb-jax advise: error: argument WORKLOAD: expected" in done.stderr
