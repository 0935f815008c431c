"""What all methods that prune while training share: masked layers, refreshes, bookkeeping."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastprune.checks import whole
from fastprune.distributed.call import link_of
from fastprune.distributed.digest import digest
from fastprune.dynamic.kernels import Kernels
from fastprune.dynamic.updates import MaskUpdate, describe
from fastprune.dynamic.watching import Watch
from fastprune.masks import Masks
from fastprune.nn.masked import MaskedLayer, WeightGrad
from fastprune.pruners.base import warn_of_empty_layers
from fastprune.pruners.targets import Selection, prunable
from fastprune.swapping import mask_layers_


class DynamicPruner(ABC):
    """A method that prunes while the model is trained: one line in the training loop::

        pruner = fp.DPF(model, sparsity=0.9, total_steps=steps)
        for x, y in loader:
            loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()
        masks = pruner.finish()

    The layers that own prunable weights become masked ones in place, with the same Parameters, so
    any optimizer, scheduler and data-parallel wrapper made before or after serves. A refresh packs
    the new masks; between refreshes nothing is repacked. Each layer runs the kernel, dense or
    sparse, that was faster for its sizes at about its density when it was timed: once, at the
    first refresh after the model has run, or when :meth:`measure_kernels` is called. From then on
    the choice depends on the masks alone.

    A subclass says what the masks are: :meth:`initial_masks`, :meth:`is_due`, :meth:`new_masks`.

    Attributes:
        model: the model that was given, changed in place.
        steps: training steps done, calls of :meth:`step`.
        history: one :class:`MaskUpdate` per refresh, the one before the first step included.
    """

    name: ClassVar[str] = ""
    weight_grad: ClassVar[WeightGrad] = "sampled"

    def __init__(
        self,
        model: nn.Module,
        *,
        include: Selection = None,
        exclude: Selection = None,
        example_input: Any = None,
        group: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        self._weights = self.prunable(model, include, exclude)
        self._link = None if group is None else link_of(group)
        self._group = group
        self.model = model
        self.steps = 0
        self.history: list[MaskUpdate] = []
        self._finished = False
        self._masks: dict[str, Tensor] | None = None  # None: all kept
        masks = self._agreed(self.initial_masks())
        self._watch = Watch(model)
        if example_input is not None:  # before anything changes: an example may not fit
            self._watch.run(model, example_input)
        self._users = self.adopt_masks(masks)
        self.kernels = Kernels(model, {m for users in self._users.values() for m in users})
        if example_input is not None:
            self._measure(0.01)
        self._adopt(masks)

    # -- what a method decides -------------------------------------------------------------------

    @classmethod
    def prunable(
        cls, model: nn.Module, include: Selection, exclude: Selection
    ) -> dict[str, nn.Parameter]:
        """The weights that the method prunes, by name."""
        return prunable(model, include, exclude)

    @abstractmethod
    def initial_masks(self) -> dict[str, Tensor]:
        """The masks before the first step."""

    @abstractmethod
    def is_due(self, step: int) -> bool:
        """Whether the masks are refreshed after ``step`` training steps."""

    @abstractmethod
    def new_masks(self, step: int) -> dict[str, Tensor]:
        """The masks after ``step`` training steps; may change weights and optimizer state."""

    def final_masks(self) -> dict[str, Tensor]:
        """The masks that :meth:`finish` leaves."""
        return self.current

    def extra_state(self) -> dict[str, Any]:
        """What a method remembers beside masks and steps: tensors and plain values."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """The inverse of :meth:`extra_state`."""

    def adopt_masks(self, masks: dict[str, Tensor]) -> dict[str, list[MaskedLayer]]:
        """Give the model its first masks: for each name, the layers that have become masked."""
        return mask_layers_(self.model, masks, self.weight_grad)

    # -- what users call -------------------------------------------------------------------------

    def step(self) -> MaskUpdate | None:
        """Count one training step, after the optimizer's, and refresh the masks if it is time.

        Returns:
            What the refresh did, also kept in ``history``; None between refreshes.
        Raises:
            ValueError: a score is NaN: training has diverged; the message names the weight.
            RuntimeError: after :meth:`finish`; the ranks of ``group`` came to different masks.
        """
        if self._finished:
            raise RuntimeError(f"{type(self).__name__}: step() after finish()")
        self.steps += 1
        if not self.is_due(self.steps):
            return None
        self._follow_model()
        return self._refresh(self.new_masks(self.steps))

    @property
    def masks(self) -> Masks:
        """The masks now."""
        return Masks(self.current)

    @property
    def current(self) -> dict[str, Tensor]:
        """The masks now, not copied: for reading only."""
        assert self._masks is not None
        return self._masks

    def finish(self) -> Masks:
        """End the dynamic phase: final masks, pruned weights zero, and the masks fixed from now on.

        The layers stay masked, so training may go on with the masks as they are (fine-tuning);
        :func:`fastprune.finalize` gives a copy with plain layers, :func:`fastprune.accelerate` the
        fastest form for inference. A second call returns the same masks.

        Warns:
            UserWarning: a layer has no weight left; it is named.
        """
        if not self._finished:
            self._follow_model()
            masks = self.final_masks()
            if masks is not self._masks:
                self._refresh(masks)
            self._finished = True
            self._fix()
            self._watch.stop()
            warn_of_empty_layers(self.current, self.name)
        return self.masks

    def measure_kernels(self, example_input: Any, min_time: float = 0.01) -> None:
        """Time dense against sparse kernels now, instead of at the first refresh.

        The model runs once, in evaluation mode and without gradients; it and the random state of
        torch are left as they were.

        Args:
            example_input: what the model is called on in training: a tensor, or a tuple, list or
                dict of several inputs, of the training batch's shape.
            min_time: seconds for each way to run each kind of layer; there are seven.
        """
        self._watch.run(self.model, example_input)
        self._measure(min_time)

    def use_kernel_times(self, times: Mapping[str, Any]) -> None:
        """Choose by these times, by module name, as ``state_dict()["kernels"]`` has them."""
        self.kernels.load_state_dict(times)
        self.kernels.choose()

    def state_dict(self) -> dict[str, Any]:
        """Masks, step, history and choices: tensors and plain values in dicts and lists.

        With the model's and the optimizer's own state, all that a run needs to go on to the same
        bits. Kernels that were not timed yet are timed first, if the model has run: a run and what
        is resumed from it choose alike. Not with a ``group``, whose ranks time together: there
        call :meth:`measure_kernels` on all of them before training.
        """
        if not self.kernels.times and self._watch.seen and self._group is None:
            self._measure(0.01)
        return {
            "method": self.name,
            "steps": self.steps,
            "finished": self._finished,
            "masks": {n: m.clone() for n, m in self.current.items()},
            "history": [u.to_dict() for u in self.history],
            "kernels": self.kernels.state_dict(),
            "places": dict(self._watch.places),
            "extra": self.extra_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, on a pruner made with the same arguments.

        Load the model's state first or last: neither disturbs the other.

        Raises:
            ValueError: the state is of another method, or of other weights.
        """
        if not isinstance(state, Mapping) or "method" not in state:
            raise ValueError(f"state: expected what state_dict() of {self.name} returned")
        if state["method"] != self.name:
            raise ValueError(f"state: expected that of {self.name!r}, got {state['method']!r}")
        masks = state["masks"]
        if {n: tuple(m.shape) for n, m in masks.items()} != {
            n: tuple(w.shape) for n, w in self._weights.items()
        }:
            raise ValueError("state: its masks are of other weights than this model's")
        steps = whole(state["steps"], "state['steps']", 0, None)
        history = [MaskUpdate.of_dict(u) for u in state["history"]]
        self.steps, self.history, self._finished = steps, history, bool(state["finished"])
        self.kernels.load_state_dict(state["kernels"])
        self._watch.places = dict(state["places"])
        self.load_extra_state(state["extra"])
        self._masks = {n: masks[n].to(w.device) for n, w in self._weights.items()}
        self._install(self._masks)
        if self._finished:
            self._fix()
        self.kernels.choose()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(step {self.steps}, {self.masks!r})"

    # -- machinery -------------------------------------------------------------------------------

    def _refresh(self, masks: dict[str, Tensor]) -> MaskUpdate:
        masks = self._agreed(masks)
        self._install(masks)
        if not self.kernels.times and self._watch.seen:
            self._measure(0.01)
        return self._adopt(masks)

    def _follow_model(self) -> None:
        """Take over what was done to the model since the last refresh.

        It may have been moved to another device, given another state, or had Parameters replaced:
        the masks and weights that its layers have are those that count.
        """
        for name, layers in self._users.items():
            self._weights[name] = layers[0].weight  # type: ignore[assignment]
            mask = layers[0].weight_mask
            known = self.current[name]
            if known.device != mask.device or not torch.equal(known, mask):
                self.current[name] = mask.clone()

    def _fix(self) -> None:
        """The masks stay as they are, and pruned weights are zero."""
        self._users = mask_layers_(self.model, self.current, "sampled")

    def _install(self, masks: Mapping[str, Tensor]) -> None:
        """Give the layers new masks; those that stay as they are keep their packed pattern."""
        for name, layers in self._users.items():
            for layer in layers:
                if not torch.equal(layer.weight_mask, masks[name]):
                    layer.set_mask(masks[name])

    def _adopt(self, masks: dict[str, Tensor]) -> MaskUpdate:
        macs = self._watch.total(self._weights, masks)
        update = describe(self.steps, self._weights, self._masks, masks, macs)
        self._masks = masks
        self.kernels.choose()
        self.history.append(update)
        return update

    def _agreed(self, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        """The masks, once every rank is known to have the same."""
        if self._link is not None:
            values = list(masks.values())
            same = self._link.same(len(values), lambda: torch.tensor([digest(m) for m in values]))
            differ = [n for n, alike in zip(masks, same, strict=True) if not alike]
            if differ:
                raise RuntimeError(
                    f"{self.name}: the ranks came to different masks of {differ[0]} after "
                    f"{self.steps} steps: their weights differ"
                )
        return masks

    def _measure(self, min_time: float) -> None:
        """Fill the table of times; all ranks take that of the first."""
        self._watch.stop()
        with torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad():
            self.kernels.measure(self._watch.seen, min_time)
        if isinstance(self._group, dist.ProcessGroup):
            table = [self.kernels.state_dict()]
            dist.broadcast_object_list(table, group=self._group, group_src=0)
            self.kernels.load_state_dict(table[0])
        self.kernels.choose()
