"""Networks by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from fastprune.models import external
from fastprune.models._common import Shape
from fastprune.models.deq import ResNetDEQ
from fastprune.models.lenet import LeNet5, lenet_300_100
from fastprune.models.mondeq import mondeq_conv, mondeq_fc
from fastprune.models.resnet import resnet_thin, resnet_wide
from fastprune.models.sap import CNN, linear, mlp
from fastprune.models.vgg import vgg16, vgg19, vgg_small
from fastprune.models.wide_resnet import WideResNet


@dataclass(frozen=True)
class _Entry:
    """How to build one network, and the data that its paper feeds it."""

    build: Callable[..., nn.Module]
    in_shape: Shape = (3, 32, 32)
    num_classes: int = 10


_DIGITS: Shape = (1, 28, 28)
_IMAGENET: Shape = (3, 224, 224)

_TABLE: dict[str, _Entry] = {
    "lenet-300-100": _Entry(lenet_300_100, _DIGITS),
    "lenet-5": _Entry(LeNet5),
    "vgg-small": _Entry(vgg_small, (1, 8, 8)),
    "vgg-16": _Entry(vgg16),
    "vgg-19": _Entry(vgg19),
    "resnet-18": _Entry(partial(resnet_wide, 18)),
    "resnet-20": _Entry(partial(resnet_thin, 20)),
    "resnet-32": _Entry(partial(resnet_thin, 32)),
    "resnet-50": _Entry(partial(resnet_wide, 50)),
    "resnet-56": _Entry(partial(resnet_thin, 56)),
    "resnet-deq": _Entry(ResNetDEQ),
    "resnet18-imagenet": _Entry(partial(resnet_wide, 18, stem="imagenet"), _IMAGENET, 1000),
    "resnet50-imagenet": _Entry(partial(resnet_wide, 50, stem="imagenet"), _IMAGENET, 1000),
    "wide-resnet-28-2": _Entry(partial(WideResNet, 28, 2)),
    "wide-resnet-28-4": _Entry(partial(WideResNet, 28, 4)),
    "wide-resnet-28-8": _Entry(partial(WideResNet, 28, 8)),
    "mlp": _Entry(mlp, _DIGITS),
    "cnn": _Entry(CNN),
    "linear": _Entry(linear, _DIGITS),
    "mondeq-fc": _Entry(mondeq_fc, _DIGITS),
    "mondeq-conv": _Entry(mondeq_conv),
}


def _key(name: str) -> str:
    """Lower case without '-', '_' and spaces; 'wrn' stands for 'wideresnet'."""
    return re.sub(r"^wrn(?=\d)", "wideresnet", re.sub(r"[-_\s]", "", name).lower())


_BY_KEY: dict[str, _Entry] = {_key(name): entry for name, entry in _TABLE.items()}


def names() -> list[str]:
    """Names of fastprune's own networks, in a fixed order.

    ``create`` takes more: any spelling of these that differs in case, '-' and '_', and the names
    of torchvision and timm.
    """
    return list(_TABLE)


def default_input_shape(name: str) -> Shape:
    """(channels, height, width) that ``create(name)`` builds for.

    The shape of the data that the network's paper trains it on; (3, 224, 224) for a network of
    torchvision or timm.

    Raises:
        ValueError: the name is unknown; the message lists close ones.
    """
    entry = _BY_KEY.get(_key(name))
    if entry is not None:
        return entry.in_shape
    external.find(name, names())
    return _IMAGENET


def create(
    name: str,
    *,
    num_classes: int | None = None,
    in_shape: Shape | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a network by name, freshly initialized, on torch's default device and dtype.

    Weights are drawn from torch's global generator: Kaiming normal, fan in, biases 0, for
    fastprune's own networks (``kaiming_normal_`` redraws with another fan); N(0, 0.01^2) inside
    the cell of resnet-deq; torch's own uniform law for the monDEQs.

    Args:
        name: one of ``names()``; case, '-' and '_' do not matter (``"resnet50"`` is
            ``"resnet-50"``, ``"lenet300100"`` is ``"lenet-300-100"``, ``"wrn-28-2"`` is
            ``"wide-resnet-28-2"``). Any other name is looked up in torchvision, then in timm;
            ``"torchvision:NAME"`` and ``"timm:NAME"`` ask for one of them.
        num_classes: number of logits; None means 10, or 1000 for the ``-imagenet`` networks, or
            whatever torchvision or timm choose.
        in_shape: (channels, height, width) of a sample; None means ``default_input_shape(name)``.
            Of a timm network only the channels are set; torchvision's take 3.
        kwargs: passed to the network: ``stable=True`` (all ResNets and WideResNets: Stable ResNet,
            paper 002, Appendix D), ``shortcut="projection"`` (ResNet-20, -32, -56),
            ``batch_norm=True`` (LeNets, as in paper 003), arguments of :class:`fastprune.nn.DEQ`
            (resnet-deq), or what torchvision and timm take.
    Returns:
        A module that maps float (N, channels, height, width) to (N, num_classes) logits, in
        training mode.
    Raises:
        ValueError: the name is unknown (the message lists close ones and says whether torchvision
            and timm can be used), or ``num_classes`` or ``in_shape`` does not suit the network.
        TypeError: the network does not take one of ``kwargs``.
    """
    entry = _BY_KEY.get(_key(name))
    if entry is None:
        return external.create(name, names(), num_classes, in_shape, kwargs)
    return entry.build(
        num_classes=entry.num_classes if num_classes is None else num_classes,
        in_shape=entry.in_shape if in_shape is None else in_shape,
        **kwargs,
    )
