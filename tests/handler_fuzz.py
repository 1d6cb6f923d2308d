"""Calls every CPU target as no public function would: `handler_fuzz.py SEED N_CALLS`.

A call starts valid; then its values, dtypes, shapes or attributes are corrupted. It must end in one
of this library's error messages, or in the specification's result. The number of a call is written
before it starts, so after a crash the last number identifies the call.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import Case, random_topology

from lplb_jax import Placement, reference

WILD_WORDS = np.array([-(2**31), -(2**30), -2, -1, 0, 1, 2, 7, 1000, 2**30, 2**31 - 2, 2**31 - 1])
WILD_FLOATS = np.array([np.nan, np.inf, -np.inf, -1, 0, 1e-45, 1e-20, 1e20, 3e38], np.float32)
WILD_SIZES = [0, 1, 2, 3, 5, 2**16, 2**31 - 9, 2**31 - 8, 2**31 - 1, 2**31, 2**40]
WILD_ATTRIBUTES = [-(2**63), -1, 0, 1, 2, 3, 2**31 - 9, 2**31 - 1, 2**31, 2**32, 2**63 - 1]
DTYPES = ["int32", "float32", "int8", "uint8", "uint16", "bool", "float16", "complex64"]


@dataclasses.dataclass
class Call:
    """One call of a target, and the specification's result."""

    target: str
    operands: list[Any]
    results: list[jax.ShapeDtypeStruct]
    attributes: dict[str, Any]

    def run(self) -> list[np.ndarray]:
        handler = jax.ffi.ffi_call(f"lplb_{self.target}", self.results)
        # Compiled anew: JAX would reuse the program of an equal call, and True equals np.int64(1).
        run = jax.jit(lambda *operands: handler(*operands, **self.attributes))
        return [np.asarray(result) for result in run(*self.operands)]

    def expected(self) -> list[Any]:
        """The specification's result; for the float32 interior point, dtypes and shapes."""
        attributes = tuple((name, int(value)) for name, value in self.attributes.items())
        specified = specification(self.target, attributes)
        if self.target == "ipm":
            return jax.tree.leaves(jax.eval_shape(specified, *self.operands))
        return [np.asarray(result) for result in jax.tree.leaves(specified(*self.operands))]


@functools.cache
def specification(target: str, attributes: tuple[tuple[str, int], ...]) -> Any:
    return jax.jit(functools.partial(getattr(reference, target), **dict(attributes)))


def some_cases(rng: np.random.Generator) -> list[Case]:
    """A few cases, since each compiles the specification."""
    return [
        Case(np.array([[0]], np.int32), 2),
        Case(random_topology(rng, 4, 1), 3, n_groups=2),
        Case(random_topology(rng, 3, 2), 5, combined=2),
    ]


