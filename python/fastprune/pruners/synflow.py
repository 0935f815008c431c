"""SynFlow: iterative synaptic flow, without data."""

from __future__ import annotations

from typing import Any

import torch

from fastprune.pruners.base import Pruner, Scores
from fastprune.pruners.network import Network


class SynFlow(Pruner):
    """|w dR/dw|, R the sum of the outputs of the network of absolute values on an all-ones input.

    Every floating-point entry of the state (weights, biases, BatchNorm scale, shift and statistics)
    is replaced by its absolute value, the network runs in evaluation mode, and the input is one
    sample of ones: a ReLU network is then linear, and the score is the sum over all paths through
    the weight of the products of their absolute weights. Other nonlinearities stay as they are.
    100 steps by default; a pruned weight never returns; in float64, as deep networks need.

    A monotone equilibrium layer at absolute values of its parameters (U, its bias, A, B, g, h) is
    one more such layer: its equilibrium on the input that comes is found, and R is differentiated
    through it by implicit differentiation, as exactly as its ``tol`` lets the solves be. With ReLU
    that is a linear pass over the units that are positive; unlike in a feed-forward network some
    may be off, as W = (1 - m) I - A^T A + B - B^T has negative entries whatever the signs of A and
    B, and the derivative by a weight may be negative: the score is its size. Paper 000 (Appendix C)
    scores with sigmoids instead: :func:`fastprune.nn.equilibrium_settings`.

    Args:
        example_input: what the model is called on (a tensor, or a tuple, list or dict of tensors
            for several inputs), with a batch dimension; only shapes and kinds are read. None:
            x of the first batch of ``data``.

    Tanaka et al. 2020, Algorithm 1; paper 003, section 3; paper 000, Appendix B.
    One forward and one backward pass of batch 1 per step.
    """

    name = "synflow"
    default_steps = 100
    default_dtype = torch.float64
    options = ("example_input",)

    def __init__(self, example_input: Any = None) -> None:
        self.example_input = example_input

    def __repr__(self) -> str:
        return "SynFlow()"  # an input is no text

    def score(self, network: Network) -> Scores:
        """See :meth:`Pruner.score`."""
        example = self.example_input if self.example_input is not None else network.first_input()
        if example is None:
            raise ValueError("example_input: synflow needs it (or data), for the input's shape")
        return Scores(network.weights(), network.synaptic_flow(example), "saliency")
