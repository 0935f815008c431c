"""Linear layer with an unstructured mask."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastprune.nn.masked import MaskedLayer, WeightGrad, adopt_
from fastprune.ops.masked_linear import apply_linear
from fastprune.ops.pattern import autocast, check_operands


class MaskedLinear(MaskedLayer, nn.Linear):
    """``nn.Linear`` of which only the weights under a mask exist.

    Same parameters and ``state_dict`` keys as ``nn.Linear``, plus ``weight_mask``; a dense
    layer's ``state_dict`` loads with ``strict=True`` and leaves the mask as it is.

    Args:
        layer: the dense layer; its Parameters are used, not copied.
        mask: bool tensor (out, in), True where kept; copied.
        weight_grad: ``"sampled"`` or ``"dense"``, see :func:`fastprune.masked_linear`.
        sparse: False runs torch's dense product on the masked weight instead of the sparse
            kernel, with the same meaning: what :func:`fastprune.accelerate` picks where that is
            faster.
    Shape: as ``nn.Linear``: (..., in) -> (..., out).
    Raises:
        TypeError, ValueError: ``layer`` is not an ``nn.Linear`` with a plain weight, or ``mask``
            does not fit it.
    """

    def __init__(
        self,
        layer: nn.Linear,
        mask: Tensor,
        *,
        weight_grad: WeightGrad = "sampled",
        sparse: bool = True,
    ) -> None:
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"layer: expected an nn.Linear, got {type(layer).__name__}")
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        adopt_(self, layer)
        self.become_masked_(mask, weight_grad, sparse)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if not self.sparse:
            return F.linear(x, self._dense_weight(), self.bias)
        own = self._parameters["weight"]  # not through Module.__getattr__, which is slow
        assert own is not None
        x, weight, bias = autocast(x, own, self._parameters["bias"])
        check_operands("masked_linear", x, weight, bias)
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"masked_linear: x: expected shape (..., {self.in_features}), got {tuple(x.shape)}"
            )
        return apply_linear(
            x,
            weight,
            bias,
            self._fresh_pattern(),
            self.weight_grad == "dense",
            self._layout,
            weight is own,
        )

    def extra_repr(self) -> str:
        """The dense layer's description and the mask's."""
        return f"{super().extra_repr()}, {self._mask_repr()}"
