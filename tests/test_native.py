"""Loading the native modules: versions, absence, and the handlers' own checks."""

import ast
import functools
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest
from cases import Case, counts_of, tokens
from steps import assert_same

import lplb_jax
from lplb_jax import Placement, _native, export_checks, rebalance, reference, solve, topologies

TARGETS = {"lplb_count", "lplb_solve", "lplb_assign", "lplb_rebalance"}


@pytest.fixture
def warned():
    """Reasons are reported once per process; reset them before and after."""
    _native.warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught
    _native.warn_once.cache_clear()


def test_the_cpu_module_is_installed():
    """pip install . always builds it, so the other tests test it, not the specification."""
    assert "cpu" in _native.AVAILABLE
    import lplb_jax._cpu

    assert set(lplb_jax._cpu.handlers()) >= TARGETS


def test_public_calls_run_native_code():
    placement = Case(topologies.ring(2), 1).placement()

    @jax.jit
    def balance(ids):
        alone = rebalance(ids, None, topologies.ring(2), placement=placement)
        return alone, rebalance(ids, np.ones((2, 2), np.int32), topologies.ring(2))

    text = balance.lower(np.zeros((2, 5), np.int32)).as_text()
    for target in TARGETS:
        assert target in text
    assert "stablehlo.while" not in text


def test_empty_numpy_operands_are_not_traced():
    """Native code and the specification get them, also under vmap and with nothing else."""
    nothing = np.zeros((0,), np.int32)
    count = functools.partial(_native.call, "lplb_count", reference.count, n_logical=4)
    assert count(nothing).tolist() == jax.jit(lambda: count(nothing))().tolist() == 5 * [0]

    placement = Placement.from_phy2log([[0, 1, 1], [2, 3, -1]], ep_size=2)
    tables, columns = (placement.phy2log, placement.log2phy), np.zeros((2, 0), np.int32)
    loads = np.array([[[5, 9, 1, 1]], [[7, 1, 2, 6]]], np.int32)

    def run(loads):
        operands = loads, *map(jnp.asarray, tables), columns
        return _native.call("lplb_solve", reference.solve, *operands, ep_size=2)[0]

    jaxpr = jax.make_jaxpr(run)(loads[0])
    assert not re.search(r"i32\[\d+,0\]", str(jaxpr))
    each = [run(one) for one in loads]
    np.testing.assert_array_equal(jax.jit(jax.vmap(run))(loads), each)


@pytest.mark.parametrize("runtime", ["0.9.9", "0.0.1"])
def test_an_older_jaxlib_is_refused(monkeypatch, runtime):
    """Its FFI lacks what newer headers require; the message says what to do."""
    built = _native.importlib.import_module("lplb_jax._cpu").jaxlib_version()
    monkeypatch.setattr(jaxlib.version, "__version__", runtime)
    with pytest.raises(ImportError) as refused:
        _native._load("lplb_jax._cpu")
    for words in ("lplb_jax._cpu", built, runtime, "upgrade jaxlib", "rebuild"):
        assert words in str(refused.value)


def signature(node):
    """A function's name, and the types of its arguments and result."""
    if not isinstance(node, ast.FunctionDef):
        return None, None
    types = [argument.annotation for argument in node.args.posonlyargs]
    return node.name, [ast.unparse(kind) for kind in (*types, node.returns)]


@pytest.mark.parametrize("name", ["_cpu", "_cuda", "_bench"])
def test_stubs_are_the_extensions(name):
    """Exactly the extension's functions, with the same types."""
    try:
        extension = importlib.import_module(f"lplb_jax.{name}")
    except ModuleNotFoundError:
        pytest.skip(f"no {name} in this installation")
    stub = pathlib.Path(lplb_jax.__file__).with_name(f"{name}.pyi")
    declared = dict(map(signature, ast.parse(stub.read_text()).body))
    compiled = {}
    for function in vars(extension).values():
        for text, *_ in getattr(function, "__nb_signature__", ()):
            # In Python syntax, without module names.
            text = re.sub(r"ndarray\[dtype=(\w+)[^\]]*\]", r"NDArray[np.\1]", text)
            text = re.sub(r"\b(collections\.abc|lplb_jax\._cuda)\.", "", text)
            compiled |= dict(map(signature, ast.parse(f"{text}: ...").body))
    declared.pop(None, None)
    assert compiled
    assert declared == compiled


