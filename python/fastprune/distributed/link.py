"""Ranks that add up small integer tensors, and raise together.

Every exchange is one all-reduce of integers with one status slot: a rank whose own work failed
takes part with zeros and its slot set, so that no rank waits for another, and all of them raise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

_OP = "global_topk_mask"
_TEXT = 512  # bytes of the first failing rank's message that the others show
Reduction = Literal["sum", "max"]


@dataclass
class Traffic:
    """What one rank handed to collectives: their number, and the bytes of its own tensors.

    A ring all-reduce moves about twice these bytes over each rank's link, whatever the number of
    ranks. Factors that are averaged (``ranks="replicated"``) are counted in ``averaged`` alone.
    """

    rounds: int = 0
    bytes: int = 0
    averaged: int = 0


_recording: ContextVar[Traffic | None] = ContextVar("fastprune_traffic", default=None)


@contextmanager
def record_traffic() -> Iterator[Traffic]:
    """Counts the collectives of the selections made inside, on this rank and thread.

    >>> with record_traffic() as traffic:
    ...     masks = global_topk_mask(shards, 0.1, group=group)
    >>> traffic.rounds, traffic.bytes
    """
    traffic = Traffic()
    token = _recording.set(traffic)
    try:
        yield traffic
    finally:
        _recording.reset(token)


class Ranks(Protocol):
    """What a selection needs of a group. A ``torch.distributed`` group becomes one by itself."""

    rank: int
    size: int
    device: torch.device

    def all_reduce(self, tensor: Tensor, reduction: Reduction) -> None:
        """Replaces ``tensor``, alike in shape and dtype on all ranks, by its sum or maximum."""


class ProcessGroups:
    """One ``torch.distributed`` group, or one for each dimension of a mesh, reduced in turn."""

    def __init__(self, groups: Sequence[dist.ProcessGroup], rank: int, size: int) -> None:
        self.groups = list(groups)
        self.hops = len(self.groups)
        self.rank = rank
        self.size = size
        # By the group alone, so that all ranks choose alike: gloo's part where there is one.
        backends = [str(dist.get_backend_config(g)) for g in self.groups]
        cpu = all("cpu:" in b for b in backends)
        self.device = torch.device("cpu" if cpu else f"cuda:{torch.cuda.current_device()}")

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> ProcessGroups:
        """A single group."""
        return cls([group], dist.get_rank(group), dist.get_world_size(group))

    def all_reduce(self, tensor: Tensor, reduction: Reduction) -> None:
        """See :class:`Ranks`."""
        op = dist.ReduceOp.SUM if reduction == "sum" else dist.ReduceOp.MAX
        for group in self.groups:
            dist.all_reduce(tensor, op=op, group=group)


@dataclass
class Request:
    """A vector that all ranks add up; ``work`` computes this rank's part.

    ``length`` and ``small`` (the sums fit 32 bits) follow from what all ranks know alike.
    """

    length: int
    work: Callable[[], Tensor | None]
    small: bool = False


def _raise(error: BaseException) -> None:
    raise error


class Link:
    """The collectives of one call."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.rank = ranks.rank
        self.size = ranks.size
        self._shared: BaseException | None = None  # what was last raised on all ranks

    def sums(self, requests: Sequence[Request]) -> list[list[int]]:
        """The sums over all ranks of one vector per request, in one collective.

        Raises:
            RuntimeError: another rank's work failed, or a collective did.
            BaseException: what this rank's own work raised.
        """
        parts, error = self._parts(requests)
        small = all(r.small for r in requests)
        return self._exchange(parts, torch.int32 if small else torch.int64, "sum", error)

    def sum(self, length: int, work: Callable[[], Tensor | None]) -> list[int]:
        """The sum over all ranks of one int64 vector."""
        return self.sums([Request(length, work)])[0]

    def max(self, length: int, work: Callable[[], Tensor | None]) -> list[int]:
        """The elementwise maximum over all ranks of one int64 vector."""
        parts, error = self._parts([Request(length, work)])
        return self._exchange(parts, torch.int64, "max", error)[0]

    def vote(self, work: Callable[[], Any]) -> None:
        """Does the work, and returns only if it succeeded on every rank."""

        def silent() -> None:
            work()

        self.sums([Request(0, silent)])

    @contextmanager
    def agreement(self) -> Iterator[None]:
        """Leaves the block only if all ranks do; what one raises in it is an error on all.

        Inside, the ranks may take part in votes of this link, and in no other exchange.
        """
        try:
            yield
        except BaseException as error:
            if error is not self._shared:  # the others do not know
                self.vote(partial(_raise, error))
            raise
        self.vote(lambda: None)

    def same(self, length: int, work: Callable[[], Tensor]) -> list[bool]:
        """For each entry of an int64 vector: whether it is the same on all ranks."""

        def both_ways() -> Tensor:
            own = work().to(torch.int64)  # an empty list is made a float tensor
            return torch.cat([own, ~own])  # ~x falls as x grows, and does not overflow

        most = self.max(2 * length, both_ways)
        return [a == ~b for a, b in zip(most[:length], most[length:], strict=True)]

    def add_(self, tensor: Tensor) -> None:
        """Replaces a floating-point tensor by its sum over all ranks."""
        moved = tensor.to(self.ranks.device)
        self._collective(moved, "sum")
        self._record(averaged=moved.numel() * moved.element_size())
        if moved is not tensor:
            tensor.copy_(moved)

    def _parts(self, requests: Sequence[Request]) -> tuple[list[Tensor], BaseException | None]:
        parts: list[Tensor] = []
        error: BaseException | None = None
        for request in requests:
            part: Tensor | None = None
            if error is None:
                try:
                    part = request.work()
                    if part is not None and part.shape != (request.length,):
                        raise AssertionError(f"{tuple(part.shape)}, not ({request.length},)")
                except BaseException as caught:
                    error, part = caught, None
            if part is None:
                part = torch.zeros(request.length, dtype=torch.int64)
            parts.append(part)
        return parts, error

    def _exchange(
        self,
        parts: list[Tensor],
        dtype: torch.dtype,
        reduction: Reduction,
        error: BaseException | None,
    ) -> list[list[int]]:
        device = self.ranks.device
        status = torch.tensor([0 if error is None else 1])
        payload = torch.cat([p.to(device, dtype) for p in (*parts, status)])
        self._collective(payload, reduction)
        hops = getattr(self.ranks, "hops", 1)
        self._record(rounds=hops, bytes=hops * payload.numel() * payload.element_size())
        values: list[int] = payload.tolist()
        if values[-1] > 0:
            self._raise_together(error)
        results, at = [], 0
        for part in parts:
            results.append(values[at : at + part.numel()])
            at += part.numel()
        return results

    def _raise_together(self, error: BaseException | None) -> None:
        failed = torch.zeros(self.size, dtype=torch.int64)
        failed[self.rank] = 0 if error is None else 1
        failed = failed.to(self.ranks.device)
        self._collective(failed, "max")
        ranks = failed.nonzero().flatten().tolist()
        text = torch.zeros(_TEXT, dtype=torch.int64)
        if error is not None and self.rank == ranks[0]:
            said = f"{type(error).__name__}: {error}".partition("\n")[0].encode()[:_TEXT]
            text[: len(said)] = torch.tensor(list(said), dtype=torch.int64)
        text = text.to(self.ranks.device)
        self._collective(text, "max")
        if error is not None:
            self._shared = error
            raise error
        message = bytes(b for b in text.tolist() if b).decode(errors="replace")
        more = f" (and {len(ranks) - 1} more)" if len(ranks) > 1 else ""
        self._shared = RuntimeError(
            f"{_OP}: rank {ranks[0]}{more} failed, so no rank has masks: {message}"
        )
        raise self._shared

    def _collective(self, tensor: Tensor, reduction: Reduction) -> None:
        try:
            self.ranks.all_reduce(tensor, reduction)
            if tensor.device.type == "cuda":
                torch.cuda.current_stream(tensor.device).synchronize()
        except Exception as error:
            self._shared = RuntimeError(
                f"{_OP}: a collective failed on rank {self.rank} of {self.size}, so there are no "
                f"masks: a rank has died, has left the call or took longer than the group's "
                f"timeout ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
            )
            raise self._shared from error

    def _record(self, **more: int) -> None:
        traffic = _recording.get()
        if traffic is not None:
            for name, amount in more.items():
                setattr(traffic, name, getattr(traffic, name) + amount)
