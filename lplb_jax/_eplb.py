"""EPLB, DeepSeek's expert-parallel load balancer, as published: copies by load, then packing."""

from __future__ import annotations

import heapq

import numpy as np


def eplb(
    weight: np.ndarray, ep_size: int, slots_per_rank: int, n_groups: int = 1, n_nodes: int = 1
) -> np.ndarray:
    """The experts of the slots, int32 `[ep_size, slots_per_rank]`, for loads `[n_logical]`.

    If groups of experts divide evenly among the nodes, groups are packed onto nodes, and each node
    copies and packs its own experts (hierarchical); otherwise all ranks are one node (global).
    """
    # In float32, as published: rounding decides between almost equal loads. Powers of two do not
    # change that, and keep loads in any unit within the type's range.
    weight = np.ldexp(weight, -np.frexp(weight.max())[1]).astype(np.float32)
    if n_groups % n_nodes:
        n_groups = n_nodes = 1
    groups = np.arange(len(weight)).reshape(n_groups, -1)
    return np.concatenate(
        [
            _place_node(weight, groups[node].ravel(), ep_size // n_nodes, slots_per_rank)
            for node in _packed(weight[groups].sum(axis=1), n_nodes)
        ]
    ).astype(np.int32)


def _place_node(
    weight: np.ndarray, experts: np.ndarray, n_ranks: int, slots_per_rank: int
) -> np.ndarray:
    """Gives every remaining slot to the expert with the most load per copy."""
    weight = weight[experts]
    copies = np.ones(len(experts), np.float32)
    of_slot = list(range(len(experts)))
    heaviest = [(-share, expert) for expert, share in enumerate(weight.tolist())]
    heapq.heapify(heaviest)
    while len(of_slot) < n_ranks * slots_per_rank:
        expert = heaviest[0][1]
        of_slot.append(expert)
        copies[expert] += 1
        heapq.heapreplace(heaviest, (-float(weight[expert] / copies[expert]), expert))
    return experts[np.array(of_slot)[_packed((weight / copies)[of_slot], n_ranks)]]


def _packed(weight: np.ndarray, n_packs: int) -> np.ndarray:
    """`pack`, except that packs of one item keep their order, as published."""
    if len(weight) == n_packs:
        return np.arange(n_packs)[:, None]
    return pack(weight, n_packs)


def pack(weight: np.ndarray, n_packs: int) -> np.ndarray:
    """The items of every pack, `[n_packs, items]`: heaviest first, to the lightest with room."""
    per_pack = len(weight) // n_packs
    packs: list[list[int]] = [[] for _ in range(n_packs)]
    lightest = [(weight.dtype.type(0), k) for k in range(n_packs)]
    for item in np.argsort(-weight, kind="stable").tolist():
        total, k = lightest[0]
        packs[k].append(item)
        if len(packs[k]) < per_pack:
            heapq.heapreplace(lightest, (total + weight[item], k))
        else:
            heapq.heappop(lightest)
    return np.array(packs)
