"""SNIP: connection sensitivity."""

from __future__ import annotations

from fastprune.pruners.base import Pruner, Scores
from fastprune.pruners.network import Network


class SNIP(Pruner):
    """|w dL/dw|: the effect of removing a weight on the loss, to first order.

    Over several batches the gradient is averaged, and with it the signed sensitivity w dL/dw,
    before the absolute value is taken. With T > 1 steps this is Iter-SNIP.

    Lee et al. 2019; paper 002, eqs. (2) and (3); paper 000, Appendix B.
    One forward and one backward pass per batch and step.
    """

    name = "snip"
    needs_data = True

    def score(self, network: Network) -> Scores:
        """See :meth:`Pruner.score`."""
        return Scores(network.weights(), network.gradient(), "saliency")
