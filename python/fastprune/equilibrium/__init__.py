"""Pruning equilibrium models: what paper 000 counts, tabulates and compares.

Pruning itself is that of any model: :func:`fastprune.prune` finds U, A and B by name.
"""

from fastprune.equilibrium.parameters import effective_parameters, equal_size_channels
from fastprune.equilibrium.tables import matrix_sparsities

__all__ = ["effective_parameters", "equal_size_channels", "matrix_sparsities"]
