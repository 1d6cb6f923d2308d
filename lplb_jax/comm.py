"""Communicators: how the ranks of an expert-parallel axis share counts, and exchange tokens."""

from __future__ import annotations

import atexit
import collections
import contextlib
import dataclasses
import itertools
import math
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.sharding import Mesh

from lplb_jax import _native, _nvshmem
from lplb_jax._axes import axis_names, check_axis_names
from lplb_jax._problem import check_count
from lplb_jax._rendezvous import Rendezvous

Transport = Literal["auto", "xla", "p2p", "nvshmem", "nvshmem_put"]
TRANSPORTS = get_args(Transport)

_NO_MODULE = (
    "lplb_jax was installed without its CUDA module; reinstall it in its source tree with: "
    "LPLB_CUDA=pypi pip install --force-reinstall --no-deps ."
)

_MOST_CHOICES = 32  # a lane of a warp each
_MOST_COLUMNS, _MOST_RANKS = 32, 512  # of copies that engines move, see cuda/flight.h
_MOST_SECONDS = 1e9  # in nanoseconds they fit in 64 bits

# Programs hold a communicator's identifier only: what they use of it must live until it is closed.
_connected: dict[int, Comm] = {}
_made: collections.Counter[tuple[int, ...]] = collections.Counter()  # with these processes
_last_identifier = 0


@dataclasses.dataclass(frozen=True)
class Windows:
    """The memory of a rank that the others write tokens to; see cuda/exchange.h.

    Attributes:
      n_ranks: ranks of a group.
      n_tokens: tokens from or for other ranks that it has room for, twice.
      top_k: choices of a token, at most.
      row_bytes: bytes of a token, at most; a multiple of 16.
    """

    n_ranks: int
    n_tokens: int
    top_k: int
    row_bytes: int

    @property
    def shape(self) -> list[int]:
        """What native code takes."""
        return [self.n_ranks, self.n_tokens, self.top_k, self.row_bytes]

    @property
    def n_bytes(self) -> int:
        """Of a window."""
        return _native.built_cuda().comm_window_bytes(self.shape)

    @property
    def put_bytes(self) -> int:
        """Of a window that the others reach by put, and of what this rank packs for theirs."""
        return _native.built_cuda().comm_put_window_bytes(self.shape)


class Comm:
    """The result of `init_comm`, to pass as `comm=`. As a context manager it closes itself.

    Attributes:
      transport: "xla", "p2p", "nvshmem" or "nvshmem_put".
      axis: the mesh axis, or a tuple of axes.
      size: ranks of a group, the size of that axis.
      max_experts: the largest n_logical it can be used with.
      timeout_s: how long a rank waits for the others before the call fails.
      identifier: the same in all processes; 0 with transport "xla".
      window: memory for tokens that ranks exchange, or None.
      sms: SMs that may move tokens, 0 for all.
      copy_bytes: room for copies of experts that a rank receives at once.
      closed: whether `close` was called.
    """

    def __init__(
        self,
        transport: str,
        axis: str | tuple[str, ...],
        size: int,
        *,
        max_experts: int,
        timeout_s: float,
        identifier: int,
        window: Windows | None = None,
        sms: int = 0,
        copy_bytes: int = 0,
        members: Sequence[tuple[int, int]] = (),
        release: Callable[[bool], None] = lambda failed: None,
    ):
        self.transport = transport
        self.axis = axis
        self.size = size
        self.max_experts = max_experts
        self.timeout_s = timeout_s
        self.identifier = identifier
        self.window = window
        self.sms = sms
        self.copy_bytes = copy_bytes
        self._members = members  # (device, rank) of this process
        self._routes: dict[str, int] = {}
        self._routing = threading.Lock()
        self._release = release
        self.closed = False

    def __repr__(self) -> str:
        closed = ", closed" if self.closed else ""
        return (
            f"Comm(transport={self.transport!r}, axis={self.axis!r}, size={self.size}, "
            f"max_experts={self.max_experts}{closed})"
        )

    def __enter__(self) -> Comm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def most_slots(self) -> int:
        """The most slots whose counts are exchanged by the kernel that plans an exchange."""
        return _most_counts(self.max_experts, self.window)

    @property
    def fuses(self) -> bool:
        """Whether the kernels of `rebalance` exchange counts themselves."""
        return self.transport in ("p2p", "nvshmem")

    def route(self, to: list[list[int]], origin: list[list[int]]) -> int:
        """The number of a route of copies: every rank's receivers and senders, column by column."""
        if len(to[0]) > _MOST_COLUMNS:
            raise ValueError(
                f"r2o: expected at most {_MOST_COLUMNS} columns with copy_bytes in init_comm, got "
                f"{len(to[0])}; leave copy_bytes out"
            )
        key = str((to, origin))
        with self._routing:
            if key not in self._routes:
                for device, rank in self._members:
                    ranks = to[rank], origin[rank]
                    _native.built_cuda().comm_add_route(self.identifier, device, *ranks)
                self._routes[key] = len(self._routes)
            return self._routes[key]

    def failure(self) -> str | None:
        """The failure on this process's devices, if any.

        After a failure every later program that uses the communicator raises the same message
        (`DEADLINE_EXCEEDED`); this method does not need to run one.
        """
        if self.closed or self.transport == "xla":
            return None
        return _native.built_cuda().comm_failure(self.identifier) or None

    def close(self) -> None:
        """Waits for the devices and frees the buffers. Programs that use it afterwards raise.

        The buffers live until then, or until the process ends. With NVSHMEM all processes must call
        it; after a failure in one of them, or if one does not call it within `timeout_s`, NVSHMEM's
        memory is not freed.
        """
        if not self.closed:
            failed = self.failure() is not None
            self.closed = True
            _connected.pop(self.identifier, None)
            self._release(failed)


