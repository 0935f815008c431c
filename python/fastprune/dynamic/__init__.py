"""Pruning while training: masks that change as the weights do."""

from fastprune.dynamic.base import DynamicPruner
from fastprune.dynamic.magnitude import DPF, Incremental, OneShot
from fastprune.dynamic.updates import MaskUpdate, pruning_error

__all__ = ["DPF", "DynamicPruner", "Incremental", "MaskUpdate", "OneShot", "pruning_error"]
