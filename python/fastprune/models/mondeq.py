"""Networks of one monotone equilibrium layer (Winston and Kolter 2020), as in paper 000."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastprune.models._common import Shape, check_arguments
from fastprune.nn import MonDEQConv2d, MonDEQLinear

# Paper 000, section 2.1 and methods.
_SOLVES = {"m": 1.0, "solver": "pr", "alpha": 1.0, "tol": 1e-2, "max_iter": 300}


def mondeq_fc(
    num_classes: int = 10, in_shape: Shape = (1, 28, 28), *, features: int = 87, **settings: Any
) -> nn.Sequential:
    """Flatten, MonDEQLinear, Linear: 84 313 parameters on 28x28 digits.

    Args:
        num_classes: number of logits; input (N, channels, height, width), output (N, num_classes).
        in_shape: (channels, height, width); any.
        features: of the equilibrium.
        settings: passed to :class:`fastprune.nn.MonDEQLinear`; Peaceman-Rachford with alpha 1, m 1,
            tol 1e-2, 300 iterations at most where not given.
    Raises:
        ValueError: an argument is out of range.
    Weights are drawn as those of ``nn.Linear``, as the paper's. Paper: 000, Table D1 (FC).
    """
    channels, height, width = check_arguments(num_classes, in_shape)
    model = nn.Sequential()
    model.add_module("flatten", nn.Flatten())
    mon = MonDEQLinear(channels * height * width, features, **{**_SOLVES, **settings})
    model.add_module("mon", mon)
    model.add_module("head", nn.Linear(features, num_classes))
    return model


def mondeq_conv(
    num_classes: int = 10,
    in_shape: Shape = (3, 32, 32),
    *,
    features: int | None = None,
    pool: int | None = None,
    **settings: Any,
) -> nn.Sequential:
    """MonDEQConv2d (3x3), average pooling, Flatten, Linear: 172 218 parameters on CIFAR-10.

    The equilibrium's map is by two larger than the image, its ring of zeros is pooled with it.

    Args:
        num_classes: number of logits; input (N, channels, height, width), output (N, num_classes).
        in_shape: (channels, height, width); sides of at least 2.
        features: channels of the equilibrium; None: 54 for one input channel, else 81. (Table D1
            says 54 for MNIST beside 84 460 parameters, which are those of 56; 54 have 79 500.)
        pool: side of the pooled windows; None: 4, or 2 where the image is smaller than 16, such as
            8x8 digits.
        settings: passed to :class:`fastprune.nn.MonDEQConv2d`; defaults as :func:`mondeq_fc`.
    Raises:
        ValueError: an argument is out of range.
    Weights are drawn as those of ``nn.Conv2d``. Paper: 000, Table D1 (single convolution).
    """
    channels, height, width = check_arguments(num_classes, in_shape, 2, "pooling of a padded map")
    features = (54 if channels == 1 else 81) if features is None else features
    pool = (4 if min(height, width) >= 16 else 2) if pool is None else pool
    model = nn.Sequential()
    model.add_module("mon", MonDEQConv2d(channels, features, **{**_SOLVES, **settings}))
    model.add_module("pool", nn.AvgPool2d(pool))
    model.add_module("flatten", nn.Flatten())
    places = ((height + 2) // pool) * ((width + 2) // pool)
    model.add_module("head", nn.Linear(features * places, num_classes))
    return model
