"""``prune`` and ``score``: the two calls that users make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastprune.distributed.call import link_of
from fastprune.masks import Masks
from fastprune.ops.global_topk_mask import Scope
from fastprune.pruners.arguments import masks_of, network_of, sparsity_of, weights_of
from fastprune.pruners.base import Pruner, checked_scores, fused, run, warn_of_empty_layers
from fastprune.pruners.effective import Chain, measuring, run_effective
from fastprune.pruners.network import Loss
from fastprune.pruners.plan import SCOPES, Quota, plan_counts
from fastprune.pruners.registry import make_pruner, takes_input
from fastprune.pruners.state import preserved
from fastprune.pruners.targets import Selection, refuse_rowless
from fastprune.quotas.formulas import OnInvalid
from fastprune.schedules import Schedule


def prune(
    model: nn.Module,
    method: str | Pruner | type[Pruner],
    sparsity: float | None = None,
    *,
    data: Any = None,
    loss: Loss | None = None,
    example_input: Any = None,
    batches_per_step: int | None = None,
    steps: int | None = None,
    schedule: Schedule | Sequence[Sequence[int]] | None = None,
    scope: Scope = "global",
    quota: Quota | None = None,
    on_invalid: OnInvalid | None = None,
    include: Selection = None,
    exclude: Selection = None,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    temperature: float | None = None,
    revive: bool | None = None,
    effective: bool = False,
    progress: Callable[[int, int], Any] | None = None,
    group: Any = None,
) -> Masks:
    r"""Choose which weights of a model to keep.

    With N prunable weights, exactly k = floor((1 - sparsity) N + 0.5) are kept, evaluated in
    float64. Equal scores: the earlier weight wins, parameters in ``named_parameters()`` order. The
    model is not changed in any way: weights, buffers, gradients, training flags, hooks and the
    random state of torch are left as they were, bit for bit, also when something raises; use
    ``masks.apply_(model)`` to zero the pruned weights.

    =============  =====================================================  =======  ==============
    method         score, the largest kept                                steps    own arguments
    =============  =====================================================  =======  ==============
    ``random``     uniform noise                                          1        generator
    ``magnitude``  \|w\|                                                  1
    ``lamp``       w^2 / sum of the squares not smaller, in the layer     1
    ``snip``       \|w g\|                                                1
    ``grasp``      w (H g), signed                                        1        temperature
    ``synflow``    \|w dR/dw\|                                            100      example_input
    ``force``      \|w g(w . m)\|, w dense: pruned weights may return     60       revive
    ``iter-snip``  \|w . m g(w . m)\|                                     60
    ``grasp-it``   g(w . m)^2                                             60
    =============  =====================================================  =======  ==============

    Any method may run T steps: each scores the network at the last step's mask m, and keeps the
    count that the schedule says. Except in ``force``, a pruned weight never returns.

    Args:
        model: any module, on any device, in the mode (train or eval) in which it is to be scored;
            SynFlow switches to eval by itself. Gradients are taken for frozen weights too.
        method: a name from the table (case, hyphens and underscores do not matter), or a
            :class:`Pruner` subclass or instance.
        sparsity: fraction to prune, in [0, 1]. May be left out when ``schedule`` is a sequence, or
            ``quota`` fixes the layers' sparsities.
        data: (x, y) batches: a list, a ``DataLoader``, any iterable; or one pair (x, y). The model
            is called as ``model(x)``, ``model(*x)`` for a list or tuple, ``model(**x)`` for a dict.
            Batches are moved to the model's device. Several batches are averaged with equal weight
            per sample.
        loss: ``loss(model(x), y)``: the mean over the batch, as a scalar tensor. ``data`` and
            ``loss`` describe the task: methods with no use for them leave them unread, so that one
            call serves every method.
        example_input: SynFlow: an input of the model, for its shape; without it, the first x of
            ``data`` serves.
        batches_per_step: None uses all of ``data`` at every step; n uses the next n batches,
            beginning again when ``data`` ends. An iterator (a generator) cannot begin again: None
            reads it whole into memory, n reads on and raises if it ends too early.
        steps: T >= 1; None: as in the table, or the length of an explicit schedule.
        schedule: ``"exponential"`` (the default), ``"linear"``, ``"cubic"``, or the kept count
            after each step; see :func:`fastprune.schedules.kept_counts`. With scope ``layer`` or
            ``neuron`` a sequence has one sequence of counts, one per layer, for each step.
        scope: what competes: ``global``: all weights; ``layer``: those of one layer, of which
            floor((1 - sparsity) n_l + 0.5) stay; ``neuron``: those of one output row; ``filter``:
            whole output rows against each other, by the l2 norm of their scores, of which
            floor((1 - sparsity) F + 0.5) stay. Schedules count accordingly.
        quota: how the sparsity is shared out among the layers; weights then compete within their
            layer only, and the counts are those of :func:`fastprune.quotas.counts`: exactly k in
            all. A name (``"uniform"``, ``"uniform-plus"``, ``"erk"``, ``"smart-ratio"``,
            ``"igq"``); a function that takes the weights' shapes and the sparsity and returns one
            sparsity per layer, asked anew at the sparsity of each step; or fixed layer sparsities,
            a sequence in the order of the parameters or a mapping by name
            (:func:`fastprune.quotas.of` masks). With fixed ones ``sparsity`` may be left out, and
            each layer follows the schedule, which must be a named one, by itself.
        on_invalid: with ``quota``, what to do when a formula asks for a density above 1, or
            rounding leaves a layer without a weight: ``"redistribute"`` or ``"error"``. None:
            densities are redistributed, and an emptied layer is warned about.
        include, exclude: which weights are prunable; see
            :func:`fastprune.pruners.prunable`. By default, all linear and convolution weights, and
            A and B of equilibrium layers. The others are left dense and not counted.
        dtype: torch.float64 or torch.float32: score in that dtype, on copies of parameters,
            buffers and floating-point inputs. None: in the model's own, gradients summed in
            float64 and scores computed in float32 (float64 for float64 weights); SynFlow in
            float64.
        generator: Random: the source of the noise. Without it, two calls give the same masks.
        temperature: GraSP: divides the output before the loss, 200 by default.
        revive: FORCE: False keeps pruned weights from returning.
        effective: ``sparsity`` is the effective one
            (:func:`fastprune.effective_sparsity`), followed on ``example_input``, or on the first x
            of ``data``. The scores and steps are those of the same direct sparsity, up to the step
            that passes the target; there the number of pruned units is bisected. The masks are
            those just below the target: one weight fewer would pass it.
        progress: called as ``progress(step, steps)`` after each step.
        group: a ``torch.distributed`` process group whose ranks hold the same model (under DDP:
            give ``ddp.module``) and make this call together, each with ``data`` of its own. What
            is averaged over batches is averaged over those of all ranks, by number of samples; all
            ranks return the same masks. An error on one rank is an error on all. Models sharded
            with FSDP2 need no group; so far their weights can be pruned by ``magnitude``.
    Returns:
        Masks of the prunable weights, on the weights' devices.
    Raises:
        ValueError: an argument is out of range, missing, or not used by the method; a score is NaN
            (the message names the layer); the loss is not finite; ``include`` or ``exclude``
            matches nothing; an effective sparsity cannot be reached (the message says which is the
            nearest that can: at high sparsities a network falls apart at one weight); ``quota``
            comes with another scope, does not add up to the sparsity, or
            is invalid where ``on_invalid`` is ``"error"``.
        TypeError: an argument is of the wrong kind.
    Warns:
        UserWarning: a layer is left without a weight; the message names it.

    Memory beside the model: a copy of its state, and one float64 sum per prunable weight.
    Papers: 002 (de Jorge et al. 2021), Algorithm 1; 003 (Vysogorets and Kempe 2023), sections 3
    and 4; 000, Appendix B.
    """
    link = None if group is None else link_of(group)
    with nullcontext() if link is None else link.agreement():
        pruner = make_pruner(
            method,
            {
                "example_input": example_input if not effective or takes_input(method) else None,
                "generator": generator,
                "temperature": temperature,
                "revive": revive,
            },
        )
        if scope not in SCOPES:
            raise ValueError(f"scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
        if scope == "filter" and pruner.signed:
            raise ValueError(
                f"scope: 'filter' takes norms, and the scores of {pruner.name} are signed"
            )
        if progress is not None and not callable(progress):
            raise TypeError(f"progress: expected a callable, got {type(progress).__name__}")
        sparsity = sparsity_of(sparsity, schedule, quota)
        weights = weights_of(model, include, exclude)
        refuse_rowless(model, weights, scope)
        if schedule is None:
            schedule = "exponential"
        if steps is None and isinstance(schedule, str):
            steps = pruner.default_steps
        plan = plan_counts(
            {n: w.shape for n, w in weights.items()},
            sparsity,
            scope,
            quota,
            on_invalid,
            schedule,
            steps,
            monotone=not pruner.revive,
        )
        if effective and (sparsity is None or group is not None):
            what = "sparsity" if sparsity is None else "group"
            raise ValueError(
                f"{what}: effective=True {'needs' if sparsity is None else 'has no'} it"
            )
        chain = Chain({n: w.shape for n, w in weights.items()}, scope, quota) if effective else None
        if quota is not None:
            scope = "layer"
    with preserved(model):
        with nullcontext() if link is None else link.agreement():
            network = network_of(model, weights, pruner, data, loss, batches_per_step, dtype, link)
        if chain is None:
            masks = run(pruner, network, plan, scope, progress, group, link)
        else:
            assert sparsity is not None
            example = example_input if example_input is not None else network.first_input()
            if example is None:
                raise ValueError("example_input: effective=True needs it, or data, to follow paths")
            measure = measuring(model, network.names, example)
            masks = run_effective(pruner, network, plan, chain, scope, sparsity, measure, progress)
        result = Masks(masks)
    warn_of_empty_layers(masks, pruner.name or type(pruner).__name__)
    return result


def score(
    model: nn.Module,
    method: str | Pruner | type[Pruner],
    *,
    data: Any = None,
    loss: Loss | None = None,
    example_input: Any = None,
    masks: Mapping[str, Tensor] | None = None,
    include: Selection = None,
    exclude: Selection = None,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
    temperature: float | None = None,
) -> dict[str, Tensor]:
    """The raw scores of one step of a method, by parameter name; :func:`prune` keeps the largest.

    Args:
        masks: score the pruned network w . m; any mapping of parameter names to bool tensors.
            Names that it lacks are dense. FORCE scores pruned weights with their dense value;
            where the score has the factor w . m, pruned weights score 0. None: the dense network.

    All other arguments are those of :func:`prune`, with all batches of ``data`` in use.

    Returns:
        For each prunable weight a tensor of its shape, on its device: float32, or float64 for
        float64 weights, ``dtype=torch.float64`` and SynFlow. Signed for GraSP. NaN is not refused.
    Raises:
        ValueError, TypeError: as :func:`prune`; a mask of an unknown name, another shape or dtype.
    """
    pruner = make_pruner(
        method,
        {"example_input": example_input, "generator": generator, "temperature": temperature},
    )
    weights = weights_of(model, include, exclude)
    known = {} if masks is None else masks_of(model, masks)
    with preserved(model):
        network = network_of(model, weights, pruner, data, loss, None, dtype)
        network.masks = known
        network.begin_step()
        return {n: s.detach() for n, s in fused(checked_scores(pruner, network)).items()}
