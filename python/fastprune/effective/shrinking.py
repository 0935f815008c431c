"""Layers with fewer channels, and the proof that the smaller network is the larger one's rest."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.effective.classes import MismatchError, Settled
from fastprune.effective.couplings import Couplings
from fastprune.effective.trace import graph_of

_LINEAR: dict[str, tuple[int, ...]] = {"weight": (0, 1), "bias": (0,)}
_NORM: dict[str, tuple[int, ...]] = dict.fromkeys(
    ("weight", "bias", "running_mean", "running_var"), (0,)
)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Exact types: a subclass may do something else with its weights.
_KNOWN: dict[type[nn.Module], dict[str, tuple[int, ...]]] = {
    nn.Linear: _LINEAR,
    **dict.fromkeys(_CONVOLUTIONS, _LINEAR),
    **dict.fromkeys(_NORMS, _NORM),
}

Axis = tuple[str, int]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name that they have."""
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return named | dict(model.named_buffers(remove_duplicate=False))


def owners_of(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """id of a parameter or buffer -> the modules that hold it, and under which name."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for own, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                owners.setdefault(id(tensor), []).append((module, own))
    return owners


def movable_axes(model: nn.Module) -> set[Axis]:
    """Dimensions of parameters and buffers that all of their owners let become shorter."""
    owners = owners_of(model)
    found = set()
    for name, tensor in tensors_of(model).items():
        if type(tensor) in (nn.Parameter, Tensor):
            allowed = [_KNOWN.get(type(m), {}).get(own, ()) for m, own in owners[id(tensor)]]
            found |= {(name, d) for d in allowed[0] if all(d in dims for dims in allowed)}
    return found


def shrunk(
    model: nn.Module, kept: Mapping[Axis, Tensor], biases: Mapping[str, Tensor]
) -> nn.Module:
    """A copy of a model with shorter tensors, and layers that know their new sizes.

    Args:
        kept: bool vectors, which entries of a dimension stay.
        biases: weight name -> what its layer, whose bias is its own, adds to its outputs; float64,
            of the old size.
    """
    small = copy.deepcopy(model)
    changed: dict[int, nn.Module] = {}
    for weight, shift in biases.items():
        layer: Any = small.get_submodule(weight.rpartition(".")[0])
        old = layer.bias
        total = shift if old is None else old.detach().double() + shift
        trains = layer.weight.requires_grad if old is None else old.requires_grad
        layer.bias = nn.Parameter(total.to(layer.weight.dtype), trains)
    named, owners = tensors_of(small), owners_of(small)
    for name, tensor in named.items():
        less: Tensor = tensor.detach()
        for d in range(tensor.dim()):
            stays = kept.get((name, d))
            if stays is not None and not bool(stays.all()):
                less = less.index_select(d, stays.nonzero().flatten().to(less.device))
        if less.shape == tensor.shape:
            continue
        new = nn.Parameter(less, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else less
        for module, own in owners[id(tensor)]:
            setattr(module, own, new)
            changed[id(module)] = module
    for module in changed.values():
        _resize(module)
    return small


def _resize(layer: Any) -> None:
    """Let a layer's sizes be those of its tensors."""
    if type(layer) in _NORMS:
        layer.num_features = len(layer.running_mean)
        return
    shape = layer.weight.shape
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = shape
    elif isinstance(layer, _TRANSPOSED):
        layer.groups = max(1, shape[0] * layer.groups // layer.in_channels)
        layer.in_channels, layer.out_channels = shape[0], shape[1] * layer.groups
    else:
        layer.groups = max(1, shape[0] * layer.groups // layer.out_channels)
        layer.out_channels, layer.in_channels = shape[0], shape[1] * layer.groups


def compare(
    large: Couplings, small: nn.Module, arguments: tuple[Any, ...], removed: Tensor
) -> None:
    """Check that every tensor of the smaller network is the larger one's without what was removed.

    The same code has to run, call by call, and each element of each result has to be of the class
    of the element that it stands for. What this cannot show, nothing is assumed of.

    Raises:
        MismatchError: at the call that is named, or anywhere.
    """
    try:
        graph = graph_of(small, arguments)
    except ValueError as error:
        raise MismatchError from error
    axes = {}
    movable = movable_axes(small)
    for key, classes in large.classes.axes().items():
        axes[key] = classes[~removed[classes]]
    for consumer in large.consumers:  # a bias may be new
        rows = axes.get((consumer.weight, 1 - consumer.axis))
        if rows is not None:
            axes.setdefault((f"{consumer.weight.rpartition('weight')[0]}bias", 0), rows)
    rest = Couplings(graph, Settled(axes), movable, grouped=large.grouped)
    before, after = list(large.labels.items()), list(rest.labels.items())
    for (node, full), (other, less) in zip(before, after, strict=False):
        if node.target is not other.target:
            raise MismatchError(node)
        for a, b in zip(_labels(full), _labels(less), strict=True):
            classes = large.classes.of(a)
            expected = classes.flatten()[~removed[classes].flatten()]
            if a.dim() != b.dim() or not torch.equal(expected, b.flatten().long()):
                raise MismatchError(node)
    if len(before) != len(after):
        raise MismatchError


def _labels(result: Any) -> list[Tensor]:
    parts = result if isinstance(result, (tuple, list)) else [result]
    return [p for p in parts if isinstance(p, Tensor)]
