"""The examples of layers in a model: they learn, and decoding is the same with copies and without.

They run as separate programs without XLA's optimizations, since compilation dominates.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
QUICK = "--xla_backend_optimization_level=0"


def printed(name, *arguments):
    """A program's output. Warnings are errors, to detect missing native modules."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES), *sys.path[1:]]),
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {QUICK}",
    }
    program = [sys.executable, "-P", "-W", "error::UserWarning", str(EXAMPLES / name), *arguments]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "module"), [("scanned_layers.py", "optax"), ("nnx_layer.py", "flax")]
)
def test_layers_learn(name, module):
    """Experts are placed anew in between."""
    pytest.importorskip("optax")
    pytest.importorskip(module)
    out = printed(name, "--steps", "40", "--tokens", "256")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    assert len(losses) == 4, out
    assert losses[-1] < 0.75 * losses[0], out
    assert set(re.findall(r"(\d+)(?: rows)? found no room", out)) == {"0"}, out
    assert re.search("layers placed anew|[1-9][0-9]* homes moved", out), out


def test_decoding(rng):
    """Balanced, ranks are more even and the tokens the same, but for ties."""
    pytest.importorskip("optax")
    pytest.importorskip("tqdm")
    out = printed("decode.py", "--ranks", "8", "--steps", "12")
    (none, mean), (balanced, same_mean) = re.findall(r"busiest rank ([\d.]+) rows of ([\d.]+)", out)
    assert mean == same_mean == "16.0"
    assert float(balanced) < float(none), out
    assert re.findall(r"(\d+) found no room", out) == ["0", "0"]
    assert float(re.search(r"([\d.]+) % of the tokens", out)[1]) > 90, out
