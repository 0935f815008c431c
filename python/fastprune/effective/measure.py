"""Effective sparsity: which weights lie on a path from an input to an output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.effective import rules as _rules  # noqa: F401  # registers the rules
from fastprune.effective.program import Program
from fastprune.effective.trace import kept_of, program_of
from fastprune.masks import Masks, readable
from fastprune.masks_summary import compression
from fastprune.ops.backend import has_kernel
from fastprune.pruners.arguments import masks_of

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Reach:
    """What a run of a program found: active weights of each mask, and where, if asked."""

    names: list[str]
    counts: list[int]
    active: list[Tensor]


def run(program: Program, masks: Mapping[str, Tensor], *, write: bool) -> Reach:
    """Run a program at some masks, whose names are first names of the model's parameters.

    On the first mask's device, where the others are brought, or on the CPU where the binary has no
    kernels for that; the counts are the one thing that is waited for.
    """
    names = list(masks)
    kept = program.encodings
    key = tuple(names)
    if key not in kept:
        kept[key] = program.encode({name: i for i, name in enumerate(names)})
    device = next((m.device for m in masks.values()), _CPU)
    if not has_kernel("path_norm_reach", device.type):
        device = _CPU
    counts, *active = torch.ops.fastprune.path_norm_reach(
        [m.to(device) for m in masks.values()], program.labels_on(device), kept[key], [], write
    )
    back = [a.to(m.device) for a, m in zip(active, masks.values(), strict=False)]
    return Reach(names, counts.tolist(), back)


def reach(
    model: nn.Module, masks: Mapping[str, Tensor], example_input: Any, *, write: bool = False
) -> tuple[Reach, Mapping[str, Tensor]]:
    """The reach of a model at its masks, and the masks under their first names."""
    program = program_of(model, example_input)
    known = _known(model, masks)
    return run(program, known, write=write), known


def _known(model: nn.Module, masks: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """``masks`` checked, under first names; the short way where nothing is to be done to them."""
    kept, given = kept_of(model), readable(masks)
    for name, mask in given.items():
        weight = kept.parameter(name)
        if weight is None or weight.shape != mask.shape or weight.device != mask.device:
            return masks_of(model, given)
    return given


def effective_sparsity(
    model: nn.Module, masks: Mapping[str, Tensor], *, example_input: Any
) -> float:
    r"""Fraction of the masked weights that are inactive: pruned, or cut off by what was pruned.

    A weight is active if a path from an input of the network to an output passes through it, along
    weights that are kept. Reach is followed position by position (channel, row, column) on an input
    of the example's size, on bits, exactly, at any depth; padding is reached by nothing. A kernel
    entry is active if at some position its input is reached and its output reaches an output of
    the network. Activations, normalization layers and dropout hand on what they get; a product of
    two activations what either gets; attention is all to all over tokens. Values play no part: a
    kept weight that happens to be 0 is a connection, and a unit fed by its bias alone carries no
    input, so that what follows it alone is inactive. Around the cycle of an equilibrium layer
    (:class:`fastprune.nn.DEQ`) paths may go any number of times.

    Args:
        model: any module that ``torch.export`` can trace; not changed. Weights without a mask are
            dense, and not counted.
        masks: parameter name -> bool tensor of the weight's shape, True where kept.
        example_input: a tensor, or a tuple of them, as the model is called with; only shapes and
            dtypes count. A batch in dimension 0 is cut to its first example.
    Returns:
        1 - active / all, in [0, 1]; 0.0 for masks of no weight.
    Raises:
        UnknownOperationError: the model has an operation without a rule; the message names it and
            says how to register one (:func:`fastprune.effective.register_rule`).
        ValueError, TypeError: masks that do not fit the model; a model that cannot be traced.

    Cost: the first call for a model and input size traces it (seconds for a large one); then a few
    times one read of the masks (measured in the README), on the weights' device.
    Source: Vysogorets and Kempe 2023, section 3; the authors compute it by an all-ones pass, which
    underflows in depth.
    """
    found, known = reach(model, masks, example_input)
    total = sum(m.numel() for m in known.values())
    return 1.0 - sum(found.counts) / total if total else 0.0


def effective_masks(model: nn.Module, masks: Mapping[str, Tensor], *, example_input: Any) -> Masks:
    """The masks without the weights that are inactive: see :func:`effective_sparsity`.

    Returns:
        Masks of the same weights, under the first names of shared parameters; what
        :func:`effective_sparsity` counts as active is True. A weight that is used in several places
        is active if it is at one of them.
    Raises and cost: as :func:`effective_sparsity`, and one write of the masks.
    """
    found, _ = reach(model, masks, example_input, write=True)
    return Masks(dict(zip(found.names, found.active, strict=True)))


def effective_compression(
    model: nn.Module, masks: Mapping[str, Tensor], *, example_input: Any
) -> float:
    """All masked weights over the active ones: 1 / (1 - effective sparsity); infinity for none."""
    found, known = reach(model, masks, example_input)
    return compression(sum(m.numel() for m in known.values()), sum(found.counts))
