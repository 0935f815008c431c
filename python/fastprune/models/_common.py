"""What every network definition shares: argument checks and the papers' initialization."""

from __future__ import annotations

import math

from torch import nn

Shape = tuple[int, int, int]
"""(channels, height, width) of one input sample."""


def check_arguments(
    num_classes: int, in_shape: Shape, min_side: int = 1, reason: str = ""
) -> Shape:
    """Check what every constructor takes and return ``in_shape`` as a tuple.

    Args:
        num_classes: width of the last layer, at least 1.
        in_shape: (channels, height, width), all at least 1.
        min_side: smallest height and width with which the network still has a 1x1 map at its end.
        reason: why ``min_side`` is what it is; ends the error message.
    Raises:
        ValueError: an argument is out of range; the message names it.
    """
    if type(num_classes) is not int or num_classes < 1:
        raise ValueError(f"num_classes: expected an integer >= 1, got {num_classes!r}")
    try:
        shape = tuple(in_shape)
    except TypeError:
        shape = ()
    if len(shape) != 3 or any(type(n) is not int or n < 1 for n in shape):
        raise ValueError(
            f"in_shape: expected three integers >= 1 (channels, height, width), got {in_shape!r}"
        )
    channels, height, width = shape
    if min(height, width) < min_side:
        raise ValueError(
            f"in_shape: height and width must be at least {min_side} ({reason}), got {in_shape!r}"
        )
    return channels, height, width


def kaiming_normal_(model: nn.Module, fan: str = "in") -> nn.Module:
    """Initialize every linear and convolution weight from a normal law with std sqrt(2 / fan).

    Biases become 0; BatchNorm scale and shift become 1 and 0. Samples come from torch's global
    random generator, in the order of ``model.modules()``.

    Args:
        model: changed in place, and returned.
        fan: ``"in"`` (He et al. 2015; paper 002, Appendix A), ``"out"``, or ``"avg"``, the mean of
            the two (paper 003, Table 1). Fans count the kernel area and divide by the groups.
    Raises:
        ValueError: ``fan`` is none of the three.
    """
    if fan not in ("in", "out", "avg"):
        raise ValueError(f"fan: expected 'in', 'out' or 'avg', got {fan!r}")
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            weight = module.weight
            groups = module.groups if isinstance(module, nn.Conv2d) else 1
            fan_in = weight[0].numel()
            fan_out = weight.numel() // weight.shape[1] // groups
            count = {"in": fan_in, "out": fan_out, "avg": (fan_in + fan_out) / 2}[fan]
            nn.init.normal_(weight, 0.0, math.sqrt(2.0 / count))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.reset_running_stats()
            if module.affine:
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
    return model
