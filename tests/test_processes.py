"""The runner of several processes terminates, and reports their outputs."""

import time

import processes
import pytest

PROGRAM = """
import sys, time

_, n, process, how = sys.argv[1:]
print(f"{process} of {n}", flush=True)
if how == "loud":
    print("x" * 200_000)  # more than a pipe holds
if process == "1" and how == "fails":
    sys.exit("it failed")
if process != "1" and how in ("fails", "hangs"):
    time.sleep(600)
"""


@pytest.fixture
def program(tmp_path):
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    return str(file)


def test_outputs_in_order(program):
    outputs = processes.run(3, program, "loud")
    assert [output.splitlines()[0] for output in outputs] == ["0 of 3", "1 of 3", "2 of 3"]
    assert all(len(output) > 200_000 for output in outputs)


@pytest.mark.parametrize(
    ("how", "words"),
    [("hangs", "process 0: no end\n0 of 2\n.*process 1: exit code 0"), ("fails", "it failed")],
)
def test_none_is_left(program, monkeypatch, how, words):
    monkeypatch.setattr(processes, "GRACE_S", 0.2)
    start = time.monotonic()
    with pytest.raises(AssertionError, match=f"(?s){words}"):
        processes.run(2, program, how, limit_s=3.0 if how == "hangs" else 600.0)
    assert time.monotonic() - start < 60
