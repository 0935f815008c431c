"""Folding of BatchNorm into the layer before it, for inference."""

from __future__ import annotations

import itertools
from collections import Counter

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from fastprune.nn import MaskedConv2d, MaskedLinear


def fold_batchnorm_(model: nn.Module) -> int:
    """Fold every BatchNorm that directly follows one linear or 2-d convolution layer, in place.

    The pairs come from a symbolic trace; a model that cannot be traced is searched for pairs that
    are neighbours in an ``nn.Sequential``. The scale goes to the weight (pruned weights stay
    zero), the shift to the bias, and the BatchNorm becomes an ``nn.Identity``.

    Args:
        model: in evaluation mode. A BatchNorm without running statistics is left alone.
    Returns:
        How many layers were folded.
    """
    folded = 0
    for first, second in _pairs(model):
        layer, norm = model.get_submodule(first), model.get_submodule(second)
        # Exact types: a subclass may compute something else.
        linear = type(layer) in (nn.Linear, MaskedLinear) and type(norm) is nn.BatchNorm1d
        conv = type(layer) in (nn.Conv2d, MaskedConv2d) and type(norm) is nn.BatchNorm2d
        if not linear and not conv:
            continue
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
        if norm.running_mean is None or norm.running_var is None:
            continue
        _fold_pair_(layer, norm)
        parent, _, child = second.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity())
        folded += 1
    return folded


def _fold_pair_(layer: nn.Linear | nn.Conv2d, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    weight, bias = fuse(layer.weight, layer.bias, mean, var, norm.eps, norm.weight, norm.bias)
    with torch.no_grad():
        layer.weight.copy_(weight)
    layer.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=weight.requires_grad)


def _pairs(model: nn.Module) -> list[tuple[str, str]]:
    """(layer, module fed by it alone), by name, in order."""
    try:
        graph = fx.Tracer().trace(model)
    except Exception:  # tracing fails in as many ways as models are written
        return _sequential_pairs(model)
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    pairs: list[tuple[str, str]] = []
    for node in graph.nodes:
        if node.op != "call_module" or calls[str(node.target)] != 1:
            continue
        source = node.args[0] if node.args else None
        if (
            isinstance(source, fx.Node)
            and source.op == "call_module"
            and calls[str(source.target)] == 1
            and len(source.users) == 1
        ):
            pairs.append((str(source.target), str(node.target)))
    return pairs


def _sequential_pairs(model: nn.Module) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential):
            prefix = f"{name}." if name else ""
            children = [prefix + child for child, _ in module.named_children()]
            pairs += itertools.pairwise(children)
    return pairs
