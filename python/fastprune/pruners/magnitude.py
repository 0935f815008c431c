"""Magnitude pruning."""

from __future__ import annotations

from fastprune.pruners.base import Pruner, Scores
from fastprune.pruners.network import Network


class Magnitude(Pruner):
    """|w|: the largest weights stay. Paper 000, Appendix B."""

    name = "magnitude"

    def score(self, network: Network) -> Scores:
        """See :meth:`Pruner.score`."""
        return Scores(network.weights(), form="magnitude")
