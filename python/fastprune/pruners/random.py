"""Random pruning."""

from __future__ import annotations

import torch
from torch import Tensor

from fastprune.pruners.base import Pruner
from fastprune.pruners.network import Network


class Random(Pruner):
    """Uniform noise in [0, 1), drawn layer after layer with ``torch.rand(shape)``.

    Args:
        generator: where the noise comes from; it advances. None: torch's default CPU generator,
            whose state is put back afterwards like all random state, so that a second call gives
            the same masks. Pass a generator to get others.

    The noise is float32, or float64 where the scoring dtype is, and drawn on the generator's own
    device: one CPU generator gives the same masks for a model on any device.
    """

    name = "random"
    options = ("generator",)

    def __init__(self, generator: torch.Generator | None = None) -> None:
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator: expected a torch.Generator, got {type(generator).__name__}"
            )
        self.generator = generator

    def score(self, network: Network) -> dict[str, Tensor]:
        """See :meth:`Pruner.score`."""
        device = torch.device("cpu") if self.generator is None else self.generator.device
        return {
            name: torch.rand(w.shape, generator=self.generator, dtype=w.dtype, device=device).to(
                w.device
            )
            for name, w in network.dense().items()
        }
