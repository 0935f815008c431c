"""Drop-in layers: same parameters and state_dict keys as the dense layer, plus the mask."""

from fastprune.nn.conv import MaskedConv2d
from fastprune.nn.deq import DEQ
from fastprune.nn.linear import MaskedLinear
from fastprune.nn.masked import MaskedLayer
from fastprune.nn.mon_deq import MonDEQLayer, MonDEQLinear
from fastprune.nn.mon_deq_conv import MonDEQConv2d
from fastprune.ops.solve_info import SolveInfo

__all__ = [
    "DEQ",
    "MaskedConv2d",
    "MaskedLayer",
    "MaskedLinear",
    "MonDEQConv2d",
    "MonDEQLayer",
    "MonDEQLinear",
    "SolveInfo",
]
