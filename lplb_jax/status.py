"""Bits of `Split.status`."""

import enum


class Status(enum.IntFlag):
    """What a solve has to say besides its result; 0 is a proven optimum of clean input.

    >>> Status(6)
    <Status.NEGATIVE_LOAD|LOAD_OVERFLOW: 6>
    """

    INVALID_INDEX = 1
    """An index was neither an expert nor −1; it was treated as −1. Set in all groups."""
    NEGATIVE_LOAD = 2
    """A load of this group was negative, or no number; it counted as 0."""
    LOAD_OVERFLOW = 4
    """A rank could receive more than 2³¹ − 1 tokens, or an infinite load: nothing was moved in this
    group, max_load is 2³¹ − 1 (infinity where it is a float) and lower_bound 0."""
    BAD_PLACEMENT = 8
    """phy2log, log2phy and r2o contradict one another: the quotas of this group mean nothing."""
    NOT_CONVERGED = 16
    """The interior point stopped with max_load more than 1e-4 above what it could prove, or the
    rank weights were not all positive and finite and counted as equal. The split is legal."""
    SYNC_FAILED = 32
    """Another rank's counts did not come in time (see `init_comm`): every token got −1 and every
    quota 0. Set in all groups; the communicator's next use raises."""
