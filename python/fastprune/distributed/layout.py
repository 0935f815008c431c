"""Where the shards of DTensors lie in the tensors that they are parts of."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastprune.distributed.link import ProcessGroups
from fastprune.distributed.parts import Box

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

_OP = "global_topk_mask"


def is_sharded(given: Any) -> bool:
    """Whether there is a DTensor among what should be a sequence of tensors."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or isinstance(given, Tensor) or not isinstance(given, Sequence):
        return False
    return any(isinstance(t, module.DTensor) for t in given)


def mesh_of(given: Sequence[Any]) -> DeviceMesh:
    """The mesh of the first DTensor."""
    from torch.distributed.tensor import DTensor

    return next(t for t in given if isinstance(t, DTensor)).device_mesh


def mesh_ranks(mesh: DeviceMesh) -> ProcessGroups:
    """The mesh as ranks that add up.

    Raises:
        ValueError: this rank is not in the mesh.
    """
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(f"{_OP}: scores: this rank is not in their device mesh {mesh}")
    rank = 0
    for size, place in zip(mesh.shape, coordinate, strict=True):
        rank = rank * size + place
    groups = [mesh.get_group(d) for d in range(mesh.ndim) if mesh.size(d) > 1]
    return ProcessGroups(groups, rank, mesh.size())


def local_of(t: DTensor) -> Tensor:
    """The shard of this rank, with what it waits for done."""
    detached: DTensor = t.detach()  # type: ignore[assignment]
    local = detached.to_local()
    wait = getattr(local, "wait", None)  # an AsyncCollectiveTensor
    ready: Tensor = wait() if callable(wait) else local
    return ready


@dataclass(frozen=True)
class Shard:
    """This rank's part of a tensor.

    Attributes:
        offset, shape: where it begins, and its size, in each dimension.
        counted: no rank with a smaller coordinate holds the same part.
        copied: mesh dimensions along which ranks hold the same part.
        rows_whole: only dimension 0 is cut.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    counted: bool
    copied: tuple[int, ...]
    rows_whole: bool


def shard_of(t: Any, mesh: DeviceMesh, argument: str, like: DTensor | None = None) -> Shard:
    """The layout of one tensor; ``argument`` is what messages call it.

    Raises:
        TypeError: it is not a DTensor.
        ValueError: another mesh, other placements than those of ``like``, or placements that are
            not understood.
    """
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor import Shard as Sharded

    if not isinstance(t, DTensor):
        raise TypeError(
            f"{_OP}: {argument}: expected a DTensor, as others are, got {type(t).__name__}"
        )
    if t.device_mesh != mesh:
        raise ValueError(
            f"{_OP}: {argument}: expected the device mesh {mesh} of the first tensor, "
            f"got {t.device_mesh}"
        )
    if like is not None and tuple(t.placements) != tuple(like.placements):
        raise ValueError(
            f"{_OP}: {argument}: expected the placements {like.placements} of its scores, "
            f"got {t.placements}"
        )
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "checked by mesh_ranks()"
    plain, late, copied = [], [], []
    placements: tuple[Any, ...] = tuple(t.placements)
    for m, p in enumerate(placements):
        if isinstance(p, Replicate):
            if mesh.size(m) > 1:
                copied.append(m)
        elif type(p).__name__ == "_StridedShard":  # cut after the mesh dimensions to its right
            inner = [
                mesh.size(r)
                for r in range(m + 1, mesh.ndim)
                if getattr(placements[r], "dim", None) == p.dim
            ]
            split = 1
            for size in inner:
                split *= size
            if p.split_factor != split:
                raise _not_understood(argument, t)
            late.append(m)
        elif type(p) is Sharded:
            plain.append(m)
        else:
            raise _not_understood(argument, t)
    offset, shape = [0] * t.dim(), list(t.shape)
    for m in plain + late[::-1]:
        d = placements[m].dim
        piece = -(-shape[d] // mesh.size(m))
        begin = min(coordinate[m] * piece, shape[d])
        offset[d] += begin
        shape[d] = min(begin + piece, shape[d]) - begin
    local = local_of(t)
    if local.numel() > 0 and tuple(local.shape) != tuple(shape):
        raise ValueError(
            f"{_OP}: {argument}: expected a shard of shape {tuple(shape)} of {tuple(t.shape)} with "
            f"placements {t.placements}, got {tuple(local.shape)}"
        )
    cut = {placements[m].dim for m in plain + late if mesh.size(m) > 1}
    return Shard(
        tuple(offset),
        tuple(shape),
        all(coordinate[m] == 0 for m in copied),
        tuple(copied),
        cut <= {0},
    )


def box_of(base: int, whole: Sequence[int], offset: Sequence[int], shape: Sequence[int]) -> Box:
    """A block of a row-major tensor whose first element has the index ``base``."""
    strides = [1] * len(whole)
    for d in range(len(whole) - 2, -1, -1):
        strides[d] = strides[d + 1] * whole[d + 1]
    base += sum(o * s for o, s in zip(offset, strides, strict=True))
    sizes, steps = [1], [1]
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if stride == sizes[0] * steps[0]:  # goes on where the inner dimensions end
            sizes[0] *= size
        elif size != 1:
            sizes.insert(0, size)
            steps.insert(0, stride)
    return Box(base, tuple(sizes), tuple(steps))


def _not_understood(argument: str, t: DTensor) -> ValueError:
    return ValueError(
        f"{_OP}: {argument}: expected placements Shard and Replicate, got {t.placements}"
    )
