"""Layerwise quotas: how the sparsity of a network is shared out among its layers.

By formula: :func:`uniform`, :func:`uniform_plus`, :func:`erk`, :func:`smart_ratio`, :func:`igq`.
By what a method does: :func:`induced`, or :func:`of` masks at hand. :func:`counts` makes whole
numbers of them. ``fastprune.prune(..., quota="igq")`` prunes accordingly.
"""

from fastprune.quotas.counting import counts
from fastprune.quotas.formulas import erk, igq, smart_ratio, uniform, uniform_plus
from fastprune.quotas.induced import induced, of

__all__ = ["counts", "erk", "igq", "induced", "of", "smart_ratio", "uniform", "uniform_plus"]
