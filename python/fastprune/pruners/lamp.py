"""Layer-adaptive magnitude pruning."""

from __future__ import annotations

from fastprune.pruners.base import Pruner, Scores
from fastprune.pruners.network import Network


class LAMP(Pruner):
    """w^2 over the sum of the squares that are not smaller, of the same layer; in float64.

    Within a layer the order is that of |w|; across layers the score makes them comparable, so that
    no layer is emptied early. Lee et al., "Layer-adaptive sparsity for the magnitude-based
    pruning", 2021, Equation 3. With scope ``global`` or ``layer``.
    """

    name = "lamp"

    def score(self, network: Network) -> Scores:
        """See :meth:`Pruner.score`."""
        return Scores(network.weights(), form="lamp")
