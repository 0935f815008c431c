"""GraSP: gradient signal preservation."""

from __future__ import annotations

import math

from fastprune.pruners.base import Pruner, Scores
from fastprune.pruners.network import Network


class GraSP(Pruner):
    """w (H g), signed, the largest stay: removing the others keeps the gradient's norm highest.

    g and H are the gradient and Hessian of the mean loss over all batches of the step, with respect
    to the prunable weights only. The Hessian is never formed: H g comes from double backward,
    through equilibrium layers by implicit differentiation twice. (ReLU is curved nowhere; paper
    000, Appendix C, scores equilibria with sigmoids: :func:`fastprune.nn.equilibrium_settings`.)

    Args:
        temperature: divides the model's output (the logits) before the loss; > 0. With 1 the
            output is passed on untouched and may be anything the loss takes.
    Raises:
        ValueError: ``temperature`` is not a positive finite number.

    Wang et al. 2020; paper 002, eq. (4), which removes the largest -w (H g); paper 000, Appendix B.
    Two forward and three backward passes per batch; the graph of one batch at a time in memory.
    """

    name = "grasp"
    needs_data = True
    options = ("temperature",)
    signed = True

    def __init__(self, temperature: float = 200.0) -> None:
        if isinstance(temperature, bool) or not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature: expected a positive finite number, got {temperature!r}")
        self.temperature = float(temperature)

    def score(self, network: Network) -> Scores:
        """See :meth:`Pruner.score`."""
        temperature = None if self.temperature == 1 else self.temperature
        return Scores(network.weights(), network.hessian_gradient(temperature), "product")
