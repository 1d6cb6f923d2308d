"""The native handlers alone, called as no public function would: they never crash."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import on_cpu

HERE = os.path.dirname(__file__)


def run_python(*arguments):
    """A separate program, so that a crash is a failed test."""
    path = os.pathsep.join(filter(None, [HERE, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-P", *arguments], env=environment, capture_output=True, text=True
    )


def test_any_call_ends_in_a_sentence_or_in_what_is_specified(rng):
    seed = str(rng.integers(2**31))
    done = run_python(os.path.join(HERE, "handler_fuzz.py"), seed, "60")
    assert done.returncode == 0, f"handler_fuzz.py {seed}\n{done.stderr[-4000:]}"


def int32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


SOLVED = [int32(8), int32(1), int32(1), int32(1)]
SOLVE = [int32(4, 4), int32(8), int32(4, 2), int32(4, 1)]  # loads, phy2log, log2phy, r2o


def with_operand(i, operand):
    return [*SOLVE[:i], operand, *SOLVE[i + 1 :]]


@pytest.mark.parametrize(
    ("target", "results", "operands", "attribute", "words"),
    [
        ("count", int32(5), [int32(3)], {"n_logical": 5}, "counts"),
        ("count", int32(1), [int32(3)], {"n_logical": 0}, "n_logical"),
        ("count", int32(2, 6), [int32(3)], {"n_logical": 5}, r"counts: .*got \[2, 6\]"),
        ("count", int32(6), [jax.ShapeDtypeStruct((3,), jnp.float32)], {"n_logical": 5}, "indices"),
        ("solve", SOLVED, with_operand(0, int32(2, 4)), {"ep_size": 4}, r"loads: .*got \[2, 4\]"),
        ("solve", SOLVED, with_operand(1, int32(2, 8)), {"ep_size": 4}, r"phy2log: .*got \[2, 8\]"),
        ("solve", SOLVED, with_operand(1, int32(9)), {"ep_size": 4}, "n_physical = 9"),
        ("solve", SOLVED, with_operand(2, int32(4, 1)), {"ep_size": 4}, "do not fit together"),
        ("solve", SOLVED, with_operand(3, int32(3, 1)), {"ep_size": 4}, "do not fit together"),
        ("solve", SOLVED, with_operand(3, int32(3, 0)), {"ep_size": 4}, "do not fit together"),
        ("solve", SOLVED, SOLVE, {"ep_size": 0}, "ep_size: expected 1 to .*got 0"),
        ("solve", SOLVED, SOLVE, {}, "ep_size: expected an int64 attribute"),
        ("solve", SOLVED, SOLVE, {"ep_size": 4, "other": 1}, "attributes: expected 1, got 2"),
        ("solve", SOLVED, SOLVE, {"ep_size": 4}, "r2o: expected a permutation .*got 0 in row 1"),
        ("solve", SOLVED, SOLVE[:3], {"ep_size": 4}, "r2o: expected a buffer"),
        ("solve", [int32(7), *SOLVED[1:]], SOLVE, {"ep_size": 4}, r"quota: .*8\], got \[7\]"),
        ("solve", [*SOLVED[:3], int32()], SOLVE, {"ep_size": 4}, r"status: .*= 1\], got \[\]"),
    ],
)
def test_handlers_check_shapes(target, results, operands, attribute, words):
    """Without the checks of the public functions: a clear error, not a crash."""
    attribute = {name: np.int64(value) for name, value in attribute.items()}
    handler = on_cpu(jax.ffi.ffi_call(f"lplb_{target}", results))
    zeros = [np.zeros(operand.shape, operand.dtype) for operand in operands]
    with pytest.raises(Exception, match=f"lplb_jax: .*{words}"):
        jax.block_until_ready(handler(*zeros, **attribute))


OUT_OF_MEMORY = """
import resource
import jax, numpy as np
import lplb_jax
n = 30000  # ranks of one group: the interior point's matrix takes 3.6 GB
i32 = lambda *shape: jax.ShapeDtypeStruct(shape, np.int32)
handler = jax.ffi.ffi_call("lplb_ipm", [i32(2 * n), i32(1), i32(1), i32(1)])
names = ("ep_size", "weighted", "repair", "cusolverdx")
call = jax.jit(lambda *operands: handler(*operands, **dict(zip(names, np.int64([n, 0, 0, 0])))))
rank = np.arange(n, dtype=np.int32)
phy2log = np.stack([rank, (rank - 1) % n], axis=1).ravel()
log2phy = np.stack([2 * rank, 2 * ((rank + 1) % n) + 1], axis=1)
operands = (rank[None], phy2log, log2phy, (rank[:, None] - 1) % n, np.ones(n, np.float32))
call = call.lower(*operands).compile()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 10**9, resource.RLIM_INFINITY))
try:
    jax.block_until_ready(call(*operands))
except Exception as error:
    print(error)
"""


def test_too_little_memory_is_an_error():
    done = run_python("-c", OUT_OF_MEMORY)
    assert "lplb_jax: out of host memory" in done.stdout, done.stdout + done.stderr
