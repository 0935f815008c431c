"""Methods that rank weights by magnitude on a schedule: DPF, gradual pruning, one-shot pruning."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastprune.checks import whole
from fastprune.dynamic.scheduled import ScheduledPruner, SparsitySchedule
from fastprune.ops.global_topk_mask import Scope
from fastprune.pruners.targets import Selection


class DPF(ScheduledPruner):
    r"""Dynamic pruning with feedback: train dense weights through a mask that follows them.

    The model computes with m . w and the gradient taken there, whole, updates the dense w, so that
    a weight pruned too early can come back:

    .. math:: w_{t+1} = w_t - \gamma_t g(m_t \odot w_t)

    After t training steps (t = 0 is the construction) the masks are refreshed if ``every`` divides
    t: the k_t largest abs(w) of the dense weights are kept, equal ones by the earlier index,
    parameters in ``named_parameters()`` order. Between refreshes the mask stays and the weights
    move. ``model.parameters()`` are the dense weights throughout, and ``state_dict()`` saves them;
    :meth:`finish` sets the pruned ones to zero.

    Args:
        model: changed in place; see :class:`fastprune.dynamic.DynamicPruner`. The last linear
            layer, biases and normalization stay dense.
        sparsity: final fraction to prune of the prunable weights, in [0, 1]: exactly
            k = floor((1 - sparsity) N + 0.5) are kept then.
        total_steps: training steps in all. More may follow: the masks go on changing.
        every: steps between refreshes.
        schedule: how the sparsity rises over ``ramp_steps``: ``"cubic"`` s_t = s (1 - (1 - t/R)^3)
            from 0 (Zhu & Gupta 2017), ``"linear"``, ``"exponential"``
            (:func:`fastprune.schedules.kept_counts`), ``"constant"``, or a function from t to
            the sparsity.
        ramp_steps: R above; None: ``total_steps``. The paper ramps up to the second decay of the
            learning rate, 60 or 75 % of training, and trains on at the final sparsity.
        scope: ``"global"``; ``"layer"`` or ``"neuron"``: the same sparsity in every layer or row;
            ``"filter"``: whole filters, by the l2 norm of their weights, across layers.
        include, exclude: which weights are prunable; :func:`fastprune.pruners.prunable`.
            ``include`` overrides that the last linear layer stays dense.
        example_input: times the kernels at once (:meth:`measure_kernels`).
        group: a ``torch.distributed`` group whose ranks train the same model: after every refresh
            the masks are compared, and differing ones are an error.
    Raises:
        ValueError: an argument is out of range; no weights are prunable; a weight is NaN; a
            prunable weight is of a layer other than ``nn.Linear`` and ``nn.Conv2d``.

    Cost: forward and input gradient on the packed pattern, the weight gradient dense; a refresh is
    one selection (:func:`fastprune.global_topk_mask`), a packing of the changed masks, and reads
    of the weights for the pruning error. Memory: one byte per weight for the mask and two copies
    of the packed pattern.
    Paper: Lin et al. 2020, *Dynamic Model Pruning with Feedback*, Algorithm 1.
    """

    name = "dpf"
    weight_grad = "dense"
    nested = False

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        total_steps: int,
        every: int = 16,
        schedule: SparsitySchedule = "cubic",
        *,
        ramp_steps: int | None = None,
        scope: Scope = "global",
        include: Selection = None,
        exclude: Selection = None,
        example_input: Any = None,
        group: Any = None,
    ) -> None:
        self.total_steps = whole(total_steps, "total_steps", 1, None)
        super().__init__(
            model,
            sparsity,
            every=every,
            schedule=schedule,
            ramp_steps=self.total_steps if ramp_steps is None else ramp_steps,
            scope=scope,
            include=include,
            exclude=exclude,
            example_input=example_input,
            group=group,
        )

    def dense_weights(self) -> dict[str, Tensor]:
        """Copies of the dense weights w; before :meth:`finish` the parameters themselves hold them.

        Shapes and dtypes of the parameters.
        """
        return {n: w.detach().clone() for n, w in self._weights.items()}


class Incremental(ScheduledPruner):
    """Gradual magnitude pruning: the mask only loses weights, and what it loses stays lost.

    As :class:`DPF`, but gradients reach kept weights only, and a refresh chooses among those.

    Args:
        every: steps between refreshes; paper 001 takes one epoch, Zhu & Gupta 100 to 1000 steps.
        others: as in :class:`DPF`.
    Papers: Zhu & Gupta 2017, *To prune, or not to prune*; the baseline "Incremental" of Lin et al.
    2020, appendix A.2, which prunes across layers as DPF does.
    """

    name = "incremental"

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        total_steps: int,
        every: int = 100,
        schedule: SparsitySchedule = "cubic",
        *,
        ramp_steps: int | None = None,
        scope: Scope = "global",
        include: Selection = None,
        exclude: Selection = None,
        example_input: Any = None,
        group: Any = None,
    ) -> None:
        self.total_steps = whole(total_steps, "total_steps", 1, None)
        super().__init__(
            model,
            sparsity,
            every=every,
            schedule=schedule,
            ramp_steps=self.total_steps if ramp_steps is None else ramp_steps,
            scope=scope,
            include=include,
            exclude=exclude,
            example_input=example_input,
            group=group,
        )


class OneShot(ScheduledPruner):
    """Train dense, prune the smallest magnitudes once, go on with the fixed mask (fine-tuning).

    Args:
        prune_at: training steps before the pruning.
        others: as in :class:`DPF`.
    Paper: Han et al. 2015, *Learning both Weights and Connections*; the baseline "One-shot P+FT"
    of Lin et al. 2020.
    """

    name = "one-shot"

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        prune_at: int,
        *,
        scope: Scope = "global",
        include: Selection = None,
        exclude: Selection = None,
        example_input: Any = None,
        group: Any = None,
    ) -> None:
        self.prune_at = whole(prune_at, "prune_at", 0, None)
        super().__init__(
            model,
            sparsity,
            every=1,
            schedule=lambda step: 0.0,
            ramp_steps=self.prune_at,
            scope=scope,
            include=include,
            exclude=exclude,
            example_input=example_input,
            group=group,
        )

    def is_due(self, step: int) -> bool:
        """Once."""
        return step == self.prune_at
