"""Slow, obvious, plain-torch oracles: one module per op, the truth that kernels are tested against.

They are also what runs where no kernel is built (CUDA tensors until the CUDA kernels land).
"""

from fastprune.reference.global_topk_mask import global_topk_mask
from fastprune.reference.masked_conv2d import (
    masked_conv2d,
    masked_conv2d_input_grad,
    masked_conv2d_weight_grad,
)
from fastprune.reference.masked_linear import (
    masked_linear,
    masked_linear_input_grad,
    masked_linear_weight_grad,
)
from fastprune.reference.pattern import transpose, unpack
from fastprune.reference.tensor_statistics import row_power_means, tensor_statistics

__all__ = [
    "global_topk_mask",
    "masked_conv2d",
    "masked_conv2d_input_grad",
    "masked_conv2d_weight_grad",
    "masked_linear",
    "masked_linear_input_grad",
    "masked_linear_weight_grad",
    "row_power_means",
    "tensor_statistics",
    "transpose",
    "unpack",
]