@pytest.mark.parametrize("runtime", ["99.0.0", "0.100.0", "99.0.0.dev20991231"])
def test_a_newer_jaxlib_is_accepted(monkeypatch, runtime):
    monkeypatch.setattr(jaxlib.version, "__version__", runtime)
    assert _native._load("lplb_jax._cpu") is not None


@pytest.mark.parametrize(
    ("older", "newer"), [("0.9.2", "0.10.0"), ("0.10.2", "0.10.10"), ("0.10.2", "1.0")]
)
def test_versions_are_comparedas_numbers(older, newer):
    assert _native.as_numbers(older) < _native.as_numbers(newer)


def test_a_module_that_is_not_there_is_no_error():
    assert _native._load("lplb_jax._no_such_module") is None


def test_a_module_that_lacks_something_is_an_error(monkeypatch):
    """Only the extension itself may be absent, not its dependencies."""

    def import_module(name):
        raise ModuleNotFoundError("No module named 'other'", name="other")

    monkeypatch.setattr(_native, "importlib", types.SimpleNamespace(import_module=import_module))
    with pytest.raises(ModuleNotFoundError, match="other"):
        _native._load("lplb_jax._cpu")


def balance(case, loads):
    """A new function each time, so that no earlier lowering is reused."""
    return jax.jit(lambda ids: rebalance(ids, loads, case.r2o))


def assert_warned_here(warned, *words):
    """Once, at a line of this file, with the reason and the remedy."""
    assert len(warned) == 1, [str(warning.message) for warning in warned]
    assert warned[0].filename == __file__
    for word in (*words, "reference"):
        assert word in str(warned[0].message)


def test_without_the_module_the_reference_runs_and_says_so_once(rng, monkeypatch, warned):
    case = Case(topologies.ring(4), 2)
    ids = tokens(rng, case, 30)
    loads = counts_of(ids, case.n_logical)
    expected = rebalance(ids, loads, case.r2o)
    monkeypatch.setattr(_native, "AVAILABLE", {})
    for _ in range(3):
        assert_same(balance(case, loads)(ids), expected)
    assert_warned_here(warned, "was installed without its cpu module", "pip install", " .")
    assert "lplb_jax;" not in str(warned[0].message).split("pip install")[1]


@pytest.mark.parametrize(
    ("platform", "words"),
    [
        ("tpu", ["no native code for platform 'tpu'"]),
        ("rocm", ["no native code for platform 'rocm'"]),
        ("cuda", ["was installed without its CUDA module", "LPLB_CUDA=pypi pip install"]),
    ],
)
def test_the_platform_is_that_of_the_program(monkeypatch, warned, platform, words):
    """The target platform counts, not JAX's default: without native code the reference runs."""
    case = Case(topologies.ring(4), 2)
    monkeypatch.setattr(_native, "AVAILABLE", {"cpu": _native.AVAILABLE["cpu"]})
    traced = balance(case, np.ones((4, 8), np.int32)).trace(np.zeros((4, 30), np.int32))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "lplb_" not in text.replace("lplb_call", "")
    assert "stablehlo.while" in text
    assert_warned_here(warned, *words)
    text = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "@lplb_solve" in text
    assert "stablehlo.while" not in text
    assert len(warned) == 1


def test_one_program_for_several_platforms(monkeypatch, warned):
    """Native where there is an extension, the reference elsewhere."""
    case = Case(topologies.ring(4), 2)
    monkeypatch.setattr(_native, "AVAILABLE", dict.fromkeys(["cpu", "CUDA"], ("lplb_solve",)))
    run = jax.jit(lambda loads: solve(loads, case.r2o))
    platforms = ["cpu", "cuda", "tpu"]
    exported = jax.export.export(run, platforms=platforms, disabled_checks=export_checks())
    text = exported(np.ones(8, np.int32)).mlir_module()
    assert "stablehlo.case" in text
    assert "@lplb_solve" in text
    assert "stablehlo.while" in text
    assert_warned_here(warned, "no native code for platform 'tpu'")


def test_no_warning_where_there_is_native_code(warned):
    rebalance(np.zeros((2, 1), np.int32), np.ones((2, 2), np.int32), topologies.ring(2))
    assert not warned


@pytest.mark.skipif(
    importlib.util.find_spec("lplb_jax._cuda") is None, reason="no CUDA module in this installation"
)
def test_the_cuda_module_needs_no_driver():
    """A wheel with it is imported on machines without a GPU."""
    code = "import lplb_jax._cuda as m; print(*m.handlers())"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) >= TARGETS