def init_comm(
    mesh: Mesh,
    axis: str | tuple[str, ...] = "ep",
    *,
    max_experts: int,
    transport: Transport = "auto",
    timeout_s: float = 30.0,
    max_tokens: int = 0,
    hidden_bytes: int = 0,
    top_k: int = 8,
    capacity_factor: float = 1.25,
    sms: int = 0,
    copy_bytes: int = 0,
) -> Comm:
    """Connects the ranks of a mesh axis, so that the kernels of `rebalance` exchange counts.

    Call it outside `jax.jit`, in every process of the mesh, and in the same order if there are
    several communicators of the same processes. Each row of the mesh along `axis` is its own group.
    Compiled programs refer to the communicator: keep it open, and close it when they are done.

    | transport | for |
    |---|---|
    | "p2p" | one process with several GPUs that can write to each other's memory |
    | "nvshmem" | one process per GPU, see `jax.distributed`; needs nvidia-nvshmem-cu13 |
    | "nvshmem_put" | the same through NVSHMEM's put with signal, in separate kernels; used for
      "nvshmem" if a GPU cannot map another one's memory, as on another host |
    | "xla" | everything else: `lax.all_gather` |
    | "auto" | on GPUs the first that works, otherwise "xla" with a warning that says why |

    Args:
      mesh: the `jax.sharding.Mesh` that the programs will run on.
      axis: the expert-parallel axis, or a tuple of axes (the last one fastest).
      max_experts: the largest number of logical experts it will be used with. Every rank gets a
        buffer of 16 bytes · ranks · (max_experts + 1), twice that with max_tokens.
      transport: one of the above. If none is available, "auto" uses "xla"; other values raise. All
        processes make the same choice.
      timeout_s: seconds, at most 10⁹, after which a rank gives up waiting for the others, here and
        in a kernel. A kernel that gives up sets `Status.SYNC_FAILED`, and the next use of the
        communicator raises `DEADLINE_EXCEEDED` which names the waiting and the missing ranks.
      max_tokens: the most tokens per rank that `moe` exchanges with transport "peer"; 0 for none.
        Every rank then allocates twice what it can receive from or send to others:
        2 · max_tokens · min(ranks − 1, ⌈top_k · capacity_factor⌉) · hidden_bytes, plus a few per
        cent; twice as much with "nvshmem_put", and nothing with "xla".
      hidden_bytes: the most bytes of a token, or of an expert's result for it if that is larger;
        with bfloat16 twice the hidden size.
      top_k: the most choices of a token; up to 32.
      capacity_factor: the largest one that `moe_layer` will be called with.
      sms: SMs that may move tokens; 0 for all. About 32 saturate NVLink; concurrent kernels get
        the others.
      copy_bytes: the most bytes of copies of experts that a rank receives in a layer; 0 for none.
        Every rank allocates twice as much. Copy engines then move the copies along a topology and
        their gradients while tokens travel with transport "peer", also between processes. Without
        effect for "nvshmem_put" and "xla".

    Returns:
      A `Comm`.

    Raises:
      TypeError, ValueError: an argument is not as described.
      RuntimeError: `transport` is not available; the message says why and what to do.
      TimeoutError: another process did not respond.

    Source: a one-shot all-gather by remote writes of (epoch, count) words, as in NCCL's LL
    protocol; `cuda/sync.h` explains why two slots suffice.

    >>> mesh = jax.sharding.Mesh(jax.devices()[:1], "ep")
    >>> with init_comm(mesh, "ep", max_experts=256, transport="xla") as comm:
    ...     comm.transport, comm.size
    ('xla', 1)
    """
    groups = _groups(mesh, axis)
    max_experts = check_count("max_experts", max_experts)
    if transport not in TRANSPORTS:
        raise ValueError(f"transport: expected one of {', '.join(TRANSPORTS)}, got {transport!r}")
    if not isinstance(timeout_s, int | float) or not 0 < timeout_s <= _MOST_SECONDS:
        raise ValueError(
            f"timeout_s: expected a positive number of seconds, at most {_MOST_SECONDS:g}, got "
            f"{timeout_s!r}"
        )
    windows = _windows(groups.shape[1], max_tokens, hidden_bytes, top_k, capacity_factor)
    if not isinstance(sms, int) or sms < 0:
        raise ValueError(f"sms: expected a number of SMs, or 0 for all, got {sms!r}")
    if not isinstance(copy_bytes, int | np.integer) or copy_bytes < 0:
        raise ValueError(f"copy_bytes: expected a number of bytes, or 0, got {copy_bytes!r}")
    if copy_bytes and windows is None:
        raise ValueError(
            f"max_tokens: expected a positive number with copy_bytes = {copy_bytes}, got 0"
        )
    if copy_bytes and groups.shape[1] > _MOST_RANKS:
        raise ValueError(
            f"copy_bytes: expected 0 with more than {_MOST_RANKS} ranks, got {copy_bytes} with "
            f"{groups.shape[1]}"
        )
    members: list[tuple[int, int]] = []
    common: dict[str, Any] = {"max_experts": max_experts, "timeout_s": float(timeout_s)}

    def by_xla() -> Comm:
        return Comm("xla", axis, groups.shape[1], identifier=0, sms=sms, **common)

    on_gpus = _on_gpus(groups)
    if transport == "xla" or (transport == "auto" and not on_gpus):
        return by_xla()
    processes = sorted({device.process_index for device in groups.flat})
    chosen = transport if transport != "auto" else "p2p" if len(processes) == 1 else "nvshmem"
    rendezvous = _meeting(processes, timeout_s)
    identifier = _new_identifier(rendezvous)
    probe, connect = (
        (_probe_p2p, _connect_p2p) if chosen == "p2p" else (_probe_nvshmem, _connect_nvshmem)
    )
    reason = rendezvous.first_reason(probe(groups) if on_gpus else "the mesh has no GPUs")
    if reason is None:
        stride = _most_counts(max_experts, windows) + 1
        inboxes = _Inboxes(identifier, groups.shape[1], stride, float(timeout_s), windows)
        inboxes = dataclasses.replace(inboxes, copy_bytes=int(copy_bytes), members=members)
        try:
            chosen, release = connect(groups, inboxes, rendezvous, chosen)
        except _CannotConnect as error:
            reason = str(error)
        else:
            comm = Comm(
                chosen,
                axis,
                groups.shape[1],
                identifier=identifier,
                window=windows,
                sms=sms,
                copy_bytes=int(copy_bytes) if chosen != "nvshmem_put" else 0,
                members=members,
                release=release,
                **common,
            )
            _connected[identifier] = comm
            return comm
    if transport != "auto":
        raise RuntimeError(f"transport: {transport!r} is not available: {reason}")
    warnings.warn(
        f"comm: loads are exchanged by lax.all_gather, which is slower: {reason}", stacklevel=2
    )
    return by_xla()


