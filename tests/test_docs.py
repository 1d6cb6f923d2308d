"""Docstrings and README: complete, and their examples run."""

import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lplb_jax
from lplb_jax import _study

ROOT = pathlib.Path(__file__).parent.parent
MODULES = [
    "lplb_jax",
    *(
        module.name
        for module in pkgutil.walk_packages(lplb_jax.__path__, "lplb_jax.")
        if "._" not in module.name
    ),
]
PUBLIC_MODULES = {
    "metrics": lplb_jax.metrics,
    "moe": lplb_jax.moe,
    "topologies": lplb_jax.topologies,
}


def public_functions():
    """All public functions, by name."""
    for name in lplb_jax.__all__:
        value = getattr(lplb_jax, name)
        if inspect.isfunction(value):
            yield name, value
    for prefix, module in PUBLIC_MODULES.items():
        for name, value in vars(module).items():
            here = inspect.isfunction(value) and value.__module__.startswith(module.__name__)
            if here and not name.startswith("_"):
                yield f"{prefix}.{name}", value


FUNCTIONS = dict(public_functions())


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    module = importlib.import_module(name)
    names = {name: getattr(lplb_jax, name) for name in lplb_jax.__all__}
    names |= {"jax": jax, "jnp": jnp, "np": np}
    finder = doctest.DocTestFinder(recurse=True)
    failures = []
    for test in finder.find(module, name, extraglobs=names):
        runner = doctest.DocTestRunner(verbose=False)
        runner.run(test, out=failures.append)
    assert not failures, "".join(failures)


@pytest.mark.parametrize("name", lplb_jax.__all__)
def test_every_public_name_has_a_docstring(name):
    documented = inspect.getdoc(getattr(lplb_jax, name))
    assert documented
    first, *rest = documented.splitlines()
    assert first.endswith((".", ":"))
    assert not rest or not rest[0].strip()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_sections_of_a_functions_docstring(name):
    """Arguments with their types, results, errors if it checks, and an example."""
    function = FUNCTIONS[name]
    documented = inspect.getdoc(function) or ""
    parameters = inspect.signature(function).parameters
    for section in [*(["Args:"] if parameters else []), "Returns:", ">>> "]:
        assert section in documented, section
    for parameter in parameters:
        assert re.search(rf"^  {parameter}: ", documented, re.M), parameter
    if name in lplb_jax.__all__:
        assert "Raises:" in documented


RESULTS = [
    lplb_jax.Advice,
    lplb_jax.LoadHistory,
    lplb_jax.Refresh,
    _study.Ageing,
    _study.Choice,
    lplb_jax.Split,
    lplb_jax.TileSplit,
    lplb_jax.Placement,
    lplb_jax.moe.Experts,
    lplb_jax.moe.InSlots,
    lplb_jax.moe.LayerResult,
    lplb_jax.moe.Own,
    lplb_jax.moe.Plan,
    lplb_jax.moe.Traffic,
    lplb_jax.moe.WithRoom,
]


@pytest.mark.parametrize("result", RESULTS)
def test_fields_are_documented(result):
    documented = inspect.getdoc(result) or ""
    fields = getattr(result, "_fields", None) or result.__dataclass_fields__
    for field in fields:
        assert re.search(rf"^  {field}: ", documented, re.M), field


