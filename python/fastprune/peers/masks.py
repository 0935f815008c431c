"""How the layers are pruned: evenly, unevenly, or by a real pruner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.ops import global_topk_mask
from fastprune.peers.layers import Conv, Layer, Linear

ROW_SIGMA = 0.5
"""Standard deviation of the logarithm of a row's scale in ``uneven`` masks.

With it the kept weights per row vary, relative to their mean, by 0.9, 1.3 and 1.8 (one standard
deviation) at 80, 90 and 95 %: as in the most uneven of the layers that SNIP leaves in an untrained
VGG-19 on noise (0.8, 1.2 and 2.2; its median layer 0.2, 0.3 and 0.5; random masks below 0.1).
"""

KINDS = ("random", "uneven")
"""Masks that need no network; the names of pruners are accepted where a set has one."""


def random(shape: tuple[int, ...], sparsity: float, generator: torch.Generator) -> Tensor:
    """Exactly floor((1 - sparsity) * n + 0.5) of n weights, each as likely as the others.

    Rows of a weight keep about equally many: the easiest mask for a sparse kernel.
    """
    scores = torch.rand(shape, generator=generator)
    return global_topk_mask([scores], 1 - sparsity)[0]


def uneven(shape: tuple[int, ...], sparsity: float, generator: torch.Generator) -> Tensor:
    """The largest of normal weights whose rows have log-normal scales, as many as in ``random``.

    Pruners that score a whole network at once leave rows (output channels) of unequal length,
    some of them empty, because whole channels matter more than others. This is a model of that
    with one parameter, ``ROW_SIGMA``; it is not the mask of any pruner.
    """
    rows = (shape[0], *[1] * (len(shape) - 1))
    scale = torch.exp(ROW_SIGMA * torch.randn(rows, generator=generator))
    scores = torch.randn(shape, generator=generator) * scale
    return global_topk_mask([scores], 1 - sparsity, score="magnitude")[0]


def make(kind: str, shape: tuple[int, ...], sparsity: float, seed: int) -> Tensor:
    """A mask of one of ``KINDS``: bool, shaped like the weight, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return {"random": random, "uneven": uneven}[kind](shape, sparsity, generator)


def walk(model: nn.Module, in_shape: Sequence[int]) -> dict[str, Layer]:
    """The linear and convolution layers that a network calls, in order, with batch 1.

    Args:
        model: on any device; the meta device makes it cheap.
        in_shape: (channels, height, width) of a sample.
    Returns:
        Name of the module -> its layer, for those that a :class:`Layer` can describe.
    """
    found: dict[str, Layer] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if isinstance(module, nn.Linear):
                found[name] = Linear(module.out_features, module.in_features)
            elif isinstance(module, nn.Conv2d) and module.groups == 1:
                layer = Conv(
                    module.out_channels,
                    module.in_channels,
                    inputs[0].shape[-1],
                    module.kernel_size[0],
                    module.stride[0],
                )
                if module.padding == (layer.padding, layer.padding):
                    found[name] = layer

        return hook

    handles = [m.register_forward_pre_hook(record(name)) for name, m in model.named_modules()]
    device = next(model.parameters()).device
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, *in_shape, device=device))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return found