def _meeting(processes: list[int], timeout_s: float) -> Rendezvous:
    """Of these processes for their next communicator, which they all make in the same order."""
    key = tuple(processes)
    _made[key] += 1
    name = f"lplb_jax/comm/{','.join(map(str, processes))}/{_made[key]}"
    return Rendezvous(name, processes, timeout_s)


def _new_identifier(rendezvous: Rendezvous) -> int:
    """One that no process of the meeting has used. A program has the same one everywhere."""
    global _last_identifier
    proposals = rendezvous.exchange("identifier", str(_last_identifier + 1))
    _last_identifier = max(map(int, proposals))
    return _last_identifier


@atexit.register
def _close_all() -> None:
    """While CUDA is still there. Of what NVSHMEM's processes must free together, nothing."""
    for comm in list(_connected.values()):
        if comm.transport == "p2p":
            comm.close()


def _most_counts(max_experts: int, windows: Windows | None) -> int:
    """Of experts, or where tokens are exchanged, too, of slots."""
    return max_experts if windows is None else 2 * max_experts


def _windows(
    n_ranks: int, max_tokens: Any, hidden_bytes: Any, top_k: Any, capacity_factor: Any
) -> Windows | None:
    if not isinstance(max_tokens, int | np.integer) or max_tokens < 0:
        raise ValueError(f"max_tokens: expected a number of tokens, or 0, got {max_tokens!r}")
    if max_tokens == 0:
        if hidden_bytes:
            raise ValueError(
                f"max_tokens: expected a positive number with hidden_bytes = {hidden_bytes!r}, "
                f"got 0"
            )
        return None
    hidden_bytes, top_k = check_count("hidden_bytes", hidden_bytes), check_count("top_k", top_k)
    if top_k > _MOST_CHOICES:
        raise ValueError(f"top_k: expected at most {_MOST_CHOICES}, got {top_k}")
    if not isinstance(capacity_factor, int | float) or not 1 <= capacity_factor < math.inf:
        raise ValueError(
            f"capacity_factor: expected a number of at least 1, got {capacity_factor!r}"
        )
    # What a rank can receive is at most what others have, and the capacity, which is a multiple of
    # 8; what it sends, its tokens for every rank that can serve them.
    received = min((n_ranks - 1) * max_tokens, math.ceil(max_tokens * top_k * capacity_factor) + 8)
    sent = max_tokens * min(n_ranks - 1, top_k)
    return Windows(n_ranks, max(received, sent), top_k, -(-hidden_bytes // 16) * 16)


def check_comm(comm: Any, axis_name: Any, n_logical: int) -> None:
    """Raises at trace time where a communicator does not fit a call."""
    if comm is None:
        return
    if not isinstance(comm, Comm):
        raise TypeError(f"comm: expected a Comm from init_comm, got {type(comm).__name__}")
    if comm.closed:
        raise ValueError("comm: it is closed; make a new one with init_comm")
    if axis_names(axis_name) != axis_names(comm.axis):
        raise ValueError(f"axis_name: expected {comm.axis!r}, the axis of comm, got {axis_name!r}")
    if n_logical > comm.max_experts:
        raise ValueError(
            f"comm: it was made for max_experts = {comm.max_experts}, got {n_logical} experts; "
            f"raise max_experts in init_comm"
        )


def _groups(mesh: Any, axis: Any) -> np.ndarray:
    """The mesh's devices `[n_groups, size]`; along a row, ranks as lax.axis_index counts them."""
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh: expected a jax.sharding.Mesh, got {type(mesh).__name__}")
    names = check_axis_names("axis", axis)
    if not set(names) <= set(mesh.axis_names):
        raise ValueError(f"axis: expected axes of the mesh, {mesh.axis_names}, got {axis!r}")
    places = [mesh.axis_names.index(name) for name in names]
    devices = np.moveaxis(mesh.devices, places, range(-len(places), 0))
    return devices.reshape(-1, math.prod(mesh.devices.shape[place] for place in places))


def _on_gpus(groups: np.ndarray) -> bool:
    return {device.platform for device in groups.flat} == {"gpu"}


def _probe_p2p(groups: np.ndarray) -> str | None:
    """Why peer memory cannot be used, or None."""
    native = _native.cuda()
    if native is None:
        return _NO_MODULE
    here = jax.process_index()
    if any(device.process_index != here for device in groups.flat):
        return "the mesh spans several processes, whose memory peers cannot map: use 'nvshmem'"
    for group in groups:
        for a, b in itertools.permutations([device.local_hardware_id for device in group], 2):
            if not native.comm_can_access(a, b):
                return f"GPU {a} has no peer access to GPU {b}"
    return None


class _CannotConnect(Exception):
    """Raised by all processes alike."""


@dataclasses.dataclass(frozen=True)
class _Inboxes:
    """What every rank's inbox is attached with; see cuda/sync.h."""

    identifier: int
    size: int
    stride: int
    timeout_s: float
    windows: Windows | None
    copy_bytes: int = 0
    members: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    @property
    def hangar_bytes(self) -> int:
        """Room for two flights of copies."""
        return _native.built_cuda().comm_hangar_bytes(self.copy_bytes)

    @property
    def n_bytes(self) -> int:
        return _native.built_cuda().comm_inbox_bytes(self.size, self.stride)

    def attach(self, ordinal: int, rank: int, inboxes: list[int]) -> None:
        options = (self.stride, self.timeout_s)
        _native.built_cuda().comm_attach(self.identifier, ordinal, rank, inboxes, *options)
        self.members.append((ordinal, rank))

    def attach_windows(self, ordinal: int, windows: list[int]) -> None:
        assert self.windows is not None
        _native.built_cuda().comm_attach_windows(
            self.identifier, ordinal, windows, self.windows.shape
        )

    def attach_put_windows(self, ordinal: int, library: int, window: int) -> None:
        assert self.windows is not None
        _native.built_cuda().comm_attach_put_windows(
            self.identifier, ordinal, library, window, self.windows.shape
        )

    def attach_hangars(self, ordinal: int, hangars: list[int]) -> None:
        _native.built_cuda().comm_attach_hangars(
            self.identifier, ordinal, hangars, self.hangar_bytes
        )


# The transport, and what frees it; the argument tells whether it has failed.
Connection = tuple[str, Callable[[bool], None]]


def _connect_p2p(groups: np.ndarray, made: _Inboxes, _: Rendezvous, __: str) -> Connection:
    native = _native.built_cuda()
    owned: list[Any] = []

    def release(_: bool) -> None:
        try:
            native.comm_detach(made.identifier)
        finally:
            owned.clear()

    def window(ordinal: int, n_bytes: int) -> int:
        owned.append(native.Window(ordinal, n_bytes))
        return owned[-1].address

    def connect(ordinals: list[int]) -> None:
        for a, b in itertools.permutations(ordinals, 2):
            native.comm_enable_peer(a, b)
        inboxes = [window(ordinal, made.n_bytes) for ordinal in ordinals]
        for rank, ordinal in enumerate(ordinals):
            made.attach(ordinal, rank, inboxes)
        if made.windows is not None:
            windows = [window(ordinal, made.windows.n_bytes) for ordinal in ordinals]
            for ordinal in ordinals:
                made.attach_windows(ordinal, windows)
        if made.copy_bytes:
            hangars = [window(ordinal, made.hangar_bytes) for ordinal in ordinals]
            for ordinal in ordinals:
                made.attach_hangars(ordinal, hangars)

    with contextlib.ExitStack() as on_error:
        on_error.callback(release, True)
        for group in groups:
            connect([device.local_hardware_id for device in group])
        on_error.pop_all()
    return "p2p", release


def _probe_nvshmem(groups: np.ndarray) -> str | None:
    """Why NVSHMEM cannot be used, or None."""
    if _native.cuda() is None:
        return _NO_MODULE
    here = [device for device in groups.flat if device.process_index == jax.process_index()]
    if len(here) != 1:
        return f"NVSHMEM takes one GPU per process, and this one has {len(here)} of the mesh"
    return _nvshmem.missing()


def _connect_nvshmem(
    groups: np.ndarray, made: _Inboxes, rendezvous: Rendezvous, transport: str
) -> Connection:
    native = _native.built_cuda()
    (mine,) = [device for device in groups.flat if device.process_index == jax.process_index()]
    ordinal = mine.local_hardware_id
    # NVSHMEM takes the GPU of the current context.
    _together(rendezvous, lambda: native.comm_use_device(ordinal))
    job = _together(rendezvous, lambda: _nvshmem.join(ordinal, rendezvous))
    word = 8
    staging = made.n_bytes
    signals = staging + 2 * made.stride * word
    inbox = job.allocate(signals + made.size * word)
    numbers = map(int, rendezvous.exchange("pe", str(job.pe)))
    pe_of_process = dict(zip(rendezvous.processes, numbers, strict=True))
    (group,) = [group for group in groups if mine in group]
    pes = [pe_of_process[device.process_index] for device in group]
    inboxes = [inbox if pe == job.pe else job.pointer(inbox, pe) for pe in pes]
    if transport == "nvshmem" and any(map(int, rendezvous.exchange("far", str(int(0 in inboxes))))):
        transport = "nvshmem_put"
    elif transport == "nvshmem_put":
        inboxes = [inbox if pe == job.pe else 0 for pe in pes]
    put_library = None
    try:
        if transport == "nvshmem_put":
            put_library = _together(rendezvous, lambda: job.put_library)
    except _CannotConnect:
        job.free(inbox)
        raise
    symmetric_memory = [inbox]

    def symmetric(n_bytes: int) -> int:
        symmetric_memory.append(job.allocate(n_bytes))
        return symmetric_memory[-1]

    def mapped(memory: int) -> list[int]:
        return [memory if pe == job.pe else job.pointer(memory, pe) for pe in pes]

    def attach() -> None:
        made.attach(ordinal, list(group).index(mine), inboxes)
        if put_library is not None:
            words = (inbox, inbox + staging, inbox + signals)
            native.comm_attach_put(made.identifier, ordinal, put_library, pes, *words)
            if made.windows is not None:
                window = symmetric(made.windows.put_bytes)
                made.attach_put_windows(ordinal, put_library, window)
        else:
            if made.windows is not None:
                made.attach_windows(ordinal, mapped(symmetric(made.windows.n_bytes)))
            if made.copy_bytes:
                made.attach_hangars(ordinal, mapped(symmetric(made.hangar_bytes)))
        rendezvous.exchange("attached", "")  # Nobody writes to an inbox that is not cleared.

    def release(failed: bool) -> None:
        native.comm_detach(made.identifier)
        # To free is to wait for all others, who do not come if they have failed.
        if not _fails_somewhere(rendezvous, failed, made.timeout_s):
            for memory in reversed(symmetric_memory):
                job.free(memory)

    with contextlib.ExitStack() as on_error:
        on_error.callback(native.comm_detach, made.identifier)
        attach()
        on_error.pop_all()
    return transport, release


def _fails_somewhere(rendezvous: Rendezvous, failed: bool, timeout_s: float) -> bool:
    """Whether a process's communicator has failed, or is not closed in time."""
    if failed:
        rendezvous.say("close", "1")
        return True
    try:
        return "1" in rendezvous.exchange("close", "0")
    except TimeoutError:
        _native.warn_once(
            f"comm: NVSHMEM's memory is not freed, since not every process of the mesh closed the "
            f"communicator within {timeout_s:g} s"
        )
        return True


def _together(rendezvous: Rendezvous, step: Callable[[], Any]) -> Any:
    """What `step` returns; where it fails in one process, all raise for its reason."""
    result, reason = None, None
    try:
        result = step()
    except RuntimeError as error:
        reason = str(error)
    first = rendezvous.first_reason(reason)
    if first is not None:
        raise _CannotConnect(first)
    return result
