"""Drop-in layers: same parameters and state_dict keys as the dense layer, plus the mask."""

from fastprune.nn.conv import MaskedConv2d
from fastprune.nn.linear import MaskedLinear
from fastprune.nn.masked import MaskedLayer

__all__ = ["MaskedConv2d", "MaskedLayer", "MaskedLinear"]
