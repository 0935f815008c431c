"""What the masked layers share: the mask, its packed pattern, and weights that stay pruned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastprune.ops.pattern import Pattern, apply_mask, pack
from fastprune.ops.plan import LIKE_INPUT

WeightGrad = Literal["sampled", "dense"]


class MaskedLayer(nn.Module):
    """Base of :class:`MaskedLinear` and :class:`MaskedConv2d`; not used on its own.

    ``weight`` stays a dense Parameter, so optimizers, initializers, weight averages and checkpoints
    work as before. The buffer ``weight_mask`` (bool) says which weights exist. The forward pass
    never reads an absent weight. With ``weight_grad="sampled"`` (a fixed mask) absent weights also
    get no gradient and are stored as exact zeros: they are set to zero when the mask is set, when
    the layer enters evaluation mode and before its state is saved, whatever an optimizer with old
    momentum did to them. With ``weight_grad="dense"`` they keep their values and their gradients
    (dynamic pruning).
    """

    weight: Tensor
    weight_mask: Tensor
    weight_grad: WeightGrad
    sparse: bool
    _pattern: Pattern
    _packed_version: int = 0
    # How results are stored (fastprune.ops.plan): as the input is, unless accelerate decides.
    _layout: int = LIKE_INPUT
    # What accelerate found for activations with the batch innermost.
    sparse_in_chain: bool = True
    # What a plain layer does not have.
    own_attributes: ClassVar[tuple[str, ...]] = (
        "weight_grad",
        "sparse",
        "_pattern",
        "_packed_version",
        "_layout",
        "sparse_in_chain",
    )

    def become_masked_(self, mask: Tensor, weight_grad: WeightGrad, sparse: bool = True) -> None:
        """Give a module that has a dense layer's parameters and sizes its mask.

        For constructors and :mod:`fastprune.swapping`; on an error nothing has changed.
        """
        if weight_grad not in ("sampled", "dense"):
            raise ValueError(f"weight_grad: expected 'sampled' or 'dense', got {weight_grad!r}")
        _check_plain(self)
        self.use_weight_grad_(weight_grad)
        self.sparse = sparse
        self._set_mask(mask, register=True)
        self.register_state_dict_pre_hook(_clear_pruned)

    def use_weight_grad_(self, weight_grad: WeightGrad) -> None:
        """Switch between ``"sampled"`` and ``"dense"``."""
        self.weight_grad = weight_grad
        # torch's fused transformer layers read weights directly, unless a layer has hooks. Stored
        # weights are not those of the forward pass where they stay dense.
        hooks = self._forward_pre_hooks
        for key in [k for k, hook in hooks.items() if hook is _no_fast_path]:
            del hooks[key]
        if weight_grad == "dense":
            self.register_forward_pre_hook(_no_fast_path)

    def _groups(self) -> int:
        return int(getattr(self, "groups", 1))

    def _set_mask(self, mask: Tensor, register: bool) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask: expected a bool tensor, got {got}")
        if mask.shape != self.weight.shape:
            raise ValueError(
                f"mask: expected the weight's shape {tuple(self.weight.shape)}, got "
                f"{tuple(mask.shape)}"
            )
        with torch.inference_mode(False):  # whose tensors count no changes
            mask = mask.detach().to(self.weight.device).clone()
        # Packed first: if packing fails, the layer is as it was.
        pattern = pack(mask, groups=self._groups())
        if register:
            self.register_buffer("weight_mask", mask)
        else:
            self.weight_mask = mask
        self._pattern = pattern
        self._packed_version = mask._version
        self.clear_pruned_()

    def _fresh_pattern(self) -> Pattern:
        """The packed mask, packed anew if the buffer was written to (weight averaging does)."""
        if not torch.compiler.is_compiling():
            mask = self._buffers["weight_mask"]
            assert mask is not None
            if not mask.is_inference() and mask._version != self._packed_version:
                self._pattern = pack(mask, groups=self._groups())
                self._packed_version = mask._version
        return self._pattern

    def __getstate__(self) -> dict[str, Any]:
        if self.weight_mask.device.type != "meta":
            self._fresh_pattern()
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._packed_version = self.weight_mask._version  # copies count changes anew

    def set_mask(self, mask: Tensor) -> None:
        """Replace the mask, and pack it anew.

        Args:
            mask: bool tensor shaped like ``weight``, any device; it is copied.
        Raises:
            TypeError, ValueError: as :func:`fastprune.pack`; the layer is then unchanged.
        """
        self._set_mask(mask, register=False)

    @property
    def pattern(self) -> Pattern:
        """The packed mask that the sparse products read."""
        return self._pattern

    @property
    def sparsity(self) -> float:
        """Fraction of absent weights, in [0, 1]."""
        return 1.0 - self._pattern.nnz / max(self.weight_mask.numel(), 1)

    def clear_pruned_(self) -> None:
        """Store exact zeros in the absent weights (not with ``weight_grad="dense"``)."""
        self._forget()  # evaluation begins: whatever was done to the weight is seen
        if self.weight_grad == "sampled":
            with torch.no_grad():
                # Through .data: the version counter that autograd checks must not move.
                self.weight.data.copy_(apply_mask(self.weight.data, self.weight_mask))

    def present_weight(self) -> Tensor:
        """W * M as a dense tensor, with its gradient: what the dense path multiplies by."""
        return apply_mask(self.weight, self.weight_mask)

    def _dense_weight(self) -> Tensor:
        """The weight for the dense path."""
        if self.weight_grad == "dense":
            return _PrunedWithDenseGrad.apply(self.weight, self.weight_mask)  # type: ignore[no-any-return]
        if self.training or torch.is_grad_enabled():
            return self.present_weight()
        return self.weight  # zeros are stored: clear_pruned_ ran when evaluation began

    def train(self, mode: bool = True) -> MaskedLayer:
        """As ``nn.Module.train``; leaving training mode also clears the absent weights."""
        super().train(mode)
        if not mode and "weight_mask" in self._buffers and not self.weight.is_meta:
            self.clear_pruned_()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedLayer:
        self._forget()
        super()._apply(fn, recurse)
        if self._pattern.row_ptr.device != self.weight_mask.device:
            self._pattern = self._pattern.to(self.weight_mask.device)
        return self

    def _forget(self) -> None:
        # torch.utils.swap_tensors refuses a tensor that anything refers to weakly.
        if self._pattern.plan is not None:
            self._pattern.plan.forget()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        key = prefix + "weight_mask"
        added = key not in state_dict
        if added:  # a dense checkpoint: the layer keeps its mask
            state_dict[key] = self.weight_mask
        old = self.weight_mask.clone()
        self._forget()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if added:
            del state_dict[key]
        if not torch.equal(old, self.weight_mask):
            self._pattern = pack(self.weight_mask, groups=self._groups())
        self._packed_version = self.weight_mask._version
        self.clear_pruned_()

    def _mask_repr(self) -> str:
        how = "" if self.sparse else ", dense kernel"
        return f"sparsity={self.sparsity:.4f}, weight_grad={self.weight_grad}{how}"


def _clear_pruned(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    assert isinstance(module, MaskedLayer)
    module.clear_pruned_()


def _no_fast_path(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Nothing."""