def valid_call(rng: np.random.Generator, case: Case) -> Call:
    """A call as the public functions make it."""
    placement = case.placement(rng)
    anywhere = rng.integers(3) == 0
    if anywhere:
        sizes = {"ep_size": case.ep_size, "n_logical": case.n_logical}
        placement = Placement.from_phy2log(rng.permutation(placement.phy2log), **sizes)
    n_logical, n_physical = placement.n_logical, placement.n_physical
    n_tokens = int(rng.choice([0, 33]))
    indices = rng.integers(0, n_logical + 1, n_tokens).astype(rng.choice(["int32", "uint8"]))
    loads = rng.integers(0, 100, (case.ep_size, n_logical + 1)).astype(np.int32)
    r2o = np.zeros((case.ep_size, 0)) if anywhere else case.r2o
    r2o = np.asarray(r2o, np.int32)
    placed = [placement.phy2log, placement.log2phy, r2o]
    split = [(n_physical,), *[(case.ep_size // len(r2o),)] * 3]
    positions = int(rng.integers(2))
    slots = [(n_tokens,), (n_tokens * positions,), (n_physical * positions,)]
    workspace = (1, 17 * (n_logical + 1))
    size = {"ep_size": case.ep_size}
    node_size = rng.choice([n for n in range(1, case.ep_size + 1) if case.ep_size % n == 0])
    nodes = {"node_size": int(node_size) if anywhere else 0}
    types = [np.int32] * 11
    targets = ["count", "solve", "solve_costs", "ipm", "place_copies", "assign", "rebalance"]
    targets += ["rebalance_costs"] if anywhere else []
    target = str(rng.choice(targets))
    if target == "count":
        operands, shapes, attributes = [indices], [(n_logical + 1,)], {"n_logical": n_logical}
    elif target == "solve":
        operands, shapes, attributes = [loads, *placed], split, size
    elif target == "solve_costs":
        base_load = rng.integers(0, 5, case.ep_size).astype(np.int32)
        operands, shapes = [loads, *placed, base_load], [*split, split[-1]]
        attributes = size | {"tile": int(rng.choice([1, 7, 1 << 20]))}
    elif target == "place_copies":
        fan_out = int(rng.integers(1, 4))
        width = 1 + min(case.ep_size - 1, n_physical - n_logical, fan_out)
        operands, shapes = [loads, *placed[:2]], [(n_physical,), (n_logical, width), (n_logical,)]
        attributes = size | {"fan_out": fan_out}
    elif target == "ipm":
        flags = {"weighted": int(rng.integers(2)), "repair": int(rng.integers(2)), "cusolverdx": 0}
        loads = loads.astype(rng.choice(["int32", "float32"]))
        value = np.float32 if flags["weighted"] else loads.dtype
        types = [loads.dtype, value, value, np.int32]
        weights = rng.uniform(0.5, 2, len(r2o)).astype(np.float32)
        operands, shapes, attributes = [loads, *placed, weights], split, size | flags
    elif target == "assign":
        quota = rng.integers(0, 9, n_physical).astype(np.int32)
        rank = np.int32(rng.integers(case.ep_size))
        if proportional := int(rng.integers(2)):
            loads = loads[:1]
        operands, shapes = [indices, loads, quota, *placed[:2], rank], [*slots, workspace]
        attributes = size | nodes | {"proportional": proportional, "positions": positions}
    elif target == "rebalance_costs":
        base_load = rng.integers(0, 5, case.ep_size).astype(np.int32)
        operands = [indices, *placed, base_load]
        shapes = [*slots, *split, split[-1], workspace]
        tile = int(rng.choice([1, 7, 1 << 20]))
        attributes = size | nodes | {"positions": positions, "tile": tile}
    else:
        operands, shapes = [indices, *placed], [*slots, *split]
        fan_out = int(rng.integers(4)) if anywhere else 0
        if fan_out:
            width = 1 + min(case.ep_size - 1, n_physical - n_logical, fan_out)
            shapes += [(n_physical,), (n_logical, width), (n_logical,)]
        shapes.append(workspace)
        attributes = size | nodes | {"positions": positions, "fan_out": fan_out}
    results = [
        jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, types, strict=False)
    ]
    attributes = {name: np.int64(value) for name, value in attributes.items()}
    return Call(target, operands, results, attributes)


def spoil_values(rng: np.random.Generator, call: Call) -> None:
    """Replaces values of some operands."""
    for i, operand in enumerate(map(np.asarray, call.operands)):
        if rng.integers(3) == 0:
            continue
        wild = WILD_FLOATS if operand.dtype == np.float32 else WILD_WORDS
        changed = rng.random(operand.shape) < rng.choice([0.05, 0.5, 1])
        values = rng.choice(wild, operand.shape).astype(operand.dtype)
        call.operands[i] = np.where(changed, values, operand)


def spoiled_shape(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[int, ...]:
    dims = list(shape)
    kind = rng.integers(4)
    if kind == 0 or not dims:
        dims.insert(int(rng.integers(len(dims) + 1)), int(rng.choice([0, 1, 2])))
    elif kind == 1:
        dims.pop(int(rng.integers(len(dims))))
    else:
        axis = int(rng.integers(len(dims)))
        dims[axis] = max(0, dims[axis] + int(rng.choice([-1, 1, dims[axis]])))
    return tuple(dims)


def spoil_shape(rng: np.random.Generator, call: Call) -> None:
    """Changes the shape of one or more buffers."""
    for _ in range(rng.integers(1, 3)):
        i = int(rng.integers(len(call.operands) + len(call.results)))
        if i < len(call.operands):
            operand = np.asarray(call.operands[i])
            call.operands[i] = np.resize(operand, spoiled_shape(rng, operand.shape))
        else:
            result = call.results[i - len(call.operands)]
            shape = spoiled_shape(rng, result.shape)
            call.results[i - len(call.operands)] = jax.ShapeDtypeStruct(shape, result.dtype)


def spoil_dtype(rng: np.random.Generator, call: Call) -> None:
    """Changes the dtype of one buffer."""
    i = int(rng.integers(len(call.operands) + len(call.results)))
    dtype = np.dtype(str(rng.choice(DTYPES)))
    if i < len(call.operands):
        call.operands[i] = np.zeros(np.shape(call.operands[i]), dtype)
    else:
        i -= len(call.operands)
        call.results[i] = jax.ShapeDtypeStruct(call.results[i].shape, dtype)


def spoil_batch(rng: np.random.Generator, call: Call) -> None:
    """Empties the batch, so that any other size costs nothing."""
    size = int(rng.choice(WILD_SIZES))
    axis = int(rng.integers(3))

    def huge(shape: tuple[int, ...]) -> tuple[int, ...]:
        dims = [0, *shape]
        if len(dims) > axis > 0:
            dims[axis] = size
        return tuple(dims)

    call.operands = [np.zeros(huge(np.shape(x)), np.asarray(x).dtype) for x in call.operands]
    call.results = [jax.ShapeDtypeStruct(huge(x.shape), x.dtype) for x in call.results]
    if "n_logical" in call.attributes and axis == 1:
        call.attributes["n_logical"] = np.int64(size - 1)


def spoil_attributes(rng: np.random.Generator, call: Call) -> None:
    """Changes the value or type of an attribute, removes one or adds one."""
    name = str(rng.choice([*call.attributes, "other"]))
    kind = rng.integers(5)
    if kind == 0:
        call.attributes.pop(name, None)
    elif kind == 1:
        call.attributes[name] = [np.int32(1), np.float32(1), "1", True][rng.integers(4)]
    else:
        call.attributes[name] = np.int64(rng.choice(WILD_ATTRIBUTES))


def spoil_count(rng: np.random.Generator, call: Call) -> None:
    """Removes or adds one buffer."""
    buffers = [call.operands, call.results][rng.integers(2)]
    if rng.integers(2) and len(buffers) > 1:
        buffers.pop(int(rng.integers(len(buffers))))
    elif buffers is call.operands:
        buffers.append(np.zeros(3, np.int32))
    else:
        buffers.append(jax.ShapeDtypeStruct((3,), jnp.int32))


SPOILERS = [
    spoil_values,
    spoil_values,
    spoil_shape,
    spoil_shape,
    spoil_dtype,
    spoil_batch,
    spoil_attributes,
    spoil_count,
]


def check(call: Call, only_values: bool) -> None:
    """Raises unless the call ends in one of our error messages or in the specified result."""
    try:
        results = call.run()
    except Exception as error:  # ValueError or JaxRuntimeError, by the error's code
        if "lplb_jax: " not in str(error):
            raise
        values = ("r2o: expected a permutation", "rank: expected 0 to")
        if only_values and not any(f"lplb_jax: {words}" in str(error) for words in values):
            raise
        return
    if not call.operands or call.operands[0].shape[:1] == (0,):
        return
    if all(result.size == 0 for result in results):
        return  # XLA creates empty results without a call.
    expected = call.expected()
    for result, value in zip(results, expected, strict=False):
        assert (result.shape, result.dtype) == (value.shape, value.dtype), (result, value)
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(result, value)


def main() -> None:
    seed, n_calls = map(int, sys.argv[1:])
    cases = some_cases(np.random.default_rng(seed))
    for number in range(n_calls):
        rng = np.random.default_rng([seed, number])
        call = valid_call(rng, cases[number % len(cases)])
        spoilers = (
            [] if number % 8 == 0 else list(rng.choice(SPOILERS, rng.integers(1, 3), replace=False))
        )
        spoilers.sort(key=lambda spoil: spoil is spoil_batch)  # last: only empty batches are huge
        print(number, call.target, *[spoil.__name__ for spoil in spoilers], file=sys.stderr)
        sys.stderr.flush()
        for spoil in spoilers:
            spoil(rng, call)
        try:
            check(call, all(spoil is spoil_values for spoil in spoilers))
        except Exception as error:
            raise AssertionError(f"call {number} of seed {seed}: {call}") from error


if __name__ == "__main__":
    main()
