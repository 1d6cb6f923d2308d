"""Bits of `Split.status`."""

import enum


class Status(enum.IntFlag):
    """What there is to report about a solve besides its result.

    0 means clean input and a proven result: `max_load` is at most 1e-4 of itself above
    `lower_bound`, which no split can go below. Tokens (int32 loads) reach the integer optimum
    itself, by the exact solver and by the interior point with `repair=True`: `max_load` equals
    `lower_bound`, to float32's rounding where ranks are weighted.

    >>> Status(6)
    <Status.NEGATIVE_LOAD|LOAD_OVERFLOW: 6>
    """

    INVALID_INDEX = 1
    """An index was neither an expert nor −1; it was treated as −1. Set in all groups."""
    NEGATIVE_LOAD = 2
    """A load of this group was negative, or no number; it counted as 0."""
    LOAD_OVERFLOW = 4
    """A rank could receive more than 2³¹ − 1 tokens or, with float32 loads, a load or load / weight
    above 3.4e38. Nothing was moved in this group, `max_load` is 2³¹ − 1 (infinity with float32
    loads) and `lower_bound` 0; an expert's infinite load counts as the largest float32."""
    BAD_PLACEMENT = 8
    """phy2log, log2phy and r2o contradict one another: the quotas of this group mean nothing."""
    NOT_CONVERGED = 16
    """The interior point's `max_load` is more than 1e-4 of itself above `lower_bound`: it stopped
    short (loads or weights that differ by more than float32 can resolve), or `repair=False` and
    rounding to tokens cost that much. Or the rank weights could not be taken as given: one was not
    positive and finite, and all count as equal, or it was below 2⁻⁴⁰ (9e-13) of the largest, and
    counts as that. The split is legal, and `lower_bound` holds for the weights as they count."""
    SYNC_FAILED = 32
    """Another rank's counts did not come in time (see `init_comm`): every token got −1 and every
    quota 0. Set in all groups; the communicator's next use raises."""
