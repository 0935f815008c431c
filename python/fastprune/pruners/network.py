"""The model seen as a pure function of its state: what pruners take scores from.

Every forward pass runs on working copies of the parameters and buffers (``torch.func``), so that
the model itself, its running statistics and its ``.grad`` are never written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy

from fastprune.distributed.link import Link
from fastprune.pruners.data import (
    Batches,
    batch_size,
    call_arguments,
    map_tensors,
    prepared,
    tensors_in,
)
from fastprune.pruners.state import cuda_devices, evaluating, not_in_state_dict

Loss: TypeAlias = Callable[..., Tensor]


class Network:
    """A model at its current mask.

    Attributes:
        names: names of the prunable weights, in the order of ``named_parameters()``.
        shapes: their shapes, by name.
        masks: parameter name -> bool tensor; a pruned weight is exactly 0 in every pass. A name
            that is not there is dense.

    All results are dicts keyed by ``names``, of the weights' shapes, in the scoring dtype: float64
    for float64 weights (or ``dtype=torch.float64``), float32 for all others. Treat them as
    read-only: they may share memory with the model.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        *,
        dtype: torch.dtype | None = None,
        batches: Batches | None = None,
        loss: Loss | None = None,
        link: Link | None = None,
    ) -> None:
        self.names = tuple(names)
        self.masks: Mapping[str, Tensor] = {}
        self._model = model
        self._dtype = dtype
        self._batches = batches
        self._loss = loss
        self._link = link  # to ranks with the same model and other batches
        self._parameters = dict(model.named_parameters())
        self._buffers = dict(model.named_buffers())
        for name, tensor in (self._parameters | self._buffers).items():
            if is_lazy(tensor):
                raise ValueError(f"{name}: not initialized yet: run the model once first")
        self.shapes = {n: self._parameters[n].shape for n in self.names}
        self._device = self._parameters[self.names[0]].device
        self._random_state: list[Tensor] | None = None
        self._first_input: Any = None

    def begin_step(self) -> None:
        """Move on to the next step: fresh batches, fresh random numbers."""
        self._random_state = None
        if self._batches is not None:
            self._batches.begin_step()

    def dense(self) -> dict[str, Tensor]:
        """The weights w, mask or not."""
        return {n: _widened(self._cast(self._parameters[n].detach())) for n in self.names}

    def weights(self) -> dict[str, Tensor]:
        """The pruned weights w . m."""
        return {n: self._masked(n, w) for n, w in self.dense().items()}

    def first_input(self) -> Any:
        """x of the first batch of ``data``, or None without data."""
        if self._first_input is None and self._batches is not None:
            self._first_input = self._batches.first_input()
        return self._first_input

    def gradient(self, temperature: float | None = None) -> dict[str, Tensor]:
        """g(w . m): the gradient of the mean loss at the pruned weights, pruned entries included.

        Batches are weighted by their number of samples and summed in float64. All passes of one
        step see the same batches and the same random numbers (dropout).

        Args:
            temperature: divides the model's output before the loss; None leaves it alone.
        Raises:
            ValueError: the loss is not a finite scalar that depends on the weights.
        One forward and one backward pass per batch.
        """

        def term(loss: Tensor, leaves: list[Tensor]) -> Sequence[Tensor | None]:
            return torch.autograd.grad(loss, leaves, allow_unused=True)

        return self._average(term, temperature)

    def hessian_gradient(self, temperature: float | None = None) -> dict[str, Tensor]:
        """H g at the pruned weights: H and g of the mean loss, over the prunable weights only.

        Two passes over the batches: the first for g, the second for the sum of H_b g, each batch
        by a double backward, whose graph is freed before the next.
        """
        # The fused attention kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            g = list(self.gradient(temperature).values())

            def term(loss: Tensor, leaves: list[Tensor]) -> Sequence[Tensor | None]:
                first = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
                pairs = [
                    (d, v.to(d.dtype))
                    for d, v in zip(first, g, strict=True)
                    if d is not None and d.requires_grad
                ]
                if not pairs:  # a loss linear in every weight: H = 0
                    return [None] * len(leaves)
                outputs, vectors = zip(*pairs, strict=True)
                return torch.autograd.grad(outputs, leaves, vectors, allow_unused=True)

            return self._average(term, temperature)

    def synaptic_flow(self, example: Any) -> dict[str, Tensor]:
        """dR/d|w| at the pruned weights: R the sum of the outputs on an all-ones input.

        In evaluation mode, with every floating-point entry of the state replaced by its absolute
        value. The input has the shape of ``example`` with a batch of 1.
        """
        state, leaves = self._state(absolute=True)

        def ones(t: Tensor) -> Tensor:
            dtype = self._dtype if self._dtype and t.is_floating_point() else t.dtype
            return torch.ones((1, *t.shape[1:]), dtype=dtype, device=self._device)

        if not tensors_in(example):
            raise ValueError(
                f"example_input: expected an input of the model, got {type(example).__name__}"
            )
        args, kwargs = call_arguments(map_tensors(ones, example))
        with evaluating(self._model):
            output = functional_call(self._model, state, args, kwargs)
        floating = [t for t in tensors_in(output) if t.is_floating_point()]
        if not any(t.requires_grad for t in floating):
            raise ValueError("synflow: the model's output does not depend on a prunable weight")
        r = torch.stack([t.sum() for t in floating]).sum()
        if not torch.isfinite(r):
            raise ValueError(
                f"synflow: the sum of the outputs is {r.item()}, not a finite number"
                + _suspect(state)
            )
        grads = torch.autograd.grad(r, leaves, allow_unused=True)
        return {
            n: _widened(torch.zeros_like(w) if d is None else d)
            for n, w, d in zip(self.names, leaves, grads, strict=True)
        }

    # -- inside ----------------------------------------------------------------------------------

    def _cast(self, t: Tensor) -> Tensor:
        return t if self._dtype is None or not t.is_floating_point() else t.to(self._dtype)

    def _masked(self, name: str, weight: Tensor) -> Tensor:
        # Filled, not multiplied: 0 x NaN is NaN, and pruned means absent.
        return weight.masked_fill(~self.masks[name], 0) if name in self.masks else weight

    def _state(self, absolute: bool = False) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Working copies of all parameters and buffers; the prunable ones are leaves."""
        state = {
            n: self._masked(n, self._cast(p.detach())).clone() for n, p in self._parameters.items()
        }
        state |= {n: self._cast(b.detach()).clone() for n, b in self._buffers.items()}
        if absolute:
            skip = not_in_state_dict(self._model)
            for name, tensor in state.items():
                if tensor.is_floating_point() and name not in skip:
                    tensor.abs_()
        return state, [state[n].requires_grad_() for n in self.names]

    def _average(
        self,
        term: Callable[[Tensor, list[Tensor]], Sequence[Tensor | None]],
        temperature: float | None,
    ) -> dict[str, Tensor]:
        """Mean of ``term`` over the batches of this step, of all ranks, weighted by samples."""
        assert self._batches is not None, "checked by prune() and score()"
        batches = self._batches
        self._replay_random_numbers()
        state, leaves = self._state()
        sums = [torch.zeros_like(w, dtype=torch.float64, requires_grad=False) for w in leaves]
        # Sizes relative to the first batch's: one batch, or equal ones, get a weight of exactly 1.
        first_size, relative = 0, 0.0

        def add_up() -> None:
            nonlocal first_size, relative
            for index, (x, y) in enumerate(batches):
                size = batch_size(x)
                first_size = first_size or size
                weight = size / first_size
                relative += weight
                loss = self._loss_at(state, x, y, temperature, index)
                for total, value in zip(sums, term(loss, leaves), strict=True):
                    if value is not None:
                        total.add_(value.detach(), alpha=weight)

        if self._link is None:
            add_up()
        else:
            self._link.vote(add_up)
            samples = torch.tensor(relative * first_size, dtype=torch.float64)
            self._link.add_(samples)
            relative = float(samples)
            for total in sums:
                self._link.add_(total.mul_(first_size))
        return {
            n: (total / relative).to(_wide(leaf))
            for n, total, leaf in zip(self.names, sums, leaves, strict=True)
        }

    def _loss_at(
        self, state: dict[str, Tensor], x: Any, y: Any, temperature: float | None, index: int
    ) -> Tensor:
        args, kwargs = call_arguments(prepared(x, self._device, self._dtype))
        output = functional_call(self._model, state, args, kwargs)
        if temperature is not None:
            if not isinstance(output, Tensor):
                raise ValueError(
                    "temperature: it divides the model's output, which must be a tensor, not "
                    f"{type(output).__name__}; temperature=1 leaves the output alone"
                )
            output = output / temperature
        loss = self._call_loss(output, prepared(y, self._device, self._dtype))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss: expected a scalar tensor, got {got}")
        if not torch.isfinite(loss):
            raise ValueError(
                f"loss: it is {loss.item()} on batch {index}, not a finite number" + _suspect(state)
            )
        if not loss.requires_grad:
            raise ValueError("loss: it does not depend on any prunable weight")
        return loss.reshape(())

    def _call_loss(self, output: Any, y: Any) -> Any:
        if isinstance(self._loss, nn.Module) and self._dtype is not None:
            # Class weights and the like have to follow the scoring dtype.
            tensors = [*self._loss.named_parameters(), *self._loss.named_buffers()]
            return functional_call(
                self._loss, {n: self._cast(t.detach()) for n, t in tensors}, (output, y)
            )
        assert self._loss is not None
        return self._loss(output, y)

    def _replay_random_numbers(self) -> None:
        """Start each pass of a step from the same generator state."""
        cuda = cuda_devices(self._model)
        if self._random_state is None:
            self._random_state = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, cuda)]
            return
        torch.set_rng_state(self._random_state[0])
        for device, saved in zip(cuda, self._random_state[1:], strict=True):
            torch.cuda.set_rng_state(saved, device)


def _suspect(state: Mapping[str, Tensor]) -> str:
    """Names the first parameter or buffer that is not finite, if there is one."""
    for name, t in state.items():
        if t.is_floating_point() and not bool(torch.isfinite(t).all()):
            return f" ({name} holds a NaN or an infinity)"
    return ""


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _widened(t: Tensor) -> Tensor:
    return t.to(_wide(t))