def adopt_(masked: MaskedLayer, layer: nn.Module) -> None:
    """Give a new masked layer the Parameters and the mode of a dense one."""
    _check_plain(layer)
    masked.register_parameter("weight", layer.weight)  # type: ignore[arg-type]
    masked.register_parameter("bias", layer.bias)  # type: ignore[arg-type]
    nn.Module.train(masked, layer.training)


def _check_plain(layer: nn.Module) -> None:
    if getattr(layer, "parametrizations", None) or hasattr(layer, "weight_orig"):
        raise ValueError(
            "layer: expected a plain weight, got one that is parametrized or pruned by "
            "torch.nn.utils; remove that first"
        )


def release_(layer: MaskedLayer) -> None:
    """Take from a layer what :meth:`MaskedLayer.become_masked_` and its use have added."""
    layer._forget()
    hooks = layer._state_dict_pre_hooks
    for key in [k for k, hook in hooks.items() if hook is _clear_pruned]:
        del hooks[key]
    layer.use_weight_grad_("sampled")
    del layer._buffers["weight_mask"]
    for name in layer.own_attributes:
        layer.__dict__.pop(name, None)


class _PrunedWithDenseGrad(torch.autograd.Function):
    """W * M in the forward pass, the whole gradient to W in the backward pass."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        return apply_mask(weight, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
