"""Dead units and channels taken out of a network: smaller layers, the same outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, overload

from torch import Tensor, nn

from fastprune.convert import finalize
from fastprune.effective.classes import Classes, MismatchError
from fastprune.effective.couplings import Couplings
from fastprune.effective.life import Life
from fastprune.effective.shrinking import Axis, compare, movable_axes, shrunk
from fastprune.effective.trace import arguments_of, graph_of, one_example
from fastprune.masks import Masks
from fastprune.pruners.arguments import masks_of

_ATTEMPTS = 16


@overload
def trim(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    *,
    example_input: Any,
    return_masks: Literal[False] = False,
) -> nn.Module: ...
@overload
def trim(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    *,
    example_input: Any,
    return_masks: Literal[True],
) -> tuple[nn.Module, Masks]: ...
def trim(
    model: nn.Module, masks: Mapping[str, Tensor], *, example_input: Any, return_masks: bool = False
) -> nn.Module | tuple[nn.Module, Masks]:
    r"""A smaller model with the same outputs: units and channels that the masks left dead are gone.

    A channel of a layer goes if nothing of it reaches an output of the network, or if no input
    reaches it: then it is a constant, which is added to the biases of the layers that read it (a
    bias is made where there is none). A constant that is not 0 stays where a convolution pads it
    with zeros, for its effect is not the same at all positions, and where several layers share the
    weights that read it. Layers that share a channel agree: what an addition, BatchNorm, a
    depthwise or grouped convolution (whole groups), a concatenation or a flattening couples is
    removed together or not at all. Each layer keeps at least one channel, so that a network whose
    layers have collapsed still runs.

    Linear, convolution (transposed too) and BatchNorm layers become smaller ones of the same types;
    all others stay, and so do channels that meet an operation whose coupling is not understood
    (attention, LayerNorm, a view with the number of channels in the code). The smaller model is
    traced again, and each of its tensors must be shown to be the larger one's without the removed
    channels; otherwise more is left as it was.

    Args:
        model: any module that ``torch.export`` can trace; not changed. Layers of
            :func:`fastprune.accelerate` become plain ones.
        masks: parameter name -> bool tensor of the weight's shape, True where kept.
        example_input: a tensor, or a tuple of them, as the model is called with. The smaller model
            is for inputs of that size (but any batch), as reach is.
        return_masks: also return the masks of the smaller layers, for
            :func:`fastprune.accelerate` and training.
    Returns:
        A copy of the model, pruned weights set to 0, with the same outputs in evaluation mode, up
        to rounding. With ``return_masks`` a pair: the model and its :class:`fastprune.Masks`.
    Raises:
        UnknownOperationError: the model has an operation without a rule; see
            :func:`fastprune.effective.register_rule`.
        ValueError, TypeError: masks that do not fit the model; a model that cannot be traced, or
            has a bias that is computed from the input.

    In training mode the two may differ: BatchNorm sees a constant channel as one without variance.
    Cost: of each round, usually two: two traces (seconds for a large model), a forward pass, and
    two copies of the model.
    Source: Vysogorets and Kempe 2023, section 3 (what is inactive can be removed).
    """
    arguments = one_example(arguments_of(model, example_input))
    known = masks_of(model, masks)
    plain = finalize(model)
    Masks(known).apply_(plain)
    small = dict(known)
    while True:
        # What stayed alone because of a neighbour may go once that has gone: rarely, so the second
        # round is usually the last.
        plain, kept = _search(plain, small, arguments)
        before, small = small, {name: _cut(name, mask, kept) for name, mask in small.items()}
        if all(mask.shape == small[name].shape for name, mask in before.items()):
            return (plain, Masks(small)) if return_masks else plain


def _cut(name: str, mask: Tensor, kept: Mapping[Any, Tensor]) -> Tensor:
    """``mask`` without what was removed of its axes."""
    for d in range(mask.dim()):
        if (name, d) in kept:
            mask = mask.index_select(d, kept[name, d].nonzero().flatten().to(mask.device))
    return mask


def _search(
    plain: nn.Module, masks: dict[str, Tensor], arguments: tuple[Any, ...]
) -> tuple[nn.Module, dict[Axis, Tensor]]:
    """The smaller model and what it keeps, after as many attempts as it takes to be sure of it."""
    graph = graph_of(plain, arguments)
    life = Life(plain, graph, masks, arguments)
    movable = movable_axes(plain)
    pins: set[str] = set()
    for _ in range(_ATTEMPTS):
        couplings = Couplings(graph, Classes(), movable, pins)
        removed = life.removable(couplings)
        kept = {key: ~removed[c] for key, c in couplings.classes.axes().items()}
        if all(bool(k.all()) for k in kept.values()):
            break
        biases = life.biases(couplings, removed)
        small = shrunk(plain, kept, biases)
        try:
            compare(couplings, small, arguments, removed)
            return small, kept
        except MismatchError as mismatch:
            # Not told where, it is most often a view with a number of channels.
            more = {mismatch.node.name} if mismatch.node is not None else couplings.moves
            if more <= pins:
                break
            pins |= more
    return plain, {}
