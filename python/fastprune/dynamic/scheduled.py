"""The base of the methods that rank weights by magnitude on a schedule."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, TypeAlias

from torch import Tensor, nn

from fastprune.checks import fraction, whole
from fastprune.dynamic.base import DynamicPruner
from fastprune.dynamic.layers import all_but_last_linear
from fastprune.ops.global_topk_mask import Scope, global_topk_mask
from fastprune.ops.topk_checks import kept_count
from fastprune.pruners.plan import SCOPES, units
from fastprune.pruners.targets import Selection, refuse_rowless
from fastprune.schedules import SCHEDULES, count_at

SparsitySchedule: TypeAlias = (
    Literal["cubic", "constant", "linear", "exponential"] | Callable[[int], float]
)


class ScheduledPruner(DynamicPruner):
    """Keep the largest magnitudes, as many as a schedule says; the base of the methods below.

    ``nested``: a pruned weight never returns.
    """

    nested: ClassVar[bool] = True
    _selected: int | list[int] | None = None

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        *,
        every: int,
        schedule: SparsitySchedule,
        ramp_steps: int,
        scope: Scope,
        **more: Any,
    ) -> None:
        self.sparsity = fraction(sparsity, "sparsity")
        self.every = whole(every, "every", 1, None)
        self.ramp_steps = whole(ramp_steps, "ramp_steps", 0, None)
        names = (*SCHEDULES, "constant")
        if not callable(schedule) and schedule not in names:
            raise ValueError(
                f"schedule: expected one of {', '.join(names)} or a function of the step, got "
                f"{schedule!r}"
            )
        if scope not in SCOPES:
            raise ValueError(f"scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
        if schedule != "constant" and 0 < self.ramp_steps < self.every:
            warnings.warn(
                f"{self.name}: masks are refreshed every {self.every} steps, but the sparsity "
                f"is to rise over {self.ramp_steps}: it will come at once",
                UserWarning,
                stacklevel=3,
            )
        self.schedule = schedule
        self.scope: Scope = scope
        super().__init__(model, **more)

    @classmethod
    def prunable(
        cls, model: nn.Module, include: Selection, exclude: Selection
    ) -> dict[str, nn.Parameter]:
        """All linear and convolution weights but that of the last linear layer (paper 001, 5.1)."""
        return all_but_last_linear(model, include, exclude)

    def counts(self, step: int) -> int | list[int]:
        """Kept counts after ``step`` training steps, as ``scope`` counts them.

        The last counts are floor((1 - sparsity) n + 0.5); see
        :func:`fastprune.schedules.kept_counts` for those before.
        """
        density = 1.0 - self.sparsity
        counts = []
        for n in units((w.shape for w in self._weights.values()), self.scope):
            k = kept_count(density, n)
            if not callable(self.schedule):
                counts.append(count_at(self.schedule, n, k, density, step, self.ramp_steps))
            elif step >= self.ramp_steps:
                counts.append(k)
            else:
                now = fraction(self.schedule(step), f"schedule({step})")
                counts.append(kept_count(1.0 - now, n))
        return counts[0] if self.scope in ("global", "filter") else counts

    def select(self, count: int | list[int]) -> dict[str, Tensor]:
        """The masks of the largest magnitudes."""
        names = list(self._weights)
        within = None
        if self.nested and self._masks is not None:
            within = [self.current[n] for n in names]
        self._selected = count
        masks = global_topk_mask(
            [w.detach() for w in self._weights.values()],
            k=count,
            scope=self.scope,
            score="magnitude",
            within=within,
            names=names,
        )
        return dict(zip(names, masks, strict=True))

    def initial_masks(self) -> dict[str, Tensor]:
        """The masks of step 0."""
        refuse_rowless(self.model, self._weights, self.scope)
        return self.select(self.counts(0))

    def is_due(self, step: int) -> bool:
        """Every ``every`` steps."""
        return step % self.every == 0

    def new_masks(self, step: int) -> dict[str, Tensor]:
        """The largest magnitudes of the weights as they are stored."""
        return self.select(self.counts(step))

    def final_masks(self) -> dict[str, Tensor]:
        """The masks as they are, if they were chosen with the final counts; else refreshed."""
        count = self.counts(max(self.ramp_steps, self.steps))
        return self.current if count == self._selected else self.select(count)

    def extra_state(self) -> dict[str, Any]:
        """The counts of the last selection."""
        return {"selected": self._selected}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`extra_state`."""
        self._selected = state["selected"]
