"""Dense layers become masked ones where they stand, and back: the same module object throughout.

The class of the module changes and its Parameters stay, so that optimizers, hooks and every
reference to the layer go on working.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastprune.masks import readable
from fastprune.masks_model import match
from fastprune.nn import MaskedConv2d, MaskedLayer, MaskedLinear, MonDEQLayer
from fastprune.nn.masked import WeightGrad, release_

# Exact types: a subclass may do something else in its forward pass.
_MASKED: dict[type[nn.Module], type[MaskedLayer]] = {
    nn.Linear: MaskedLinear,
    nn.Conv2d: MaskedConv2d,
}
_DENSE: dict[type[nn.Module], type[nn.Module]] = {m: d for d, m in _MASKED.items()}


def can_mask(layer: nn.Module) -> bool:
    """Whether a layer can become a masked one, or is one already."""
    return type(layer) in _MASKED or type(layer) in _DENSE


def mask_layers_(
    model: nn.Module, masks: Mapping[str, Tensor], weight_grad: WeightGrad = "sampled"
) -> dict[str, list[MaskedLayer]]:
    """Turn the layers that own the masked weights into masked layers, in place.

    A layer that is masked already gets the new mask. The Parameters stay the same objects, so an
    optimizer made before goes on working. All or nothing: every name and layer is looked at before
    the first is changed.

    Args:
        model: changed in place.
        masks: parameter name -> bool tensor of the weight's shape; any mapping. The weight of a
            shared layer, or one that several layers share, needs one of its names.
        weight_grad: ``"sampled"`` or ``"dense"``, see :class:`fastprune.nn.MaskedLinear`.
    Returns:
        For each name the masked layers that multiply by that weight.
    Raises:
        TypeError, ValueError: a mask fits no parameter; a weight belongs to a layer that is
            neither ``nn.Linear`` nor ``nn.Conv2d``, or is parametrized. The message names it.
    """
    users = {name: users_of(model, name, w) for name, w, _ in match(model, readable(masks))}
    for name, layers in users.items():
        for layer in layers:
            mask = readable(masks)[name]
            if isinstance(layer, MaskedLayer):
                layer.use_weight_grad_(weight_grad)
                layer.set_mask(mask)
            else:
                mask_layer_(layer, mask, weight_grad)
    return users  # type: ignore[return-value]


def mask_layer_(layer: nn.Module, mask: Tensor, weight_grad: WeightGrad = "sampled") -> None:
    """Turn one ``nn.Linear`` or ``nn.Conv2d`` into a masked layer, in place."""
    kind = type(layer)
    try:
        layer.__class__ = _MASKED[kind]
        layer.become_masked_(mask, weight_grad)  # type: ignore[operator]
    except BaseException:
        layer.__class__ = kind
        raise


def unmask_layers_(model: nn.Module) -> None:
    """Turn all masked layers back into plain ones, in place, zeros stored in the absent weights.

    Equilibrium layers lose the masks of A and B.
    """
    for layer in model.modules():
        if type(layer) in _DENSE:
            assert isinstance(layer, MaskedLayer)
            unmask_layer_(layer)
        elif isinstance(layer, MonDEQLayer):
            unmask_equilibrium_(layer)


def unmask_equilibrium_(layer: MonDEQLayer) -> None:
    """Plain A and B again, zeros stored in the absent entries."""
    layer.set_masks(A=layer.A_mask, B=layer.B_mask)  # whatever an optimizer left there
    layer.set_masks()
    layer.__dict__.pop("sparse", None)


def unmask_layer_(layer: MaskedLayer) -> None:
    """Turn one masked layer back into the plain one, zeros stored in the absent weights."""
    with torch.no_grad():
        layer.weight.data.masked_fill_(~layer.weight_mask, 0)
    release_(layer)
    layer.__class__ = _DENSE[type(layer)]  # type: ignore[assignment]


def users_of(model: nn.Module, name: str, weight: Tensor) -> list[nn.Module]:
    """The layers that multiply by a weight; an error if one of them cannot be masked."""
    found = []
    for owner, layer in model.named_modules():
        attributes = [a for a, p in layer._parameters.items() if p is weight]
        if not attributes:
            continue
        if attributes != ["weight"] or not can_mask(layer):
            raise ValueError(
                f"{name}: no sparse layer takes the place of {type(layer).__name__} "
                f"{owner or '(the model itself)'}: leave the weight out with exclude"
            )
        found.append(layer)
    return found
