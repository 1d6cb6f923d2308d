"""Simulated chips, to test launches for chips that are not present."""

from lplb_jax import _native

# Compute capability, shared memory per block, largest cluster, dependent launch.
CHIPS = {
    "A100": (80, 166_912, 0, False),
    "RTX 3090": (86, 101_376, 0, False),
    "L40": (89, 101_376, 0, False),
    "H100": (90, 232_448, 16, True),
    "a part of an H100": (90, 232_448, 8, True),
    "H100, code for the A100": (90, 232_448, 0, False),
    "B200": (100, 232_448, 16, True),
    "RTX 5090": (120, 101_376, 8, True),
}


def chip(capability, shared_bytes, largest_cluster, dependent_launch):
    return _native.built_cuda().Device(
        capability=capability,
        shared_bytes=shared_bytes,
        largest_cluster=largest_cluster,
        dependent_launch=dependent_launch,
    )
