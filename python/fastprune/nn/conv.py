"""2-d convolution layer with an unstructured mask."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprune.nn.batch_last import scale_and_shift, versions
from fastprune.nn.masked import MaskedLayer, WeightGrad, adopt_
from fastprune.ops.masked_conv2d import apply_conv2d, check_room
from fastprune.ops.pattern import autocast, check_operands


class MaskedConv2d(MaskedLayer, nn.Conv2d):
    """``nn.Conv2d`` of which only the weights under a mask exist.

    Same parameters and ``state_dict`` keys as ``nn.Conv2d``, plus ``weight_mask``; a dense
    layer's ``state_dict`` loads with ``strict=True`` and leaves the mask as it is. Stride,
    padding (numbers, ``"same"``, ``"valid"``, every ``padding_mode``), dilation and groups are
    those of the dense layer. A channels_last input is read through a copy; the output is
    contiguous.

    Args:
        layer: the dense layer; its Parameters are used, not copied.
        mask: bool tensor shaped like the weight, True where kept; copied.
        weight_grad: ``"sampled"`` or ``"dense"``, see :func:`fastprune.masked_linear`.
        sparse: False runs torch's dense convolution on the masked weight instead of the sparse
            kernel, with the same meaning.
    Shape: as ``nn.Conv2d``: (batch, in, height, width) or (in, height, width).
    Raises:
        TypeError, ValueError: ``layer`` is not an ``nn.Conv2d`` with a plain weight, or ``mask``
            does not fit it.
    """

    # Set where a ReLU or a BatchNorm that follows was fused into the layer. The BatchNorm is not a
    # submodule: it stays where the model has it.
    fused_relu = False
    _norm: tuple[nn.BatchNorm2d, ...] = ()
    _folded: tuple[Any, Tensor, Tensor] | None = None
    own_attributes = (
        *MaskedLayer.own_attributes,
        "_kernel_padding",
        "fused_relu",
        "_norm",
        "_folded",
    )

    def __init__(
        self,
        layer: nn.Conv2d,
        mask: Tensor,
        *,
        weight_grad: WeightGrad = "sampled",
        sparse: bool = True,
    ) -> None:
        if not isinstance(layer, nn.Conv2d):
            raise TypeError(f"layer: expected an nn.Conv2d, got {type(layer).__name__}")
        nn.Module.__init__(self)
        for name in (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "transposed",
            "output_padding",
            "groups",
            "padding_mode",
            "_reversed_padding_repeated_twice",
        ):
            setattr(self, name, getattr(layer, name))
        adopt_(self, layer)
        self.become_masked_(mask, weight_grad, sparse)

    def become_masked_(self, mask: Tensor, weight_grad: WeightGrad, sparse: bool = True) -> None:
        """As :meth:`MaskedLayer.become_masked_`; splits the padding as well."""
        super().become_masked_(mask, weight_grad, sparse)
        # (left, right, top, bottom): symmetric zero padding goes to the kernel, the rest to F.pad.
        left, right, top, bottom = self._reversed_padding_repeated_twice
        zeros = self.padding_mode == "zeros"
        self._kernel_padding = (
            (int(top), int(left)) if zeros and left == right and top == bottom else None
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(batch, in, height, width) -> (batch, out, out height, out width).

        ``residual``, of the result's shape, is added to it.
        """
        if self._norm and (torch.is_grad_enabled() or not self.sparse or self.training):
            return self._unfused(x, residual)
        if not self.sparse:
            y: Tensor = self._conv_forward(x, self._dense_weight(), self.bias)
            y = y if residual is None else y + residual
            return torch.relu(y) if self.fused_relu else y
        # Not through Module.__getattr__, which is slow.
        own, own_bias = self._parameters["weight"], self._parameters["bias"]
        kept, kept_bias = self._folded_parameters() if self._norm else (own, own_bias)
        assert kept is not None
        x, weight, bias = autocast(x, kept, kept_bias)
        check_operands("masked_conv2d", x, weight, bias)
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(
                f"masked_conv2d: x: expected shape (batch, {self.in_channels}, height, width), "
                f"got {tuple(x.shape)}"
            )
        padding = self._kernel_padding
        if padding is None:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=mode)
            padding = (0, 0)
        check_room(x, weight, padding, self.dilation)  # type: ignore[arg-type]
        return apply_conv2d(
            x,
            weight,
            bias,
            self._fresh_pattern(),
            self.stride,  # type: ignore[arg-type]
            padding,
            self.dilation,  # type: ignore[arg-type]
            self.groups,
            self.weight_grad == "dense",
            self._layout,
            weight is kept,
            residual,
            self.fused_relu,
        )

    def train(self, mode: bool = True) -> MaskedConv2d:
        """As ``nn.Module.train``; folded weights are forgotten."""
        self._folded = None
        super().train(mode)
        return self

    def fuse_norm(self, norm: nn.BatchNorm2d) -> None:
        """Apply ``norm``, as it is in evaluation mode, with the convolution (inference only).

        Folded weights are kept until the weight, the bias or the BatchNorm changes in place, or
        ``train()`` or ``eval()`` is called. A change through ``.data`` alone is not noticed.
        """
        self._norm = (norm,)

    def _unfused(self, x: Tensor, residual: Tensor | None) -> Tensor:
        norm, relu = self._norm, self.fused_relu
        self._norm, self.fused_relu = (), False
        try:
            y: Tensor = norm[0](self(x))
        finally:
            self._norm, self.fused_relu = norm, relu
        y = y if residual is None else y + residual
        return torch.relu(y) if relu else y

    def _folded_parameters(self) -> tuple[Tensor, Tensor]:
        (norm,) = self._norm
        now = versions(
            (self.weight, self.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        )
        kept = self._folded
        if kept is None or now is None or kept[0] != now:
            # Outside inference mode, whose tensors count no changes: nothing of them could be kept.
            with torch.inference_mode(False), torch.no_grad():
                scale, shift = scale_and_shift(norm)
                if self.bias is not None:
                    shift = shift + self.bias.double() * scale
                weight = self.weight.double() * scale[:, None, None, None]
                kept = (now, weight.to(self.weight.dtype), shift.to(self.weight.dtype))
            self._folded = kept
        return kept[1], kept[2]

    def extra_repr(self) -> str:
        """The dense layer's description and the mask's."""
        return f"{super().extra_repr()}, {self._mask_repr()}"
