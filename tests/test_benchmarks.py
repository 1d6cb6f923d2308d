"""The benchmarks' output, and its comparison with the committed figures."""

import copy
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import compare
import per_gpu
import pytest
import record

ROOT = pathlib.Path(__file__).parent.parent
COMMITTED = sorted((ROOT / "benchmarks" / "results").glob("*_h200*.json"))
COMPARED = [path for path in COMMITTED if not path.stem.startswith("training")]  # not times


def place(tree: Any, path: str) -> Any:
    """The container of a figure, and its key there."""
    *above, last = path.split(":")
    for key in above:
        if isinstance(tree, list):
            tree = next(x for i, x in enumerate(tree) if compare.case_of(x, i) == key)
        else:
            tree = tree[key]
    return tree, last


def exit_status(tmp_path, committed, new, *options):
    paths = []
    for name, figures in (("committed", committed), ("new", new)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(figures))
    command = [sys.executable, compare.__file__, *paths, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("path", COMPARED, ids=lambda path: path.stem)
def test_a_regression_is_found_by_its_name(rng, path):
    """A random figure too large, missing or NaN; smaller figures or within tolerance are fine."""
    committed = compare.read(path)
    names = dict(compare.figures(committed))
    assert len(names) >= 3
    name = str(rng.choice(list(names)))
    for factor, missing, found in (
        (1.0, False, False), (1.14, False, False), (0.3, False, False),
        (1.17, False, True), (float("nan"), False, True), (1.0, True, True),
    ):  # fmt: skip
        new = copy.deepcopy(committed)
        container, key = place(new, name)  # a list or a dict
        if missing:
            del container[key]
        else:
            container[key] *= factor
        lines = compare.regressions(committed, new, 0.15)
        assert [line.partition(": ")[0] for line in lines] == [name] * found, (factor, missing)


def test_exit_status(tmp_path):
    committed = compare.read(ROOT / "benchmarks/results/balancer_h200.json")
    slower = committed | {"cube/1024": committed["cube/1024"] * 1.3}
    assert exit_status(tmp_path, committed, committed)[0] == 0
    status, said = exit_status(tmp_path, committed, slower)
    assert status == 1
    assert "cube/1024" in said
    assert "+30%" in said
    assert exit_status(tmp_path, committed, slower, "--tolerance", "0.4")[0] == 0
    status, said = exit_status(tmp_path, committed, committed | {"device": "NVIDIA H100"})
    assert status == 2
    assert "NVIDIA H200" in said
    assert "NVIDIA H100" in said


def test_folders(tmp_path):
    """Compares every file with its committed one; the worst decides, and others are named."""
    results, new = ROOT / "benchmarks" / "results", tmp_path / "new"
    new.mkdir()
    (new / "balancer_a100.json").write_text("{}")

    def exit_status_of_folder():
        command = [sys.executable, compare.__file__, results, new]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout.splitlines()

    for name in ("moe_layer_4096_h200x2", "solver_h200"):
        (new / f"{name}.json").write_text((results / f"{name}.json").read_text())
    status, said = exit_status_of_folder()
    assert status == 0
    assert said[0] == "balancer_a100.json: no committed figures"
    assert len(said) == 3
    slower = compare.read(new / "solver_h200.json")
    slower["cube"]["exact"]["mean"] *= 1.2
    (new / "solver_h200.json").write_text(json.dumps(slower))
    status, said = exit_status_of_folder()
    assert status == 1
    assert said[-1].startswith("solver_h200.json: cube:exact:mean: ")


def test_cases_compare_by_name():
    """Not by position in the list: a run with other cases reports the missing ones."""
    committed = compare.read(ROOT / "benchmarks/results/moe_layer_4096_h200x2.json")
    new = copy.deepcopy(committed)
    new["results"].reverse()
    assert compare.regressions(committed, new, 0.0) == []
    del new["results"][0]
    lines = compare.regressions(committed, new, 0.15)
    assert lines
    assert all("arranged to 1.6" in line and "missing" in line for line in lines)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.stem
)
def test_every_committed_file_says_how_it_was_made(path):
    """Conditions that were not recorded are marked."""
    made = compare.read(path)["run"]
    assert made.keys() == record.run().keys()
    assert None not in made.values(), made
    assert "" not in made.values(), made


def test_every_json_says_what_it_depends_on(tmp_path):
    record.write(tmp_path / "figures.json", {"device": "cpu", "microseconds": {"call": 1.5}})
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["microseconds"] == {"call": 1.5}
    run = written["run"]
    versions = "python", "jax", "jaxlib", "nccl", "cuda_runtime", "cuda_of_driver"
    assert {"command", "commit", "gpus", "cpu", *versions} == run.keys()
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode == 0 and "COMMIT" not in os.environ:
        assert run["commit"].removesuffix("-dirty") in head.stdout
    assert all(run.values()) or run["gpus"] == []


def test_a_commit_can_be_named(monkeypatch):
    """Where there is no repository, or another one than that of the sources."""
    monkeypatch.setenv("COMMIT", "0123abc")
    assert record.run()["commit"] == "0123abc"
    monkeypatch.setattr(record, "_output", lambda *command: "")
    assert record.run()["commit"] == "0123abc"
    monkeypatch.delenv("COMMIT")
    assert record.run()["commit"] == "not recorded"


@pytest.mark.parametrize(
    ("names", "n"),
    [("0,1", 2), ("3", 1), ("GPU-8932f937,GPU-a1b2c3d4", 2), ("", 0), ("-1", 0), ("0,-1,1", 1)],
)
def test_gpus_are_counted_as_cuda_does(monkeypatch, names, n):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    assert per_gpu.visible_gpus() == n


def test_processes_without_a_gpu_end_with_a_message(monkeypatch):
    monkeypatch.delenv("LPLB_BENCHMARK_PLACE", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit, match="got none; see CUDA_VISIBLE_DEVICES"):
        per_gpu.one_per_gpu()


def test_a_command_names_no_paths_of_the_machine(monkeypatch):
    options = ["--json", "/a/new.json", "--json=/a/b.json", "results/c.json", "--repeats=5"]
    monkeypatch.setattr(sys, "argv", ["/a/solver.py", *options])
    expected = "solver.py --json new.json --json=b.json results/c.json --repeats=5"
    assert record.run()["command"] == expected
    for path in (ROOT / "benchmarks/results").glob("*.json"):
        command = json.loads(path.read_text())["run"]["command"]
        assert not any(part.startswith("/") for part in command.replace("=", " ").split()), path


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.stem)
def test_whatever_writes_json_writes_it_so(path):
    text = path.read_text()
    assert "json.dump(" not in text or path.name == "record.py"
    assert ("record.write(" in text) == ("--json" in text) or path.name == "compare.py"


def test_every_program_and_result_is_listed():
    listed = (ROOT / "benchmarks" / "README.md").read_text()
    for path in (ROOT / "benchmarks").glob("*.py"):
        assert f"`{path.name}" in listed, path.name
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        if not path.stem.endswith("compiled"):
            assert f"`{path.name}`" in listed, path.name
