"""EPLB, DeepSeek's expert-parallel load balancer, to the letter: copies by load, then packing."""

from __future__ import annotations

import numpy as np


def eplb(
    weight: np.ndarray, ep_size: int, slots_per_rank: int, n_groups: int = 1, n_nodes: int = 1
) -> np.ndarray:
    """The experts of the slots, int32 `[ep_size, slots_per_rank]`, for loads `[n_logical]`.

    If the nodes hold equally many groups of experts, groups are packed onto nodes, and each node
    copies and packs its own experts (hierarchical); else all ranks are one node (global).
    """
    # In float32, as published: rounding decides between loads that are nearly the same.
    weight = weight.astype(np.float32)
    if n_groups % n_nodes:
        n_groups = n_nodes = 1
    groups = np.arange(len(weight)).reshape(n_groups, -1)
    return np.concatenate(
        [
            _place_node(weight, groups[node].ravel(), ep_size // n_nodes, slots_per_rank)
            for node in _pack(weight[groups].sum(axis=1), n_nodes)
        ]
    ).astype(np.int32)


def _place_node(
    weight: np.ndarray, experts: np.ndarray, n_ranks: int, slots_per_rank: int
) -> np.ndarray:
    """Every slot left over goes to the expert with the most load per copy."""
    weight = weight[experts]
    copies = np.ones(len(experts), np.float32)
    of_slot = list(range(len(experts)))
    while len(of_slot) < n_ranks * slots_per_rank:
        heaviest = int(np.argmax(weight / copies))
        of_slot.append(heaviest)
        copies[heaviest] += 1
    return experts[np.array(of_slot)[_pack((weight / copies)[of_slot], n_ranks)]]


def _pack(weight: np.ndarray, n_packs: int) -> np.ndarray:
    """The items of every pack `[n_packs, items]`: heaviest first, onto the lightest with room."""
    per_pack = len(weight) // n_packs
    packs = np.empty((n_packs, per_pack), int)
    if per_pack == 1:
        packs[:, 0] = np.arange(n_packs)
        return packs
    filled = np.zeros(n_packs, int)
    total = np.zeros(n_packs, np.float32)
    for item in np.argsort(-weight, kind="stable"):
        lightest = int(np.argmin(np.where(filled < per_pack, total, np.inf)))
        packs[lightest, filled[lightest]] = item
        filled[lightest] += 1
        total[lightest] += weight[item]
    return packs
