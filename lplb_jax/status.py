"""Bits of `Split.status`."""

import enum


class Status(enum.IntFlag):
    """Conditions that a solve reports besides its result.

    0 means clean input and a proven result: `max_load` is at most 1e-4 of itself above
    `lower_bound`, which no split can go below. Tokens (int32 loads) reach the integer optimum
    itself, with the exact solver and with the interior point and `repair=True`: `max_load` equals
    `lower_bound`, up to float32 rounding if ranks are weighted.

    >>> Status(6)
    <Status.NEGATIVE_LOAD|LOAD_OVERFLOW: 6>
    """

    INVALID_INDEX = 1
    """An index was neither an expert nor −1; it was treated as −1. Set in all groups."""
    NEGATIVE_LOAD = 2
    """A load of this group was negative or NaN; it counted as 0."""
    LOAD_OVERFLOW = 4
    """A rank could receive more than 2³¹ − 1 tokens or, with float32 loads, a load or load / weight
    above 3.4e38. Nothing was moved in this group, `max_load` is 2³¹ − 1 (infinity with float32
    loads) and `lower_bound` 0; an expert's infinite load counts as the largest float32."""
    BAD_PLACEMENT = 8
    """phy2log, log2phy and r2o contradict one another: the quotas of this group are meaningless. In
    `moe_layer`, also: a rank is home of more experts than it has rows for; choices of experts
    without a row are missing in the output, and all others are NaN."""
    NOT_CONVERGED = 16
    """The interior point's `max_load` is more than 1e-4 of itself above `lower_bound`: it stopped
    early (loads or weights differ by more than float32 can resolve), or `repair=False` and rounding
    to tokens cost that much. Or rank weights were adjusted: one was not positive and finite, so all
    count as equal, or one was below 2⁻⁴⁰ (9e-13) of the largest and was raised to that. The split
    is valid, and `lower_bound` holds for the adjusted weights."""
    SYNC_FAILED = 32
    """Another rank's counts did not arrive in time (see `init_comm`), or it has failed: every quota
    is 0, and every token got −1 or, where counts are exchanged by a kernel of their own, its
    expert's home. Set in all groups; the communicator's next use raises."""
