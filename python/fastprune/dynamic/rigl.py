"""RigL: growth where the gradient is large."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastprune.checks import fraction, whole
from fastprune.dynamic.regrowth import RegrowingPruner
from fastprune.dynamic.updates import MaskUpdate
from fastprune.masks import Masks
from fastprune.nn.masked import WeightGrad
from fastprune.pruners.plan import Quota
from fastprune.pruners.targets import Selection

_PATIENCE = 100


class RigL(RegrowingPruner):
    r"""The rigged lottery: drop the smallest weights, grow where the gradient is largest.

    After t training steps, if ``every`` divides t and t < T_end = ``end`` * ``total_steps``, layer
    l drops int(f(t) nnz_l) of its kept weights, those of smallest magnitude (of equal ones the
    later), and grows as many of the positions that it then lacks, those with the largest
    abs(gradient), equal ones by the earlier index:

    .. math:: f(t) = \frac{\alpha}{2} \left(1 + \cos\frac{\pi t}{T_\mathrm{end}}\right).

    What was dropped just now competes, and keeps its value if it comes back. The gradient is that
    of step t, the full dense one, as the optimizer receives it (after clipping and data-parallel
    averaging); in that step alone the weight gradient is computed dense, in all others at the
    mask. The optimizer itself never sees a gradient of an absent weight.

    Args:
        model: changed in place; see :class:`fastprune.dynamic.DynamicPruner`. The last linear
            layer, biases and normalization stay dense.
        sparsity: as in :class:`SET`.
        optimizer: of all prunable weights; the gradients are taken at the start of its ``step``,
            so not from one that computes them in there, by a closure.
        total_steps: training steps in all. More may follow, with the masks as they are.
        every: steps between refreshes.
        alpha: f(0).
        end: fraction of the training after which the masks stay.
        quota: how the kept weights are shared out among the layers: ``"erk"``, ``"uniform"``, any
            other of :mod:`fastprune.quotas`.
        seed, generator, include, exclude, example_input, group: as in :class:`SET`; only the
            initial masks are random.
    Raises: as :class:`SET`; ValueError: a gradient is NaN; RuntimeError: the optimizer has not
        stepped in the 100 steps since a refresh was due.

    A step that the optimizer leaves out (``torch.amp.GradScaler`` does after an overflow) puts a
    refresh off to the next one. A layer without a gradient stays as it is.
    Cost: training on the packed pattern, all three products, but for one dense weight gradient per
    refresh and a copy of it; a refresh is two selections (:func:`fastprune.global_topk_mask`), one
    write of the weights and a packing.
    Where it strays: in the paper a refresh takes the place of the optimizer's step, ours comes
    after it; so the magnitudes are those after the step, the gradient is that before it. The paper
    leaves the first layer dense with the uniform quota; name it in ``exclude``.
    Paper: Evci et al. 2020, *Rigging the lottery: making all tickets winners*, Algorithm 1.
    """

    name = "rigl"
    needs_optimizer = True

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        optimizer: Optimizer,
        total_steps: int,
        every: int = 100,
        alpha: float = 0.3,
        *,
        end: float = 0.75,
        quota: Quota = "erk",
        seed: int = 0,
        generator: torch.Generator | None = None,
        include: Selection = None,
        exclude: Selection = None,
        example_input: Any = None,
        group: Any = None,
    ) -> None:
        self.total_steps = whole(total_steps, "total_steps", 1, None)
        self.alpha = fraction(alpha, "alpha")
        self.end_step = fraction(end, "end") * self.total_steps
        self._waiting = 0  # steps since a refresh has been due, for want of gradients
        self._gradients: dict[str, Tensor] = {}
        super().__init__(
            model,
            sparsity,
            every=every,
            until=math.ceil(self.end_step),
            quota=quota,
            optimizer=optimizer,
            seed=seed,
            generator=generator,
            include=include,
            exclude=exclude,
            example_input=example_input,
            group=group,
        )
        self._handle = optimizer.register_step_pre_hook(self._take_gradients)
        self._listen()

    def step(self) -> MaskUpdate | None:
        """See :meth:`DynamicPruner.step`."""
        if self._expects(self.steps + 1) and not self._gradients and not self._finished:
            if self._waiting >= _PATIENCE:
                raise RuntimeError(
                    f"{self.name}: a refresh is due since {self._waiting} steps, but the optimizer "
                    "was given no gradients: call its step() before this one"
                )
            self._waiting += 1
        update = super().step()
        self._listen()
        return update

    def is_due(self, step: int) -> bool:
        """When the schedule says so, or later, as soon as there are gradients."""
        return self._expects(step) and bool(self._gradients)

    def new_masks(self, step: int) -> dict[str, Tensor]:
        """The smallest dropped, as many grown where the gradient is largest."""
        given, self._gradients, self._waiting = self._gradients, {}, 0
        at = min(step / self.end_step, 1.0)
        rate = self.alpha / 2 * (1 + math.cos(math.pi * at))
        moved = [
            int(rate * n) if name in given else 0
            for name, n in zip(self._weights, self.kept(), strict=True)
        ]
        scores = [given.get(n, torch.zeros_like(w)) for n, w in self._weights.items()]
        return self.grow(self.survivors(moved), moved, scores, returning=True)

    def finish(self) -> Masks:
        """See :meth:`DynamicPruner.finish`."""
        masks = super().finish()
        self._handle.remove()
        return masks

    def extra_state(self) -> dict[str, Any]:
        """How long a refresh has been due as well."""
        return {**super().extra_state(), "waiting": self._waiting}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`extra_state`."""
        super().load_extra_state(state)
        self._waiting = int(state["waiting"])
        self._gradients = {}
        self._listen()

    def _expects(self, step: int) -> bool:
        return self._waiting > 0 or super().is_due(step)

    def _listen(self) -> None:
        """Make the next backward pass give dense gradients if it is the one before a refresh."""
        self._set_weight_grad("dense" if self._expects(self.steps + 1) else "sampled")

    def _measure(self, min_time: float) -> None:
        self._set_weight_grad("sampled")  # as nearly all steps are
        super()._measure(min_time)
        self._listen()

    def _set_weight_grad(self, kind: WeightGrad) -> None:
        for layers in self._users.values():
            for layer in layers:
                if layer.weight_grad != kind:
                    layer.clear_pruned_()  # from now on a dense layer would save what is stored
                    layer.weight_grad = kind

    @torch.no_grad()
    def _take_gradients(self, *_: Any) -> None:
        if self._gradients or self._finished or not self._expects(self.steps + 1):
            return
        found_inf = getattr(self.optimizer, "found_inf", None)
        if found_inf is not None and float(found_inf) != 0:
            return  # a fused optimizer is called all the same, and skips the step by itself
        for name, w in self._weights.items():
            if w.grad is not None:
                self._gradients[name] = w.grad.clone()
                w.grad.masked_fill_(~self.current[name], 0)
