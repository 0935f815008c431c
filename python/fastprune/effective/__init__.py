"""Effective sparsity: reach of inputs and outputs through any model, exactly.

``effective_sparsity`` and the rest are also names of :mod:`fastprune`; what is here besides is for
teaching it an operation of one's own.
"""

from fastprune.effective import plots
from fastprune.effective.measure import (
    effective_compression,
    effective_masks,
    effective_sparsity,
)
from fastprune.effective.norms import PathNorms, path_norms
from fastprune.effective.program import Value, Weight
from fastprune.effective.trace import Trace, UnknownOperationError, register_rule
from fastprune.effective.trim import trim

__all__ = [
    "PathNorms",
    "Trace",
    "UnknownOperationError",
    "Value",
    "Weight",
    "effective_compression",
    "effective_masks",
    "effective_sparsity",
    "path_norms",
    "plots",
    "register_rule",
    "trim",
]
