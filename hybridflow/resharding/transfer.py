"""Executes a plan on the ranks of a torch process group, in buckets of bounded size, and counts what it moved.

Every process calls `execute` with the same plan. With n processes there are n - 1 shifts: in shift k process i sends to
i + k and receives from i - k, one bucket after another. All follow the same order of (shift, bucket), so the one that
is furthest behind can always go on and none waits in a circle. A process holds one send and one receive buffer, each of
half a bucket; slices are packed without gaps, so the bytes on the wire are exactly the plan's.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from hybridflow.errors import WeightSyncError
from hybridflow.resharding.buckets import Part, Storages, cut_moves, filled_bytes, pack, unpack, view
from hybridflow.resharding.layout import Layout, dtype_of, refuse_other_tensors
from hybridflow.resharding.plan import Move, Moves, Plan, Slice

DEFAULT_BUCKET_BYTES = 64 << 20
SMALLEST_BUCKET_BYTES = 64
"""Half of it must hold an element of any dtype."""


@dataclass(frozen=True)
class Processes:
    """The process (rank in the process group) of each source and each destination rank."""

    source: Mapping[int, int]
    destination: Mapping[int, int]


@dataclass(frozen=True)
class TransferReport:
    """What one process did: bytes handed to and taken from the process group, bytes copied inside the process, bytes
    of buffers held at once, and the wall clock."""

    bytes_sent: int
    bytes_received: int
    bytes_stayed: int
    num_messages: int
    buffer_bytes: int
    seconds: float


def execute(
    plan: Plan,
    processes: Processes,
    source: Storages,
    destination: Storages,
    group: dist.ProcessGroup | None = None,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    timeout_s: float = 300.0,
) -> TransferReport:
    """Write this process's destination storages from all processes' source storages. Collective over `group`.

    source, destination: storages of the ranks that live in this process. timeout_s: for one bucket. Raises
    WeightSyncError where a tensor is not the layout's, two ranks in one process are planned as if apart (or the other
    way round), a peer fails or is late, or the bytes moved are not the plan's.
    """
    if bucket_bytes < SMALLEST_BUCKET_BYTES:
        raise WeightSyncError(f"transfer: bucket of {bucket_bytes} bytes; at least {SMALLEST_BUCKET_BYTES} are needed")
    began = time.perf_counter()
    me, world = dist.get_rank(group), dist.get_world_size(group)
    _refuse_other_processes(plan, processes, world)
    mine_out = [rank for rank, process in processes.source.items() if process == me]
    mine_in = [rank for rank, process in processes.destination.items() if process == me]
    _refuse_other_tensors(plan.source, mine_out, source, "source")
    _refuse_other_tensors(plan.destination, mine_in, destination, "destination")
    outgoing = _by_peer(plan, plan.between(plan.moves, mine_out, processes.destination), processes, sends=True)
    incoming = _by_peer(plan, plan.between(plan.moves, processes.source, mine_in), processes, sends=False)
    stays = plan.between(plan.stays, mine_out, mine_in)
    _copy_stays(plan, stays, mine_in, source, destination, [move for moves in incoming.values() for move in moves])
    wire = _Wire(group, bucket_bytes // 2 // 16 * 16, timeout_s, _device(source, destination))
    for shift in range(1, world):
        to, of = (me + shift) % world, (me - shift) % world
        wire.exchange(to, outgoing.get(to, []), source, of, incoming.get(of, []), destination)
    report = TransferReport(
        bytes_sent=wire.bytes_sent,
        bytes_received=wire.bytes_received,
        bytes_stayed=int(plan.num_bytes(stays).sum()),
        num_messages=wire.num_messages,
        buffer_bytes=wire.buffer_bytes,
        seconds=time.perf_counter() - began,
    )
    _compare("sent", report.bytes_sent, sum(plan.bytes_sent[rank] for rank in mine_out))
    _compare("received", report.bytes_received, sum(plan.bytes_received[rank] for rank in mine_in))
    return report


def execute_here(plan: Plan, source: Storages, destination: Storages) -> int:
    """The same with all ranks in this process: copies instead of messages. Returns the bytes of the plan's moves."""
    _refuse_other_tensors(plan.source, plan.source.ranks, source, "source")
    _refuse_other_tensors(plan.destination, plan.destination.ranks, destination, "destination")
    moves = plan.as_moves(plan.moves)
    _copy_stays(plan, plan.stays, plan.destination.ranks, source, destination, moves)
    for move in moves:
        _of_move(destination, move.destination, move).copy_(_of_move(source, move.source, move))
    return plan.total_bytes


@dataclass(frozen=True)
class _Message:
    """flat: (bytes,) uint8, part of a buffer. peer: rank in the process group."""

    sends: bool
    peer: int
    flat: Tensor


