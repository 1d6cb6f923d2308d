"""Chooses the transport of a call: the requested one, or the best available."""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax

from lplb_jax._native import warn_once
from lplb_jax.comm import Comm
from lplb_jax.moe.collectives import Collective, Padded
from lplb_jax.moe.peer import Peer
from lplb_jax.moe.plan import Transport
from lplb_jax.moe.ragged import Ragged

WeightTransport = Literal["auto", "padded", "ragged"]
TokenTransport = Literal["auto", "padded", "ragged", "peer"]
COLLECTIVES: dict[str, Collective] = {one.name: one for one in (Padded(), Ragged())}


def choose_for_tokens(
    transport: str,
    tokens: jax.Array,
    gates: jax.Array,
    *,
    axis_name: Any,
    n_ranks: int,
    capacity: int,
    comm: Comm | None,
) -> Transport:
    """ "peer" if requested or if `comm` is ready for it; otherwise the choice of `choose`."""
    if transport not in get_args(TokenTransport):
        names = ", ".join(get_args(TokenTransport))
        raise ValueError(f"transport: expected one of {names}, got {transport!r}")
    asked = transport == Peer.name
    if asked or (transport == "auto" and comm is not None and comm.window is not None):
        peer = Peer(comm)
        reason = peer.why_not(tokens, gates, axis_name, capacity)
        if reason is None:
            return peer
        if asked:
            raise ValueError(reason)
        warn_once(f"tokens do not travel by transport 'peer', which is faster: {reason}")
    return choose(transport, n_ranks)


def choose(transport: str, n_ranks: int) -> Collective:
    """The requested collective, or the best available; all processes choose alike."""
    if transport not in get_args(WeightTransport):
        names = ", ".join(get_args(WeightTransport))
        raise ValueError(f"transport: expected one of {names}, got {transport!r}")
    if transport == "auto":
        return _best()
    chosen = COLLECTIVES[transport]
    # JAX does not tell which processes an axis spans; if one process could hold it, assume it does.
    if jax.process_count() > 1 and n_ranks > jax.local_device_count():
        reason = chosen.why_not_here()
        if reason is not None:
            raise ValueError(
                f"transport: expected 'padded' or 'auto', got {transport!r}, which {n_ranks} ranks "
                f"of several processes cannot have: {reason}"
            )
    return chosen


def _best() -> Collective:
    if jax.default_backend() != "gpu":
        return COLLECTIVES["padded"]
    reason = COLLECTIVES["ragged"].why_not_here()
    if reason is None:
        return COLLECTIVES["ragged"]
    warn_once(
        f"tokens go by lax.all_to_all and not by lax.ragged_all_to_all, which is faster, between "
        f"processes: {reason}; init_comm with max_tokens and hidden_bytes gives transport 'peer', "
        f"which is faster than both"
    )
    return COLLECTIVES["padded"]


def for_weights(transport: Transport, n_ranks: int) -> Collective:
    """The collective that moves experts when this transport moves tokens."""
    return transport if isinstance(transport, Collective) else choose("auto", n_ranks)
