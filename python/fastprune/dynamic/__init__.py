"""Pruning while training: masks that change as the weights do."""

from fastprune.dynamic.base import DynamicPruner
from fastprune.dynamic.feedback import FeedbackCompression
from fastprune.dynamic.magnitude import DPF, Incremental, OneShot
from fastprune.dynamic.random_growth import DSR, SET
from fastprune.dynamic.rigl import RigL
from fastprune.dynamic.soft_filters import SFP
from fastprune.dynamic.sparse_momentum import SparseMomentum
from fastprune.dynamic.updates import MaskUpdate, pruning_error

__all__ = [
    "DPF",
    "DSR",
    "SET",
    "SFP",
    "DynamicPruner",
    "FeedbackCompression",
    "Incremental",
    "MaskUpdate",
    "OneShot",
    "RigL",
    "SparseMomentum",
    "pruning_error",
]
