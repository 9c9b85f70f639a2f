"""Several processes on one problem: collectives that count bytes, and errors that reach every rank.

`Ranks` is this process in a group of torch.distributed. `agreement` makes what one rank refuses an
error on all of them, and a rank that dies ends the others with an error that names it.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from . import checks

__all__ = [
    "Agreement",
    "Ranks",
    "agreement",
    "fingerprint",
    "naming_the_lost",
    "required",
    "resolve",
]

# Sums of up to so many numbers, those of all ranks together, are taken from a gather: an all_reduce
# goes around twice, and between steps of a solve the time is in the messages.
_GATHER_UP_TO = 2**15
# Bytes that this process has sent, by the name of the group.
_sent: dict[str, int] = {}
# Seconds in which the ranks that have run into a timeout tell each other that they are alive.
_ROLL_CALL = 2.0


class Ranks:
    """This process among those of a torch.distributed group; every method is collective.

    Attributes:
        rank, size: the place of this process in the group, and the number of processes.
        sent: bytes of tensors that this rank has sent in the group. A gather counts as a ring sends
            it (each rank's part to all others), a sum as 2 (size - 1) / size of its bytes. Every
            `Ranks` of a group counts on; it may be set to 0.

    Example:
        >>> from torch.distributed import HashStore, init_process_group
        >>> init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        >>> Ranks(None).total(torch.ones(3))
        tensor([1., 1., 1.])
        >>> torch.distributed.destroy_process_group()
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        world: Any = dist.group.WORLD
        self.name: str = (world if group is None else group).group_name

    @classmethod
    def named(cls, name: str) -> Ranks:
        """The ranks of the group whose `name` this is."""
        known: Any = name  # torch 2.7 takes a str, later ones a type of their own
        return cls(dist.distributed_c10d._resolve_process_group(known))

    @property
    def sent(self) -> int:
        return _sent.get(self.name, 0)

    @sent.setter
    def sent(self, n: int) -> None:
        _sent[self.name] = n

    def _call(self, collective: Callable[..., Any], *args: Any) -> None:
        try:
            collective(*args, group=self.group)
        except RuntimeError as error:
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> RuntimeError:
        """The error of a collective that has failed, with the rank that is to blame for it."""
        gone = _who_is_gone(self, "imed out" in str(error))
        names = "rank " + ", ".join(map(str, gone)) if gone else "which one is not known"
        return RuntimeError(
            f"rank {self.rank} of {self.size}: another rank has died or left this computation "
            f"({names}); its own error says why ({error})"
        )

    def total(self, x: Tensor) -> Tensor:
        """The sum over ranks, the same bits on each."""
        x = x.contiguous()
        if x.numel() * self.size > _GATHER_UP_TO:
            self._call(dist.all_reduce, x, dist.ReduceOp.SUM)
            self.sent += 2 * (self.size - 1) * x.nbytes // self.size
            return x
        out: Tensor
        out, *others = self.gather(x)
        for part in others:
            out = out + part
        return out

    def first(self, x: Tensor) -> Tensor:
        """Rank 0's values: machines of two kinds may round a small factorisation in two ways."""
        x = x.contiguous()
        self._call(dist.broadcast, x, self._global(0))
        self.sent += x.nbytes * (self.size - 1) if self.rank == 0 else 0
        return x

    def gather(self, x: Tensor) -> Tensor:
        """(n, ...) of equal shapes from all ranks -> (size, n, ...)."""
        out = x.new_empty((self.size, *x.shape))
        self._call(dist.all_gather, list(out.unbind(0)), x.contiguous())
        self.sent += x.nbytes * (self.size - 1)
        return out

    def objects(self, thing: Any) -> list[Any]:
        """Every rank's object, in rank order; not counted in `sent`."""
        out: list[Any] = [None] * self.size
        self._call(dist.all_gather_object, out, thing)
        return out

    def pass_on(self, send: Mapping[int, Tensor], receive: Mapping[int, Tensor]) -> None:
        """Send tensors to ranks and fill tensors with what ranks send; both sides know the shapes.

        Args:
            send: rank -> tensor; one without elements is not sent.
            receive: rank -> contiguous tensor that is filled in place, likewise.
        """
        self.start(send, receive)()

    def start(
        self, send: Mapping[int, Tensor], receive: Mapping[int, Tensor], tag: int = 0
    ) -> Callable[[], None]:
        """Begin what `pass_on` does; the function that is returned waits for its end.

        Until then tensors that are received must not be read, nor those that are sent written.
        Messages of another tag may pass meanwhile.
        """
        ops = [
            dist.P2POp(dist.isend, x.contiguous(), self._global(to), self.group, tag)
            for to, x in send.items()
            if x.numel()
        ]
        ops += [
            dist.P2POp(dist.irecv, x, self._global(source), self.group, tag)
            for source, x in receive.items()
            if x.numel()
        ]
        try:
            works = dist.batch_isend_irecv(ops) if ops else []
        except RuntimeError as error:
            raise self._lost(error) from error
        self.sent += sum(x.nbytes for x in send.values())

        def wait() -> None:
            try:
                for work in works:
                    work.wait()
            except RuntimeError as error:
                raise self._lost(error) from error
            ops.clear()  # which has kept the tensors alive

        return wait

    def ring(
        self, own: Sequence[Tensor], lengths: Sequence[int]
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """Every rank's tensors in turn, the own ones first; the next ones travel meanwhile.

        Rank r sends to rank r + 1, so that it sees the tensors of r, r - 1, .., and holds those of
        two ranks beside its own. All ranks have to take all of them.

        Args:
            own: tensors of one length; their dtypes and further dimensions are those of every rank.
            lengths: the length of each rank's tensors, 0 or more.

        Yields:
            (rank, its tensors), to be read only.

        Example:
            >>> from torch.distributed import HashStore, init_process_group
            >>> init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
            >>> [(rank, x.tolist()) for rank, (x,) in Ranks(None).ring([torch.ones(2)], [2])]
            [(0, [1.0, 1.0])]
            >>> torch.distributed.destroy_process_group()
        """
        packed, tensors = _packed(own) if self.size > 1 else own[0], list(own)
        after = (self.rank + 1) % self.size
        for step in range(self.size):
            wait = None
            if step + 1 < self.size:
                n = lengths[(self.rank - step - 1) % self.size]
                shapes = [(n, *x.shape[1:]) for x in own]
                widths = [
                    _padded_bytes(x.dtype, shape) for x, shape in zip(own, shapes, strict=True)
                ]
                arriving = torch.empty(sum(widths), dtype=torch.uint8, device=own[0].device)
                wait = self.start({after: packed}, {(self.rank - 1) % self.size: arriving})
            yield (self.rank - step) % self.size, tensors
            if wait is not None:
                wait()
                packed = arriving
                tensors = [
                    part[: int(np.prod(shape)) * x.element_size()].view(x.dtype).view(shape)
                    for part, x, shape in zip(packed.split(widths), own, shapes, strict=True)
                ]

    def swap(self, send: Sequence[Tensor], to: int, source: int) -> list[Tensor]:
        """Send tensors to one rank and get another one's, whose first dimension may be different.

        Two messages: the lengths, then all bytes. Dtypes and further dimensions are those of
        `send`, on every rank.
        """
        return self.start_swap(send, to, source, tag=0)()

    def start_swap(
        self, send: Sequence[Tensor], to: int, source: int, tag: int = 1
    ) -> Callable[[], list[Tensor]]:
        """Begin a `swap`; the function that is returned waits for its end.

        The lengths have been exchanged at return, the bytes travel until the wait. One of these may
        be under way at a time, while other messages pass.
        """
        device = send[0].device
        lengths = torch.tensor([len(x) for x in send], device=device)
        theirs = torch.empty_like(lengths)
        self.pass_on({to: lengths}, {source: theirs})
        shapes = [(n, *x.shape[1:]) for n, x in zip(theirs.tolist(), send, strict=True)]
        sizes = [
            int(np.prod(shape)) * x.element_size() for shape, x in zip(shapes, send, strict=True)
        ]
        packed = torch.cat([_as_bytes(x) for x in send])
        got = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        wait = self.start({to: packed}, {source: got}, tag)

        def received() -> list[Tensor]:
            wait()
            # a copy of each part: a view of another dtype has to begin at a multiple of its size
            return [
                part.clone().view(x.dtype).view(shape)
                for part, x, shape in zip(got.split(sizes), send, shapes, strict=True)
            ]

        return received

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


def _as_bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def _padded_bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Bytes of a tensor, filled up: what comes after it may then be viewed as any dtype."""
    return -(-int(np.prod(shape)) * dtype.itemsize // 16) * 16


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of all tensors, each filled up to `_padded_bytes`."""
    widths = [_padded_bytes(x.dtype, x.shape) for x in tensors]
    out = torch.zeros(sum(widths), dtype=torch.uint8, device=tensors[0].device)
    for part, x in zip(out.split(widths), tensors, strict=True):
        part[: x.nbytes] = _as_bytes(x)
    return out


def _who_is_gone(ranks: Ranks, timed_out: bool) -> list[int]:
    """The ranks that do not answer, as the first rank that noticed it has found; [] if unknown."""
    try:
        members = dist.get_process_group_ranks(ranks.group or dist.group.WORLD)
        store = dist.PrefixStore(
            f"shared_kernels/lost/{members}",
            dist.distributed_c10d._get_default_store(),
        )
        if timed_out:
            store.set(f"alive/{ranks.rank}", "")
            until = time.monotonic() + _ROLL_CALL
            gone = [rank for rank in range(ranks.size) if rank != ranks.rank]
            while gone and time.monotonic() < until:
                time.sleep(0.05)
                gone = [rank for rank in gone if not store.check([f"alive/{rank}"])]
        else:
            gone = [rank for rank in range(ranks.size) if _is_closed(ranks, rank)]
        # who leaves because of this closes its connections, too: the first finding counts
        found = store.compare_set("gone", "", ",".join(map(str, gone)) or "-").decode()
    except (RuntimeError, ValueError):  # the store has gone with the process that held it
        return [] if timed_out else [r for r in range(ranks.size) if _is_closed(ranks, r)]
    return [] if found == "-" else [int(rank) for rank in found.split(",")]


def _is_closed(ranks: Ranks, rank: int) -> bool:
    """Whether the connection to a rank has been closed by its end: sending then fails at once."""
    if rank == ranks.rank or dist.get_backend(ranks.group) != "gloo":
        return False
    try:
        dist.isend(torch.zeros(1), ranks._global(rank), group=ranks.group)
    except RuntimeError:
        return True
    return False


@contextmanager
def naming_the_lost(ranks: Ranks | None) -> Iterator[None]:
    """A block whose errors name the rank that has died, also those of other libraries' collectives.

    For a training step: DDP and FSDP exchange gradients by themselves.

    Raises:
        RuntimeError: a collective has failed.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        known = "another rank has died" in text
        if (
            ranks is None
            or known
            or not (isinstance(error, dist.DistError) or "gloo" in text or "imed out" in text)
        ):
            raise
        raise ranks._lost(error) from error


def resolve(group: Any) -> Ranks | None:
    """None, "world", a ProcessGroup or a DeviceMesh of one dimension -> Ranks, or None."""
    if group is None:
        return None
    if not dist.is_available() or not dist.is_initialized():
        checks.fail(
            "group",
            "be None without torch.distributed",
            repr(group),
            "start the processes with torchrun and call torch.distributed.init_process_group",
        )
    if isinstance(group, str):
        checks.in_set("group", group, ("world",))
        return Ranks(None)
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            names = group.mesh_dim_names
            checks.fail(
                "group",
                "be one dimension of a mesh",
                f"a mesh of {group.ndim} ({names})",
                'name it: mesh["cp"]',
            )
        group = group.get_group()
    # new_group returns this in a process that is outside of the group
    outside = group is dist.GroupMember.NON_GROUP_MEMBER
    if not outside and not isinstance(group, dist.ProcessGroup):
        got = type(group).__name__
        checks.fail(
            "group",
            "be None, 'world' or a ProcessGroup",
            got,
            "or one dimension of a DeviceMesh",
            error=TypeError,
        )
    if outside or dist.get_rank(group) < 0:
        checks.fail("group", "contain this process", f"rank {dist.get_rank()} outside of it")
    return Ranks(group)


def required(group: Any) -> Ranks:
    """`resolve` where there has to be a group."""
    ranks = resolve(group)
    if ranks is None:
        checks.fail("group", "be a process group", None)
    return ranks


@dataclass
class Agreement:
    """What a rank tells the others at the end of an `agreement` block.

    equal: name -> fingerprint; refused unless equal on every rank.
    from_first: name -> anything; after the block, what rank 0 put there.
    from_all: anything; after the block, the list of what every rank put there.
    """

    equal: dict[str, int] = field(default_factory=dict)
    from_first: dict[str, Any] = field(default_factory=dict)
    from_all: Any = None
    refusal: str | None = None


@contextmanager
def agreement(ranks: Ranks | None) -> Iterator[Agreement]:
    """A block without collectives in it: where one rank raises an error, all ranks raise one.

    Raises:
        ValueError: another rank has refused its input, or has another value than rank 0.
    """
    mine = Agreement()
    if ranks is None:
        yield mine
        mine.from_all = [mine.from_all]
        return
    try:
        yield mine
    except Exception as error:
        ranks.objects(Agreement(refusal=f"{type(error).__name__}: {error}"))
        raise
    every = ranks.objects(mine)
    for rank, theirs in enumerate(every):
        if theirs.refusal is not None:
            raise ValueError(f"rank {rank} has refused its input: {theirs.refusal}")
    for name in {name: None for it in every for name in it.equal}:
        values = [it.equal.get(name) for it in every]
        others = [rank for rank, value in enumerate(values) if value != values[0]]
        if others:
            checks.fail(name, "be the same on every rank", f"others than rank 0's on {others}")
    mine.from_all = [it.from_all for it in every]
    if ranks.rank > 0:
        mine.from_first = every[0].from_first


def fingerprint(*things: Any) -> int:
    """A checksum of arrays and of what prints the same for the same value.

    Example:
        >>> fingerprint(2, [1.0]) == fingerprint(2.0, (1,))
        True
    """
    value = 0
    for thing in things:
        if isinstance(thing, np.ndarray):
            value = zlib.crc32(f"{thing.shape} {thing.dtype}".encode(), value)
            value = zlib.crc32(np.ascontiguousarray(thing).data, value)
        else:
            value = zlib.crc32(repr(_by_value(thing)).encode(), value)
    return value


def _by_value(thing: Any) -> Any:
    """2, 2.0 and np.float64(2.0) are one value, a list is a tuple, a mapping its sorted items."""
    if isinstance(thing, Mapping):
        return tuple(sorted((str(k), _by_value(v)) for k, v in thing.items()))
    if isinstance(thing, (list, tuple)):
        return tuple(_by_value(t) for t in thing)
    if isinstance(thing, (bool, np.bool_)):
        return bool(thing)
    if isinstance(thing, (int, float, np.number)):
        return float(thing)
    if isinstance(thing, np.ndarray):
        return fingerprint(thing)
    return thing
