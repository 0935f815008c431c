"""Reach through a network, on bits: the op behind :mod:`fastprune.effective`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def path_norm_reach(
    masks: Sequence[Tensor],
    labels: Sequence[Tensor],
    program: Tensor,
    inspect: Sequence[int] = (),
    write: bool = False,
) -> list[Tensor]:
    r"""Follow inputs and outputs of a network through masked weights, exactly.

    A program is a list of instructions over Boolean maps, one map per tensor of the network; its
    encoding is described in ``csrc/ops/path_norm.h`` and made by :mod:`fastprune.effective`.
    Forward from the inputs and backward from the outputs, each map says which elements lie on a
    path; a weight is active if it is kept and joins an element that is reached to one that reaches.

    Args:
        masks: bool tensors, rows x cols in memory, any shape; the program names them by index. All
            on one device, which is where the work is done and the results are.
        labels: int32 vectors that the program names; -1 marks elements that take no part. On the
            device of the masks, or on the CPU, whence a GPU copies them at every call; a call that
            a CUDA graph captures needs them on the GPU.
        program: int64 vector on the CPU.
        inspect: numbers of values whose maps are wanted.
        write: also return which weights are active.
    Returns:
        A list: int64 counts of active weights, one per mask; with ``write`` a bool tensor like each
        mask; then for each inspected value two bool vectors of its elements: reached from an
        input, reaching an output.
    Raises:
        RuntimeError: the program does not fit itself, its masks or its labels; the message says
            where.
    Cost: the masks are read once, and written once with ``write``; what follows scans their bits,
    an eighth of the bytes, up to three times, less where maps fill up: in all a few times one
    read. Deterministic. On
    a GPU nothing is waited for; a cyclic program is left to one block of threads there.
    """
    return torch.ops.fastprune.path_norm_reach(  # type: ignore[no-any-return]
        list(masks), list(labels), program, list(inspect), write
    )


@torch.library.register_fake("fastprune::path_norm_reach")
def _fake(
    masks: Sequence[Tensor],
    labels: Sequence[Tensor],
    program: Tensor,
    inspect: Sequence[int],
    write: bool,
) -> list[Tensor]:
    if inspect:
        raise NotImplementedError("path_norm_reach: inspect: the sizes of maps are data")
    on = next((t for t in (*masks, *labels) if not t.is_cpu), masks[0] if masks else program)
    counts = on.new_empty([len(masks)], dtype=torch.int64)
    return [counts, *([torch.empty_like(m) for m in masks] if write else [])]
