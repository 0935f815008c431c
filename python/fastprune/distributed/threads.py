"""Ranks that are threads of one process: for tests, and to try a selection without a launcher."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from fastprune.distributed.link import Reduction

T = TypeVar("T")


class ThreadRank:
    """One of several ranks; goes where a process group would."""

    device = torch.device("cpu")

    def __init__(self, rank: int, shared: _Shared) -> None:
        self.rank = rank
        self.size = shared.size
        self._shared = shared

    def all_reduce(self, tensor: Tensor, reduction: Reduction) -> None:
        """See :class:`fastprune.distributed.Ranks`."""
        s = self._shared
        s.slots[self.rank] = tensor
        s.barrier.wait()
        if self.rank == 0:
            parts = [t for t in s.slots if t is not None]
            if len({(t.shape, t.dtype) for t in parts}) != 1:
                s.barrier.abort()
            else:
                stack = torch.stack(parts)
                if reduction == "sum":
                    s.result = stack.sum(0, dtype=tensor.dtype)
                else:
                    s.result = stack.amax(0) if tensor.numel() else tensor
        s.barrier.wait()
        tensor.copy_(s.result)
        s.barrier.wait()


class _Shared:
    def __init__(self, size: int, timeout: float) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=timeout)
        self.slots: list[Tensor | None] = [None] * size
        self.result = torch.empty(0)


def on_threads(
    size: int, work: Callable[[ThreadRank], T], timeout: float = 60.0
) -> list[T | BaseException]:
    """Calls ``work(rank)`` on ``size`` threads; what each returned or raised, in rank order.

    Args:
        work: takes a :class:`ThreadRank`, which serves as ``group``.
        timeout: seconds that a rank waits for the others in a collective.
    """
    shared = _Shared(size, timeout)
    results: list[T | BaseException] = [RuntimeError("not run")] * size

    def body(rank: int) -> None:
        try:
            results[rank] = work(ThreadRank(rank, shared))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=body, args=(r,)) for r in range(size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return results
