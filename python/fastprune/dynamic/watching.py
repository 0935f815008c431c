"""What the layers of a model are called on: shapes for timings and multiply-adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastprune.metrics.macs import LAYERS, weights_in
from fastprune.metrics.macs import places as places_of
from fastprune.pruners.data import call_arguments
from fastprune.pruners.state import evaluating, preserved


@dataclass(frozen=True)
class Seen:
    """The first input of a layer.

    Attributes:
        shape, stride, dtype, device: of the input.
        autocast: the dtype that autocast was casting to; None outside of it.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    autocast: torch.dtype | None

    def example(self, weight: Tensor) -> Tensor:
        """A tensor stored like the input, which goes with ``weight`` as it is now.

        Normal random numbers from a fixed seed.
        """
        dtype = weight.dtype if self.autocast is None else self.dtype
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(self.shape, generator=generator, dtype=torch.float32)
        if any(n > 1 and s == 0 for n, s in zip(self.shape, self.stride, strict=True)):
            return values.to(weight.device, dtype)  # an expanded view cannot be written
        x = torch.empty_strided(self.shape, self.stride, dtype=dtype, device=weight.device)
        return x.copy_(values)

    def context(self) -> Any:
        """The autocast region that the layer ran in, or none."""
        kind = self.device.type
        if self.autocast is None:
            return torch.autocast(kind, enabled=False)
        return torch.autocast(kind, dtype=self.autocast)


class Watch:
    """Notes the first call of every linear and convolution layer, then steps aside.

    Attributes:
        seen: first inputs, by module name.
        places: multiply-adds per sample of one weight of each layer, by module name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.seen: dict[str, Seen] = {}
        self.places: dict[str, int] = {}
        self._layers: dict[str, Any] = {
            n: m for n, m in model.named_modules() if isinstance(m, LAYERS)
        }
        self._handles: dict[str, Any] = {}
        self._listen()

    def run(self, model: nn.Module, example_input: Any) -> None:
        """Call the model on an example, leaving it as it was."""
        self._listen()
        try:
            args, kwargs = call_arguments(example_input)
            with preserved(model), evaluating(model), torch.no_grad():
                buffers = {n: b.clone() for n, b in model.named_buffers()}
                functional_call(model, buffers, args, kwargs)
        except BaseException:
            self.stop()
            raise

    def note(self, name: str, x: Tensor, output: Tensor) -> None:
        """Keep what a call of a layer looks like."""
        samples = max(x.shape[0], 1) if x.dim() > 1 else 1
        kind = x.device.type
        casting = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.seen[name] = Seen(tuple(x.shape), x.stride(), x.dtype, x.device, casting)
        self.places[name] = places_of(self._layers[name], x, output) // samples
        self._handles.pop(name).remove()

    def stop(self) -> None:
        """Take back the hooks of layers that were not called."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def total(self, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> int | None:
        """Multiply-adds per sample under masks; None before any layer was called."""
        if not self.places:
            return None
        kept = {id(weights[n]): int(m.sum()) for n, m in masks.items()}
        total = 0
        for name, places in self.places.items():
            for _, weight, _, factor in weights_in(self._layers[name]):
                total += factor * places * kept.get(id(weight), weight.numel())
        return total

    def _listen(self) -> None:
        for name, layer in self._layers.items():
            if name not in self._handles:
                self._handles[name] = layer.register_forward_hook(_Note(self, name))


class _Note:
    """A hook that can be copied and pickled with the model: the copy notes nothing."""

    def __init__(self, watch: Watch | None, name: str) -> None:
        self.watch, self.name = watch, name

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self.watch is None or torch.compiler.is_compiling():
            return
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            self.watch.note(self.name, inputs[0], output)

    def __deepcopy__(self, _memo: Any) -> _Note:
        return _Note(None, self.name)

    def __reduce__(self) -> Any:
        return _Note, (None, self.name)
