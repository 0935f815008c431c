"""Sparse momentum: growth where the momentum is large."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastprune.checks import fraction, whole
from fastprune.dynamic.regrowth import RegrowingPruner, share_out
from fastprune.dynamic.updates import MaskUpdate
from fastprune.nn.masked import MaskedLayer
from fastprune.ops.global_topk_mask import kept_scores
from fastprune.pruners.plan import Quota
from fastprune.pruners.targets import Selection


class SparseMomentum(RegrowingPruner):
    r"""Sparse momentum: drop the smallest weights, grow where the momentum is largest.

    The momentum M is SGD's ``momentum_buffer``, or Adam's exp_avg / (sqrt(exp_avg_sq) + eps). After
    every ``every`` steps layer l drops ceil(r_t nnz_l) of its kept weights, those of smallest
    magnitude (of equal ones the later), with

    .. math:: r_t = \frac{r}{2} (1 + \cos(\pi t / T)), \qquad T = \texttt{total\_steps}.

    As many grow in all, shared out in proportion to the mean of abs(M) over the weights that each
    layer kept before (whole numbers by largest remainder; what does not fit into a full layer goes
    to the others in the same proportion). A layer grows the absent positions with the largest
    abs(M), equal ones by the earlier index; what was dropped just now competes.

    Args:
        model: changed in place; see :class:`fastprune.dynamic.DynamicPruner`. The last linear
            layer, biases and normalization stay dense.
        sparsity: as in :class:`SET`.
        optimizer: of all prunable weights; SGD with momentum, Adam or one that keeps the same
            state. A weight for which it has none yet has momentum 0.
        every: steps between refreshes; the paper's is one epoch.
        total_steps: T above; from then on the masks stay.
        prune_rate: r above; 0.5 is the default of the authors' program.
        quota: of the initial masks; uniform in the paper.
        seed, generator, include, exclude, example_input, group: as in :class:`SET`.
    Raises: as :class:`SET`; ValueError: the optimizer keeps no momentum of a weight; a momentum is
        NaN or infinite.

    Cost: forward and input gradient on the packed pattern, the weight gradient dense; every step
    stores zeros in the absent weights, so that weight decay adds nothing to their momentum. A
    refresh is two selections (:func:`fastprune.global_topk_mask`), one read of the momentum and a
    packing; with Adam, a copy of the momentum too.
    Where it strays from the authors' program: that one lets layers that are less than a fifth
    pruned drop fewer weights, rounds each layer's share by itself and makes up for the difference
    at later refreshes, and leaves the optimizer's state of grown weights as it is; here it starts
    at 0, with the weight.
    Paper: Dettmers & Zettlemoyer 2019, *Sparse networks from scratch: faster training without
    losing performance*, Algorithm 1.
    """

    name = "sparse-momentum"
    weight_grad = "dense"
    needs_optimizer = True

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        optimizer: Optimizer,
        every: int,
        total_steps: int,
        prune_rate: float = 0.5,
        *,
        quota: Quota = "uniform",
        seed: int = 0,
        generator: torch.Generator | None = None,
        include: Selection = None,
        exclude: Selection = None,
        example_input: Any = None,
        group: Any = None,
    ) -> None:
        self.total_steps = whole(total_steps, "total_steps", 1, None)
        self.prune_rate = fraction(prune_rate, "prune_rate")
        super().__init__(
            model,
            sparsity,
            every=every,
            until=self.total_steps,
            quota=quota,
            optimizer=optimizer,
            seed=seed,
            generator=generator,
            include=include,
            exclude=exclude,
            example_input=example_input,
            group=group,
        )

    def adopt_masks(self, masks: dict[str, Tensor]) -> dict[str, list[MaskedLayer]]:
        """As all methods do, and zeros in the absent weights, which dense gradients would move."""
        users = super().adopt_masks(masks)
        self._clear_absent(masks)
        return users

    def initial_masks(self) -> dict[str, Tensor]:
        """Random, once the optimizer is known to keep a momentum."""
        assert self.optimizer is not None
        weights = {id(w): n for n, w in self._weights.items()}
        for group in self.optimizer.param_groups:
            name = next((weights[id(p)] for p in group["params"] if id(p) in weights), None)
            if name is not None and not group.get("momentum") and "betas" not in group:
                raise ValueError(
                    f"optimizer: expected SGD with momentum, or Adam, got "
                    f"{type(self.optimizer).__name__} without momentum for {name}"
                )
        return super().initial_masks()

    def step(self) -> MaskUpdate | None:
        """See :meth:`DynamicPruner.step`; also stores zeros in the absent weights."""
        if not self._finished:
            self._clear_absent(self.current)
        return super().step()

    def new_masks(self, step: int) -> dict[str, Tensor]:
        """The smallest dropped, as many grown where the momentum is largest."""
        rate = self.prune_rate / 2 * (1 + math.cos(math.pi * step / self.total_steps))
        momenta = self._momenta()
        # Summed in a fixed order, so that ranks and numbers of threads agree on the shares.
        active = kept_scores(
            momenta, list(self.current.values()), score="magnitude", names=list(self._weights)
        )
        means = [
            total / n if n else 0.0
            for total, n in zip(active.total.tolist(), active.kept.tolist(), strict=True)
        ]
        for name, mean in zip(self._weights, means, strict=True):
            if not math.isfinite(mean):
                raise ValueError(f"{self.name}: the momentum of {name} is NaN or infinite")
        before = self.kept()
        dropped = [min(math.ceil(rate * n), n) for n in before]
        kept = self.survivors(dropped)
        room = [m.numel() - n + d for m, n, d in zip(kept, before, dropped, strict=True)]
        return self.grow(kept, share_out(sum(dropped), means, room), momenta)

    def _momenta(self) -> list[Tensor]:
        assert self.optimizer is not None
        eps = {id(p): g.get("eps") for g in self.optimizer.param_groups for p in g["params"]}
        found = []
        for name, w in self._weights.items():
            state = self.optimizer.state.get(w, {})
            buffer = state.get("momentum_buffer")
            if buffer is not None:
                found.append(buffer.detach())
            elif "exp_avg" in state and "exp_avg_sq" in state:
                spread = state["exp_avg_sq"].sqrt().add_(eps[id(w)] or 0.0)
                found.append(state["exp_avg"] / spread)
            elif not any(isinstance(v, Tensor) and v.shape == w.shape for v in state.values()):
                found.append(torch.zeros_like(w))
            else:
                raise ValueError(
                    f"optimizer: expected momentum_buffer or exp_avg and exp_avg_sq in its state "
                    f"of {name}, got {', '.join(state)}"
                )
        return found

    @torch.no_grad()
    def _clear_absent(self, masks: Mapping[str, Tensor]) -> None:
        for name, w in self._weights.items():
            w.masked_fill_(~masks[name], 0)
