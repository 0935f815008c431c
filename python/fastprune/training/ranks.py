"""The processes of one training: alone, or as ``torchrun`` starts them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastprune.distributed.digest import digest_of_all
from fastprune.training.errors import RunError


class World:
    """All ranks of a training, and this one's place among them.

    Every method but ``wrap`` and ``mine`` is collective: all ranks call it.

    Args:
        device: what this rank trains on.
        rank, size: of the group; a group is used only where size > 1.
    Raises (each method):
        RunError: another rank has died, or took longer than the timeout.
    """

    def __init__(self, device: torch.device, rank: int = 0, size: int = 1) -> None:
        self.device = device
        self.rank = rank
        self.size = size

    @classmethod
    def join(cls, device: torch.device, timeout: float) -> World:
        """The group that ``torchrun``'s environment describes; alone without one."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls(device)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        except (RuntimeError, ValueError) as error:
            raise RunError(f"the ranks do not come together: {error}") from error
        return cls(device, dist.get_rank(), size)

    def leave(self) -> None:
        """End the group."""
        if self.size > 1:
            with suppress(RuntimeError):
                dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and reports."""
        return self.rank == 0

    @property
    def group(self) -> Any:
        """The process group; None alone."""
        return dist.group.WORLD if self.size > 1 else None

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as it is called in training: averaging gradients over the ranks."""
        if self.size == 1:
            return model
        # Masks are the same on all ranks, and checked; sent at every step they would cost most.
        masks = [n for n, _ in model.named_buffers() if n.split(".")[-1] == "weight_mask"]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, masks)
        return DistributedDataParallel(model)

    def mine(self, rows: Tensor) -> Tensor:
        """This rank's share of some rows."""
        return rows[self.rank :: self.size]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks."""
        if self.size > 1:
            values = values.clone()
            self._do(lambda: dist.all_reduce(values))
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is set on any rank."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor([int(flag)])).item())

    def gather(self, t: Tensor) -> list[Tensor]:
        """The tensors of all ranks, alike in shape."""
        if self.size == 1:
            return [t]
        parts = [torch.empty_like(t) for _ in range(self.size)]
        self._do(lambda: dist.all_gather(parts, t))
        return parts

    def share_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by the first rank's."""
        if self.size > 1:
            for t in tensors:
                self._do(lambda t=t: dist.broadcast(t, 0))  # type: ignore[misc]

    def same(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the bits of some tensors are the same on all ranks."""
        if self.size == 1:
            return True
        own = digest_of_all(tensors)
        values = [int(t.item()) for t in self.gather(torch.tensor([own]))]
        return len(set(values)) == 1

    def from_first(self, work: Callable[[], bytes]) -> bytes:
        """What ``work`` returned on the first rank; if it raised there, all ranks raise.

        Raises:
            RunError: on the other ranks, where ``work`` raised; on the first, its own error.
        """
        if self.size == 1:
            return work()
        content, error = b"", None
        if self.first:
            try:
                content = work()
            except BaseException as caught:
                error, content = caught, str(caught).encode()
        header = torch.tensor([len(content), int(error is not None)])
        self.share_([header])
        body = torch.empty(int(header[0]), dtype=torch.uint8)
        if self.first and content:
            body = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        self.share_([body])
        if error is not None:
            raise error
        content = body.numpy().tobytes()
        if header[1]:
            raise RunError(f"rank 0 failed: {content.decode(errors='replace')}")
        return content

    def _do(self, collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise lost(self, error) from error


def is_lost(error: RuntimeError) -> bool:
    """Whether an error, such as of the gradients' averages, is that of a collective."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        part in text for part in ("gloo", "nccl", "connection", "timed out", "socket")
    )


def lost(world: World, error: Exception) -> RunError:
    """What a failed collective means to the user."""
    return RunError(
        f"rank {world.rank} of {world.size} lost the others: one has died, or took longer than "
        f"--timeout ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    )
