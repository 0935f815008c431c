"""FORCE and its relatives: pruning in many small steps, scored at the pruned network."""

from __future__ import annotations

from fastprune.pruners.base import Pruner, Scores
from fastprune.pruners.network import Network
from fastprune.pruners.snip import SNIP

DEFAULT_STEPS = 60  # paper 002, section 5.2; its CIFAR-10 runs use 300 (section 5.1)


class FORCE(Pruner):
    """|w g(w . m)|: the dense weight times the gradient taken at the pruned network.

    A pruned weight keeps a score, so it may return. With one step this is SNIP. When fewer weights
    than are to be kept have a score above 0, the rest are taken by index, so that exactly k remain.

    Args:
        revive: let pruned weights return, as Algorithm 1 does; False nests the masks, as eq. (7)
            does.
    Raises:
        TypeError: ``revive`` is not a bool.

    Paper 002, eqs. (5) and (6), Algorithm 1. One forward and one backward pass per batch and step.
    """

    name = "force"
    default_steps = DEFAULT_STEPS
    needs_data = True
    options = ("revive",)

    def __init__(self, revive: bool = True) -> None:
        if not isinstance(revive, bool):
            raise TypeError(f"revive: expected True or False, got {revive!r}")
        self.revive = revive

    def score(self, network: Network) -> Scores:
        """See :meth:`Pruner.score`."""
        return Scores(network.dense(), network.gradient(), "saliency")


class IterSNIP(SNIP):
    """|w . m g(w . m)|: SNIP in many steps. A pruned weight scores 0 and never returns.

    With one step this is SNIP. Paper 002, eq. (7) with eq. (3) (there "SNIP-It").
    """

    name = "iter-snip"
    default_steps = DEFAULT_STEPS


class GraSPIt(Pruner):
    """g(w . m)^2: keeps the gradient's norm, in many steps. A pruned weight never returns.

    Paper 002, eq. (17) with eq. (7). One forward and one backward pass per batch and step; with
    one step this is not GraSP.
    """

    name = "grasp-it"
    default_steps = DEFAULT_STEPS
    needs_data = True

    def score(self, network: Network) -> Scores:
        """See :meth:`Pruner.score`."""
        return Scores(network.gradient(), form="square")
