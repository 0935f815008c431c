"""Multiply-adds of layers with weights, dense and under masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastprune.masks import readable
from fastprune.masks_model import match
from fastprune.masks_summary import shown, table
from fastprune.nn import MaskedConv2d, MaskedLayer, MaskedLinear, MonDEQLayer, MonDEQLinear
from fastprune.pruners.data import call_arguments
from fastprune.pruners.state import evaluating, preserved
from fastprune.pruners.targets import PRUNABLE_TYPES, TRANSPOSED

LAYERS = (*PRUNABLE_TYPES, MaskedLinear, MaskedConv2d, MonDEQLayer)


@dataclass(frozen=True)
class LayerMacs:
    """Multiply-adds of one layer.

    Attributes:
        name: the weight's parameter name; ``kind``: the type of the layer that has it.
        dense: those of all weights; ``direct``: those of the kept ones.
    """

    name: str
    kind: str
    dense: int
    direct: int

    @property
    def density(self) -> float:
        """direct / dense; 1.0 for a layer without any."""
        return self.direct / self.dense if self.dense else 1.0


@dataclass(frozen=True)
class Macs:
    """Multiply-adds of every layer in ``rows``, their sum in ``total``; ``str()`` gives a table."""

    rows: tuple[LayerMacs, ...]

    @property
    def total(self) -> LayerMacs:
        """The sum over all rows, named ``total``, of no kind."""
        return LayerMacs(
            "total", "", sum(r.dense for r in self.rows), sum(r.direct for r in self.rows)
        )

    def __str__(self) -> str:
        head = ("name", "type", "dense MACs", "direct MACs", "density")
        return table(head, [_cells(r) for r in self.rows], _cells(self.total), left=2)


def macs(model: nn.Module, example_input: Any, masks: Mapping[str, Tensor] | None = None) -> Macs:
    """Count the multiply-adds of linear, convolution and equilibrium layers on an example input.

    A weight of a convolution is multiplied once per position of the output (of the input, if the
    convolution is transposed), a weight of a linear layer once per row of its input, padding
    included; each kept weight counts alike, so ``direct`` is what a kernel does that skips exactly
    the pruned weights. Biases, normalization and everything that is no layer of these types (a
    call of ``torch.nn.functional``, the projections inside attention) are not counted. A layer
    that is called several times counts several times. Of an equilibrium layer
    (:class:`fastprune.nn.MonDEQLinear`, :class:`fastprune.nn.MonDEQConv2d`) one application of
    W = (1 - m) I - A^T A + B - B^T counts, every entry of A and B twice, whatever the number of
    iterations; U counts as the layer that it is.

    The model runs once, in evaluation mode and without gradients; it and the random state of torch
    are left as they were. On the ``meta`` device it costs nothing.

    Args:
        model: any module.
        example_input: what the model is called on: a tensor, or a tuple, list or dict of several
            inputs. The counts are for all its samples.
        masks: parameter name -> bool tensor of the weight's shape; any mapping. With the effective
            masks, ``direct`` gives the effective multiply-adds. Layers without a mask are dense,
            but for the masked layers of :mod:`fastprune.nn`, which have their own.
    Returns:
        :class:`Macs`, its rows in the order of ``named_modules()``; layers that did not run are
        left out.
    Raises:
        TypeError: ``model`` is no module, ``masks`` no mapping of names to bool tensors.
        ValueError: a mask has an unknown name or another shape than its weight, or no layer that
            ran multiplies by the weight; the message names the mask.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    matched = [] if masks is None else match(model, readable(masks))
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LAYERS)}
    uses = _uses(model, layers, example_input)
    ran = {id(w) for n in uses for _, w, _, _ in weights_in(layers[n])}
    kept: dict[int, Tensor] = {}
    for name, weight, mask in matched:
        if id(weight) not in ran:
            raise ValueError(
                f"masks[{name!r}]: no linear, convolution or equilibrium layer with this weight ran"
            )
        # A shared weight may have a mask under each of its names.
        before = kept.get(id(weight))
        kept[id(weight)] = mask if before is None else before & mask.to(before.device)
    rows = []
    for name in (n for n in layers if n in uses):
        layer, times = layers[name], uses[name]
        for attribute, values, own, factor in weights_in(layer):
            chosen = kept.get(id(values), own)
            nnz = values.numel() if chosen is None else int(chosen.sum())
            parameter = f"{name}.{attribute}" if name else attribute
            counts = (factor * n * times for n in (values.numel(), nnz))
            rows.append(LayerMacs(parameter, type(layer).__name__, *counts))
    return Macs(tuple(rows))


def weights_in(layer: Any) -> list[tuple[str, Tensor, Tensor | None, int]]:
    """The weights of a layer: name, values, own mask, and multiplications at each place."""
    if isinstance(layer, MonDEQLayer):
        matrices = [(n, getattr(layer, n), getattr(layer, f"{n}_mask")) for n in ("A", "B")]
        return [(n, w, mask, 2) for n, w, mask in matrices if w is not None]
    own = layer.weight_mask if isinstance(layer, MaskedLayer) else None
    return [("weight", layer.weight, own, 1)]


def places(layer: Any, x: Tensor, output: Tensor) -> int:
    """How many places of its result a layer multiplies by each of its weights at, in one call."""
    if isinstance(layer, TRANSPOSED):
        return x.numel() // max(int(layer.in_channels), 1)
    linear = isinstance(layer, (nn.Linear, MonDEQLinear))
    features = layer.out_features if linear else layer.out_channels
    return output.numel() // max(int(features), 1)


def _uses(model: nn.Module, layers: Mapping[str, Any], example_input: Any) -> dict[str, int]:
    """How often each layer multiplies by each of its weights in one call of the model."""
    uses: dict[str, int] = {}

    def count(name: str, module: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        uses[name] = uses.get(name, 0) + places(module, inputs[0], output)

    args, kwargs = call_arguments(example_input)
    handles = [layer.register_forward_hook(partial(count, name)) for name, layer in layers.items()]
    try:
        with preserved(model), evaluating(model), torch.no_grad():
            # Modules that write to their buffers even in evaluation mode write to copies.
            buffers = {n: b.clone() for n, b in model.named_buffers()}
            functional_call(model, buffers, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return uses


def _cells(row: LayerMacs) -> tuple[str, ...]:
    density = f"{shown(row.density, row.direct):.4f}"
    return (row.name, row.kind, f"{row.dense:,}", f"{row.direct:,}", density)
