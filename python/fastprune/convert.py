"""From a model and its masks to a faster model: measured layer by layer, never slower."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastprune import folding
from fastprune.equilibrium_choice import choose_equilibrium
from fastprune.fusing import unfuse_
from fastprune.kernel_choice import choose_kernel, choose_whole, record_inputs
from fastprune.nn import MaskedLayer, MonDEQLayer
from fastprune.nn.batch_last import forget_batch_last_
from fastprune.report import LayerReport, Report, machine
from fastprune.swapping import (
    can_mask,
    mask_layer_,
    unmask_equilibrium_,
    unmask_layer_,
    unmask_layers_,
)


def accelerate(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    example_input: Any,
    *,
    training: bool = False,
    fold_batchnorm: bool = False,
    min_time: float = 0.05,
) -> tuple[nn.Module, Report]:
    """Return a copy of a pruned model whose layers are sparse where that is faster here.

    Every masked linear and 2-d convolution layer is timed on the input that ``example_input``
    brings to it: its sparse kernel against torch's dense one (the better of contiguous and
    channels_last), both with the weights pruned; in training, dense also pays for enforcing the
    mask. The faster one is kept. Then whole models are timed: dense and fast, with contiguous and
    with channels_last convolution weights, and further forms of the fast one. For inference (a
    model in evaluation mode that ``torch.fx`` can trace) BatchNorm, residual addition and ReLU are
    fused into the sparse convolution before them; in inference and training, convolutions, pooling
    and BatchNorm may hand each other activations with the batch innermost
    (:mod:`fastprune.ops.layout`), so that a chain of layers converts once; a large batch may run 16
    or 32 samples at a time, which keeps more in cache. The fastest is returned; if the copy loses,
    all its layers go back to dense kernels, and it takes the better memory format. Timings are of
    this machine, thread count, dtype and input shape, are kept for layers of the same sizes and
    sparsity within the process, and the report says what was decided and why.

    The layers become :class:`fastprune.nn.MaskedLinear` / :class:`fastprune.nn.MaskedConv2d` (with
    ``sparse=False`` where dense won): the ``state_dict`` keys of the model, plus the masks, and
    pruned weights stay pruned in training. A fused model is an ``fx.GraphModule`` with the same
    modules and the same keys (:class:`fastprune.nn.chunks.Chunks` if it runs in chunks).
    Equilibrium layers (:class:`fastprune.nn.MonDEQLinear`, :class:`fastprune.nn.MonDEQConv2d`) take
    the masks of their A and B by ``set_masks`` and are timed as a whole, a solve with the masks
    against one with W as a dense matrix: in the report A and B have the same times; their U is a
    layer like others. Masked parameters of other layers (1-d and 3-d convolutions, say) are set to
    zero once, and the report names them.

    Args:
        model: not changed. Its own train / eval mode is kept, except as said below.
        masks: parameter name -> bool tensor of the weight's shape; a :class:`fastprune.Masks` or
            any mapping. Names as in ``model.named_parameters()``.
        example_input: a Tensor, or a tuple of positional arguments, of the shapes that will be
            used; its values do not matter unless the model branches on them.
        training: time forward and backward instead of inference, and prepare for training.
        fold_batchnorm: fold BatchNorm layers into the convolution or linear layer before them.
            For inference: the result is in evaluation mode.
        min_time: seconds spent on timing each candidate of each layer.
    Returns:
        (fast model, :class:`Report`). ``print(report)`` shows it as a table.
    Raises:
        TypeError: ``masks`` is not a mapping of names to bool tensors.
        ValueError: a name in ``masks`` is no parameter of the model, a mask has another shape, or
            ``fold_batchnorm`` is combined with ``training``.
    Cost: two copies of the model, and about 4 * ``min_time`` per masked layer.
    """
    if training and fold_batchnorm:
        raise ValueError(
            "fold_batchnorm: expected False with training=True: folding is for inference"
        )
    weights = _check(model, masks)
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    dense = copy.deepcopy(model)
    # Layers that are masked already run sparse kernels: what is timed as dense is plain.
    for owner in set(weights.values()):
        layer = dense.get_submodule(owner)
        if isinstance(layer, MaskedLayer):
            unmask_layer_(layer)
        elif isinstance(layer, MonDEQLayer):
            unmask_equilibrium_(layer)
    forget_batch_last_(dense)
    _prune_(dense, masks)
    folded = 0
    if fold_batchnorm:
        dense.eval()
        folded = folding.fold_batchnorm_(dense)
    fast = copy.deepcopy(dense)
    owners = {n: owner for n, owner in weights.items() if can_mask(model.get_submodule(owner))}
    solved = _equilibria(model, weights)
    wanted = {*owners.values(), *solved}
    inputs = record_inputs(dense, wanted, arguments, training)
    layers: list[LayerReport] = []
    used: set[Any] = set()
    for name, owner in weights.items():
        if name in solved.get(owner, {}):
            if owner in used:
                continue
            used.add(owner)
            own, plain = solved[owner], dense.get_submodule(owner)
            before, given = model.get_submodule(owner), fast.get_submodule(owner)
            assert isinstance(before, MonDEQLayer)
            assert isinstance(given, MonDEQLayer)
            kept = {n: getattr(before, f"{n}_mask") for n in ("A", "B")}  # where no mask is new
            given.set_masks(**{**kept, **{matrix: masks[n] for n, matrix in own.items()}})
            layers += choose_equilibrium(own, plain, given, inputs.get(owner), training, min_time)
            continue
        if name not in owners:
            kind = type(model.get_submodule(owner)).__name__
            layers.append(LayerReport.kept(name, kind, masks[name], f"no sparse kernel for {kind}"))
            continue
        layer = dense.get_submodule(owner)
        if id(layer) in used:
            continue
        used.add(id(layer))
        masked = fast.get_submodule(owner)
        mask_layer_(masked, masks[name])
        assert isinstance(masked, MaskedLayer)
        layers.append(choose_kernel(name, layer, masked, inputs.get(owner), training, min_time))
    report = Report(layers=layers, training=training, folded=folded)
    on = next((x.device for x in inputs.values() if x.device.type == "cuda"), None)
    if on is not None:
        report.device, report.tf32 = machine(on)
    return choose_whole(dense, fast, arguments, report, min_time), report


def finalize(model: nn.Module) -> nn.Module:
    """Return a copy with plain dense layers again, the pruned weights stored as zeros.

    The ``state_dict`` has the keys of the original model, without masks, and loads into it with
    ``strict=True``. ``model`` is not changed.
    """
    plain = copy.deepcopy(model)
    for part in plain.modules():
        if isinstance(part, fx.GraphModule):
            unfuse_(part)
    unmask_layers_(plain)
    forget_batch_last_(plain)
    return plain


def _check(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, str]:
    """Parameter name -> name of the module that owns it, for every mask; or an error."""
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks: expected a mapping of names, got {type(masks).__name__}")
    parameters = dict(model.named_parameters())
    owners = {}
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"masks[{name!r}]: expected a bool tensor")
        if name not in parameters:
            raise ValueError(f"masks[{name!r}]: the model has no parameter of that name")
        if mask.shape != parameters[name].shape:
            raise ValueError(
                f"masks[{name!r}]: expected shape {tuple(parameters[name].shape)}, got "
                f"{tuple(mask.shape)}"
            )
        owners[name] = name.rpartition(".")[0]
    return owners


def _equilibria(model: nn.Module, weights: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Equilibrium layers by name: their masked A and B, parameter name -> attribute."""
    found: dict[str, dict[str, str]] = {}
    for name, owner in weights.items():
        if isinstance(model.get_submodule(owner), MonDEQLayer):
            attribute = name.rpartition(".")[2]
            if attribute in ("A", "B"):
                found.setdefault(owner, {})[name] = attribute
    return found


def _prune_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, mask in masks.items():
            weight = model.get_parameter(name)
            weight.masked_fill_(~mask.to(weight.device), 0)
