"""What the iterative methods share: the initial state, the masks, the rounds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastprune.iterative.layers import Layers, first_masks
from fastprune.iterative.rounds import Round, round_of
from fastprune.iterative.snapshot import check_fits, restore_, snapshot
from fastprune.iterative.units import UnitScope, check_scope
from fastprune.masks import Masks, readable
from fastprune.masks_model import match
from fastprune.ops.pq_bound import pq_of
from fastprune.pruners.arguments import weights_of
from fastprune.pruners.base import warn_of_empty_layers
from fastprune.pruners.targets import Selection, refuse_rowless


class IterativePruning(ABC):
    """Base of :class:`LotteryTicket`, :class:`OneShotIterative` and :class:`SAP`.

    A subclass says which weights a round prunes (``_select``), of which state (``_ranked``), and
    where the model goes on from (``_target``).

    Attributes:
        model: the model, changed in place.
        masks: what is left, as :class:`fastprune.Masks`.
        history: one :class:`Round` per call of :meth:`prune`.
    """

    settings_names: ClassVar[tuple[str, ...]] = ("scope", "p", "q")
    points: ClassVar[tuple[str, ...]] = ("init", "point")

    def __init__(
        self,
        model: nn.Module,
        *,
        scope: UnitScope = "global",
        p: float = 0.5,
        q: float = 1.0,
        include: Selection = None,
        exclude: Selection = None,
    ) -> None:
        self._op = op = type(self).__name__
        self.scope = check_scope(scope, op)
        self.p, self.q = pq_of(p, q, op)
        weights = weights_of(model, include, exclude)
        refuse_rowless(model, weights, scope)
        self.model = model
        self._masks = first_masks(model, weights)
        self._layers = Layers(model)
        self.history: list[Round] = []
        self._finished = False
        # States by role: "init", and others as the method has them.
        self._states: dict[str, dict[str, Tensor]] = {"init": snapshot(model)}

    # -- what a method decides ---------------------------------------------------------------------

    @abstractmethod
    def _select(
        self, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The masks of the next round, inside ``masks``."""

    def _ranked(self) -> Mapping[str, Tensor]:
        """The weights that a round ranks."""
        return dict(self.model.named_parameters())

    def _target(self) -> Mapping[str, Tensor]:
        """The state that the model goes back to after a round."""
        return self._states.get("point", self._states["init"])

    # -- use ---------------------------------------------------------------------------------------

    @property
    def masks(self) -> Masks:
        """What is left; all ones before the first round."""
        return Masks(self._masks)

    @property
    def round(self) -> int:
        """Rounds so far."""
        return len(self.history)

    def remember(self) -> None:
        """Make the model's present state the one that later rounds rewind to.

        Call it after step k of the first training, to "rewind to step k" instead of to the initial
        state. A later call replaces the earlier one. It keeps parameters and buffers, a copy.

        Raises:
            RuntimeError: the method does not rewind, or :meth:`finish` has been called.
        """
        self._refuse_finished("remember")
        if "point" not in self.points:
            raise RuntimeError(f"{self._op}: remember: the method does not rewind")
        self._states["point"] = snapshot(self.model)

    def prune(self, *, optimizer: torch.optim.Optimizer | None = None) -> Masks:
        """End a round: prune by the weights as they are, then put the model back.

        The layers of the pruned weights become masked layers in place (the same Parameter objects),
        so that training gives pruned weights no gradient and no effect; they are stored as zeros.
        Each runs the kernel, dense or sparse, that was faster for its sizes and density when it was
        timed, once, at the first call. Parameters and buffers go back, bit for bit, to the
        remembered state; gradients are dropped. A new optimizer, with a new learning-rate schedule,
        should train the next round; or give ``optimizer`` here. Momentum of the last round would
        move the rewound weights.

        Args:
            optimizer: its state (momenta, step counts) is cleared; its learning rates and parameter
                groups are not touched.
        Returns:
            The masks of what is left.
        Raises:
            ValueError: a weight under the mask is NaN, by name; nothing has changed then.
            RuntimeError: :meth:`finish` has been called.
        Warns:
            UserWarning: a layer is left without a weight.

        Cost beside the selection: the indices of :attr:`history`, two PQ and two Gini indices of
        all weights; at the first call the timing, some 0.1 s for each kind of layer.
        """
        self._refuse_finished("prune")
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"{self._op}: optimizer: expected a torch.optim.Optimizer, got "
                f"{type(optimizer).__name__}"
            )
        for role in self._states:
            check_fits(self.model, self._states[role], f"{self._op}: the model's {role} state")
        weights = {n: w.detach() for n, w in self._ranked().items() if n in self._masks}
        before = {n: m.to(weights[n].device) for n, m in self._masks.items()}
        after = self._select(weights, before)
        record = round_of(self.round + 1, weights, before, after, self.p, self.q)
        self._layers.mask_(after)
        restore_(self.model, self._target())
        self._layers.clear_pruned_()
        self._masks = after
        self.history.append(record)
        if optimizer is not None:
            optimizer.state.clear()
        warn_of_empty_layers(after, self._op)
        return self.masks

    def measure_kernels(self, example_input: Any) -> None:
        """Time dense against sparse layers now, instead of at the first :meth:`prune`.

        A run that is saved before its first round and resumed then computes the same bits. The
        model and the random state of torch are left as they were.

        Args:
            example_input: what the model is called on in training: a tensor, or a tuple, list or
                dict of several inputs, of the training batch's shape.
        """
        self._layers.measure(self._masks, example_input)

    def use_kernel_times(self, times: Mapping[str, Any]) -> None:
        """Choose by these times, by module name, as :meth:`state_dict` has them."""
        self._layers.times = dict(times)

    def finish(self) -> nn.Module:
        """Turn the masked layers back into plain ones, zeros stored in pruned weights.

        The weights are those that the model has: train once more after the last :meth:`prune` for
        a trained ticket. No further round is possible.

        Returns:
            The model.
        """
        self._layers.unmask_()
        self._finished = True
        return self.model

    def _refuse_finished(self, call: str) -> None:
        if self._finished:
            raise RuntimeError(f"{self._op}: {call}: finish() has ended the run")

    # -- checkpoints -------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """The arguments that make this run what it is, fit for JSON."""
        return {n: getattr(self, n) for n in self.settings_names}

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs beside the model's and the optimizer's own state.

        A nested dict of tensors (masks and remembered states, not copied) and of values fit for
        JSON. Use ``torch.save`` and ``torch.load(weights_only=True)``.
        """
        return {
            "method": self._op,
            "settings": self.settings(),
            "masks": dict(self._masks),
            "states": {role: dict(state) for role, state in self._states.items()},
            "history": [r.as_dict() for r in self.history],
            "kernels": self._layers.times,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the run that :meth:`state_dict` describes.

        Make the object anew on a model of the same architecture, load this, then load the model's
        own state: the layers are masked by then, so that its keys fit.

        Raises:
            ValueError: another method, other settings, or masks and states that do not fit the
                model; nothing has changed then.
            KeyError: a part is missing.
        """
        self._refuse_finished("load_state_dict")
        if state["method"] != self._op:
            raise ValueError(f"{self._op}: state: it belongs to a run of {state['method']}")
        for name, value in self.settings().items():
            if state["settings"].get(name) != value:
                raise ValueError(
                    f"{self._op}: state: {name} was {state['settings'].get(name)!r} in the saved "
                    f"run and is {value!r} here"
                )
        masks = readable(state["masks"])
        if masks.keys() != self._masks.keys():
            odd = sorted(masks.keys() ^ self._masks.keys())
            raise ValueError(f"{self._op}: state: its masks cover other weights; odd: {odd}")
        own = {n: m.to(w.device, copy=True) for n, w, m in match(self.model, masks)}
        states = {}
        for role, tensors in state["states"].items():
            if role not in self.points:
                raise ValueError(f"{self._op}: state: unknown state {role!r}")
            check_fits(self.model, tensors, f"{self._op}: state: {role}")
            states[role] = {n: t.detach().clone() for n, t in tensors.items()}
        if "init" not in states:
            raise ValueError(f"{self._op}: state: the initial state is missing")
        history = [Round.from_dict(r) for r in state["history"]]
        self._layers.times = state["kernels"]
        if history:
            self._layers.mask_(own)
        self._masks, self._states, self.history = own, states, history
