"""Dependencies between the package's modules go one way; no test module touches a device."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import lplb_jax

ROOT = pathlib.Path(lplb_jax.__file__).parent
FILES = {
    ".".join(("lplb_jax", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): file
    for file in ROOT.rglob("*.py")
}


def imported_by(file: pathlib.Path) -> set[str]:
    """Modules of the package that the file imports, including imports for types."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            # A name that is not a module is defined in the module it is imported from.
            inside = {f"{node.module}.{name.name}" for name in node.names}
            modules |= inside & FILES.keys()
            if not inside <= FILES.keys():
                modules.add(node.module)
    return modules & FILES.keys()


def test_no_module_imports_itself_in_a_circle():
    graphlib.TopologicalSorter({name: imported_by(file) for name, file in FILES.items()}).prepare()


COLLECT = """
import sys

import pytest
from jax._src import xla_bridge

options = ["--collect-only", "-p", "no:cacheprovider", "-m", ""]
status = pytest.main([*options, sys.argv[1]])
sys.exit(int(status) or 17 * xla_bridge.backends_are_initialized())
"""


def test_no_test_module_touches_a_device_when_it_is_imported():
    """On a GPU, each worker of pytest-xdist would take most of its memory before any test runs."""
    tests = pathlib.Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", COLLECT, tests], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