class _Wire:
    """Sends and receives buckets, and counts the bytes of every message that completed."""

    def __init__(self, group: dist.ProcessGroup | None, half: int, timeout_s: float, device: torch.device) -> None:
        self.group, self.half, self.timeout = group, half, timedelta(seconds=timeout_s)
        self.device = device
        self.bytes_sent = self.bytes_received = self.num_messages = 0
        self._send: Tensor | None = None
        self._receive: Tensor | None = None

    @property
    def buffer_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in (self._send, self._receive) if buffer is not None)

    def exchange(
        self, to: int, outgoing: list[Move], source: Storages, of: int, incoming: list[Move], destination: Storages
    ) -> None:
        """All buckets of one shift; each side may have more than the other, or none."""
        sends, receives = cut_moves(outgoing, self.half), cut_moves(incoming, self.half)
        while True:
            out, into = next(sends, None), next(receives, None)
            if out is None and into is None:
                return
            messages = []
            if out is not None:
                self._send = self._buffer(self._send)
                messages.append(_Message(True, to, self._pack(out, source)))
            if into is not None:
                self._receive = self._buffer(self._receive)
                messages.append(_Message(False, of, self._receive[: filled_bytes(into)]))
            self._complete(messages)
            if into is not None:
                self._unpack(into, destination)

    def _complete(self, messages: list[_Message]) -> None:
        """Posted as one batch, since NCCL would wait in a circle for sends posted before their receives."""
        ops = [
            dist.P2POp(dist.isend if it.sends else dist.irecv, it.flat, group=self.group, group_peer=it.peer)
            for it in messages
        ]
        waiting = messages
        try:
            works = dist.batch_isend_irecv(ops)
            for index, work in enumerate(works):
                waiting = messages[index : index + 1] if len(works) == len(messages) else messages
                work.wait(self.timeout)
        except RuntimeError as error:
            raise _lost(waiting, self.timeout.total_seconds(), error) from error
        self.num_messages += len(messages)
        self.bytes_sent += sum(it.flat.nbytes for it in messages if it.sends)
        self.bytes_received += sum(it.flat.nbytes for it in messages if not it.sends)

    def _buffer(self, buffer: Tensor | None) -> Tensor:
        return torch.empty(self.half, dtype=torch.uint8, device=self.device) if buffer is None else buffer

    def _pack(self, parts: list[Part], source: Storages) -> Tensor:
        assert self._send is not None
        return pack(parts, source, self._send)

    def _unpack(self, parts: list[Part], destination: Storages) -> None:
        assert self._receive is not None
        unpack(parts, self._receive, destination)


def _of_move(storages: Storages, where: Slice, move: Move) -> Tensor:
    return view(storages[where.rank][where.storage], where, move.shape)


def _copy_stays(
    plan: Plan, stays: Moves, ranks: Iterable[int], source: Storages, destination: Storages, incoming: Iterable[Move]
) -> None:
    """Zero the padding and copy what these destination ranks' own memory holds; slices already in place are left.

    A destination tensor may be a source tensor only where nothing in it changes: otherwise slices would be overwritten
    before they are sent.
    """
    theirs = {_memory(tensor) for named in source.values() for tensor in named.values() if tensor.numel()}
    copies = []
    for move in plan.as_moves(stays):
        into = _of_move(destination, move.destination, move)
        out = _of_move(source, move.source, move)
        if into.data_ptr() != out.data_ptr() or into.stride() != out.stride() or into.dtype != out.dtype:
            copies.append((move, into, out))
    for move in (*incoming, *(move for move, _, _ in copies)):
        where = move.destination
        if _memory(destination[where.rank][where.storage]) in theirs:
            raise WeightSyncError(
                f"transfer: destination rank {where.rank}, {where.storage}: its memory is a source tensor's and would "
                "be overwritten before it is sent; give the destination memory of its own"
            )
    _zero_padding(plan.destination, ranks, destination)
    for _, into, out in copies:
        into.copy_(out)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _by_peer(plan: Plan, moves: Moves, processes: Processes, sends: bool) -> dict[int, list[Move]]:
    """Moves by the process at the other end, in the one order that both ends derive from the plan."""
    peers: dict[int, list[Move]] = {}
    for move in plan.as_moves(moves):
        peer = processes.destination[move.destination.rank] if sends else processes.source[move.source.rank]
        peers.setdefault(peer, []).append(move)
    for found in peers.values():
        found.sort(key=lambda move: -dtype_of(move.dtype).itemsize)
    return peers


def _zero_padding(layout: Layout, ranks: Iterable[int], storages: Storages) -> None:
    for rank in ranks:
        for storage in layout.storages_of(rank):
            for start, stop in storage.padding:
                storages[rank][storage.name].detach().view(-1)[start:stop].zero_()


def _device(source: Storages, destination: Storages) -> torch.device:
    held = [tensor.device for side in (source, destination) for named in side.values() for tensor in named.values()]
    return held[0] if held else torch.device("cpu")


def _refuse_other_processes(plan: Plan, processes: Processes, world: int) -> None:
    for side, layout, where in (
        ("source", plan.source, processes.source),
        ("destination", plan.destination, processes.destination),
    ):
        odd = sorted(set(layout.ranks) ^ set(where)) or sorted(r for r, p in where.items() if not 0 <= p < world)
        if odd:
            raise WeightSyncError(f"transfer: {side} ranks {odd} have no process among the {world} of this group")
    for moves, same in ((plan.moves, False), (plan.stays, True)):
        for source, destination in sorted(set(plan.routes(moves))):
            if (processes.source[source] == processes.destination[destination]) != same:
                planned, found = ("as sharing memory", "two") if same else ("as apart", "one")
                raise WeightSyncError(
                    f"transfer: source rank {source} and destination rank {destination} are planned {planned}, and "
                    f"live in {found} process{'es' if same else ''}; plan with the topology of these processes"
                )


def _refuse_other_tensors(layout: Layout, ranks: Iterable[int], storages: Storages, side: str) -> None:
    for rank in ranks:
        refuse_other_tensors(layout.storages_of(rank), storages.get(rank, {}), f"transfer: {side}")


def _compare(what: str, moved: int, planned: int) -> None:
    if moved != planned:
        raise WeightSyncError(f"transfer: {moved} bytes {what}, the plan has {planned}; the weights are not to be used")


def _lost(messages: list[_Message], timeout_s: float, error: Exception) -> WeightSyncError:
    found = " and ".join(f"{it.flat.nbytes} bytes {'to' if it.sends else 'from'} process {it.peer}" for it in messages)
    return WeightSyncError(
        f"transfer: {found} did not pass within {timeout_s:g} s ({error}). The destination is half written: keep its "
        "policy version where it is. Sending again needs a new process group"
    )
