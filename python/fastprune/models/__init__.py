"""Plain definitions of the networks that the papers prune, and a lookup by name.

``create("resnet-50")`` builds one, ``names()`` lists them, and names of torchvision and timm work
where those packages are installed.
"""

from fastprune.models._common import kaiming_normal_
from fastprune.models.registry import create, default_input_shape, names

__all__ = ["create", "default_input_shape", "kaiming_normal_", "names"]