def test_signatures_are_the_contract():
    """The public interface: names, order and defaults of the arguments."""
    expected = {
        "rebalance": (
            "(indices, loads, r2o=None, *, placement=None, axis_name=None, comm=None, "
            "solver='auto', rank_weights=None, positions=False, copies='placement', fan_out=None, "
            "n_nodes=None, tile=None, base_load=None)"
        ),
        "advise": (
            "(workload, *, ep_size, n_nodes=1, redundants=None, topology=None, n_logical=None, "
            "top_k=None, tokens_per_rank=None, hidden=None, width=None, bytes_per_expert=None, "
            "memory_budget=None, inference=False, flops=550000000000000.0, link=270000000000.0, "
            "node_link=45000000000.0, memory_rate=2700000000000.0, most_layers=4, progress=None)"
        ),
        "refresh": (
            "(history, placement, *, steps, row_s, bytes_per_expert, inference=False, "
            "link=270000000000.0, most_layers=None, most_bytes=None)"
        ),
        "place_copies": "(loads, placement, *, fan_out=None)",
        "count_loads": "(indices, n_logical)",
        "sync_loads": "(counts, axis_name, *, comm=None)",
        "init_comm": (
            "(mesh, axis='ep', *, max_experts, transport='auto', timeout_s=30.0, max_tokens=0, "
            "hidden_bytes=0, top_k=8, capacity_factor=1.25, sms=0, copy_bytes=0)"
        ),
        "solve": (
            "(loads, r2o=None, *, placement=None, solver='auto', rank_weights=None, repair=True, "
            "factor='elimination', tile=None, base_load=None)"
        ),
        "place_experts": (
            "(history, r2o=None, *, n_logical, ep_size, redundants_per_rank=None, "
            "n_physical=None, n_nodes=1, n_groups=1, method='auto', previous=None)"
        ),
        "assign": (
            "(indices, loads, split, r2o=None, *, placement=None, axis_name=None, positions=False, "
            "n_nodes=None)"
        ),
        "verify": (
            "(loads, split, r2o=None, *, placement=None, indices=None, physical_indices=None, "
            "tile=None, base_load=None)"
        ),
        "topologies.validate": "(r2o)",
        "topologies.named": "(n_ranks)",
        "topologies.ring": "(n)",
        "topologies.cube": "()",
        "topologies.hypercube": "()",
        "topologies.torus": "(m, n)",
        "topologies.complete": "(n)",
    }
    for name, signature in expected.items():
        bare = inspect.signature(FUNCTIONS[name])
        bare = bare.replace(
            parameters=[p.replace(annotation=p.empty) for p in bare.parameters.values()],
            return_annotation=bare.empty,
        )
        assert str(bare) == signature, name


PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
WITH_PYTHON = [page for page in PAGES if "```python" in (ROOT / page).read_text()]


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_of_a_page_runs(tmp_path, page):
    """Runs all its blocks in sequence, as a user would type them."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)
    assert blocks, f"{page} has no example"
    if any("import orbax" in block for block in blocks):
        pytest.importorskip("orbax.checkpoint")
    # -P excludes the source tree, whose missing native modules would cause a warning.
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error::UserWarning", "-c", "\n".join(blocks)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page(page):
    """Files and headings that links name exist. The site checks the same."""
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", file.read_text(), re.M)
            slugs = {
                re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings
            }
            assert anchor in slugs, target


def test_every_public_name_is_on_the_api_page():
    page = (ROOT / "docs" / "api.md").read_text()
    names = [*lplb_jax.__all__, *lplb_jax.moe.__all__]
    for module in PUBLIC_MODULES.values():
        names += [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
        ]
    missing = [name for name in names if not re.search(rf"`[^`]*\b{name}\b[^`]*`", page)]
    assert not missing


def test_readme_is_two_screens():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 110


def test_every_page_is_in_the_sites_menu():
    menu = set(re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert menu == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_no_command_takes_the_library_from_pypi():
    """PyPI does not have it."""
    for path in subprocess.check_output(["git", "-C", ROOT, "ls-files"], text=True).splitlines():
        if path.endswith((".py", ".md", ".cc", ".h", ".toml", ".yml")) and "test_docs" not in path:
            said = (ROOT / path).read_text()
            found = re.search(r"pip install [^\n`]*\blplb[_-]jax\b(?!/)", said)
            assert not found, f"{path}: {found[0]}"


def test_pictures_are_drawn(tmp_path):
    """Everything that the pages show, from the committed figures."""
    pytest.importorskip("matplotlib")
    subprocess.run([sys.executable, "-P", ROOT / "docs/figures.py", tmp_path], check=True)
    drawn = {path.name for path in tmp_path.iterdir()}
    shown = set()
    for page in PAGES:
        shown |= set(re.findall(r"images/([\w.]+)", (ROOT / page).read_text()))
    assert drawn == shown == {path.name for path in (ROOT / "docs/images").iterdir()}
