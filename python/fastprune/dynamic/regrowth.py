"""What methods share that drop some weights and grow as many others: the count never changes."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastprune.checks import fraction, whole
from fastprune.dynamic.base import DynamicPruner
from fastprune.dynamic.layers import all_but_last_linear
from fastprune.ops.global_topk_mask import global_topk_mask
from fastprune.pruners.plan import Quota, plan_counts
from fastprune.pruners.targets import Selection
from fastprune.quotas.counting import apportioned


class RegrowingPruner(DynamicPruner):
    """Start from random masks; at a refresh drop weights and grow as many elsewhere.

    The kept count is k = floor((1 - sparsity) N + 0.5) throughout. A weight that is grown starts
    at 0, and so does what ``optimizer`` remembers of it. All randomness comes from one generator,
    whose state is part of :meth:`state_dict`; it is asked for one seed per random choice, so that
    masks do not depend on the device.

    A subclass says what is dropped and grown: :meth:`new_masks`, by :meth:`survivors` and
    :meth:`grow`.
    """

    needs_optimizer: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        *,
        every: int,
        until: int | None,
        quota: Quota,
        optimizer: Optimizer | None,
        seed: int,
        generator: torch.Generator | None,
        **more: Any,
    ) -> None:
        self.sparsity = fraction(sparsity, "sparsity")
        self.every = whole(every, "every", 1, None)
        self.until = None if until is None else whole(until, "until", 0, None)
        self.quota = quota
        wanted = optimizer is not None or self.needs_optimizer
        if wanted and not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        self.optimizer = optimizer
        seed = whole(seed, "seed", 0, 2**63 - 1)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator: expected a torch.Generator, got {type(generator).__name__}"
            )
        self.generator = torch.Generator().manual_seed(seed) if generator is None else generator
        super().__init__(model, **more)

    @classmethod
    def prunable(
        cls, model: nn.Module, include: Selection, exclude: Selection
    ) -> dict[str, nn.Parameter]:
        """All linear and convolution weights but that of the last linear layer."""
        return all_but_last_linear(model, include, exclude)

    def initial_masks(self) -> dict[str, Tensor]:
        """As many weights of each layer as the quota says, drawn at random."""
        if self.optimizer is not None:
            trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
            for name, w in self._weights.items():
                if id(w) not in trained:
                    raise ValueError(f"optimizer: {name} is not among its parameters")
        shapes = {n: w.shape for n, w in self._weights.items()}
        (counts,) = plan_counts(
            shapes, self.sparsity, "global", self.quota, None, "linear", 1, False
        )
        assert isinstance(counts, list)
        masks = global_topk_mask(
            self._values(), k=counts, scope="layer", score="noise", seed=self._draw()
        )
        return dict(zip(self._weights, masks, strict=True))

    def is_due(self, step: int) -> bool:
        """Every ``every`` steps, before ``until``."""
        return step % self.every == 0 and (self.until is None or step < self.until)

    @abstractmethod
    def new_masks(self, step: int) -> dict[str, Tensor]:
        """The masks after a refresh."""

    def extra_state(self) -> dict[str, Any]:
        """The state of the generator."""
        return {"generator": self.generator.get_state()}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`extra_state`."""
        self.generator.set_state(state["generator"].cpu())

    # -- parts of a refresh ----------------------------------------------------------------------

    def kept(self) -> list[int]:
        """Kept weights of each layer."""
        return [int(m.sum()) for m in self.current.values()]

    def survivors(self, dropped: Sequence[int]) -> list[Tensor]:
        """The masks without the ``dropped`` smallest magnitudes of each layer.

        Of equal magnitudes the later is dropped. A kept weight that is NaN is an error.
        """
        return global_topk_mask(
            self._values(),
            k=[n - d for n, d in zip(self.kept(), dropped, strict=True)],
            scope="layer",
            score="magnitude",
            within=list(self.current.values()),
            names=list(self._weights),
        )

    def grow(
        self,
        kept: list[Tensor],
        counts: Sequence[int],
        scores: list[Tensor] | None = None,
        *,
        returning: bool = False,
    ) -> dict[str, Tensor]:
        """New masks: ``kept``, and in each layer ``counts`` of the positions outside it.

        The positions with the largest abs(score), equal ones by the earlier index; None: random
        ones. Weights and optimizer state of what has grown are set to 0, and so are the weights
        that are absent now. ``returning``: what was dropped just now and grows again stays as it
        was.
        """
        grown = global_topk_mask(
            self._values() if scores is None else scores,
            k=list(counts),
            scope="layer",
            score="noise" if scores is None else "magnitude",
            seed=self._draw() if scores is None else None,
            within=[~m for m in kept],
            names=list(self._weights),
        )
        masks = {}
        for (name, w), old, new in zip(self._weights.items(), kept, grown, strict=True):
            masks[name] = old | new
            fresh = new & ~self.current[name] if returning else new
            self._clear(w, fresh, masks[name] & ~fresh)
        return masks

    @torch.no_grad()
    def _clear(self, weight: nn.Parameter, fresh: Tensor, living: Tensor) -> None:
        weight.masked_fill_(~living, 0)
        memory = {} if self.optimizer is None else self.optimizer.state.get(weight, {})
        for value in memory.values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                value.masked_fill_(fresh, 0)

    def _values(self) -> list[Tensor]:
        return [w.detach() for w in self._weights.values()]

    def _draw(self) -> int:
        device = self.generator.device
        return int(torch.randint(2**63 - 1, (), generator=self.generator, device=device))


def share_out(total: int, wants: Sequence[float], room: Sequence[int]) -> list[int]:
    """Whole numbers in proportion to ``wants`` that add up to ``total``, by largest remainder.

    What would exceed the room of a layer goes to the others in the same proportion; where all that
    still have room want nothing, in proportion to their room.

    Args:
        total: at most sum(room).
        wants: finite numbers >= 0.
        room: the most that each layer takes.
    """
    shares = [0.0] * len(room)
    layers, left = [i for i, r in enumerate(room) if r], total
    while layers and left:
        asked = wants if any(wants[i] > 0 for i in layers) else room
        largest = max(asked[i] for i in layers)  # scaled: sums of tiny numbers lose digits
        whole_want = math.fsum(asked[i] / largest for i in layers)
        for i in layers:
            shares[i] = left * (asked[i] / largest) / whole_want
        full = [i for i in layers if shares[i] >= room[i]]
        if not full:
            break
        for i in full:
            shares[i] = float(room[i])
            left -= room[i]
        layers = [i for i in layers if i not in full]
        for i in layers:
            shares[i] = 0.0
    return apportioned(shares, total, [0] * len(room), room)
