"""From a model and its masks to a faster model: measured layer by layer, never slower."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastprune import folding, timing
from fastprune.nn import MaskedConv2d, MaskedLayer, MaskedLinear
from fastprune.report import LayerReport, Report

# A layer is swapped when it is at least this much faster: noise must not decide.
_MARGIN = 1.03


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
    mask. The faster one is kept. Then the whole models are
    timed, dense and fast, with contiguous and with channels_last convolution weights; if the copy
    loses, all its layers go back to dense kernels, and it takes the better memory format. Timings
    are of this machine, thread count, dtype and input shape; the report says what was decided and
    why.

    The layers become :class:`fastprune.nn.MaskedLinear` / :class:`fastprune.nn.MaskedConv2d`
    (with ``sparse=False`` where dense won): the ``state_dict`` keys of the model, plus the masks,
    and pruned weights stay pruned in training. Masked parameters of other layers (1-d and 3-d
    convolutions, say) are set to zero once, and the report names them.

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
    _prune_(dense, masks)
    folded = 0
    if fold_batchnorm:
        dense.eval()
        folded = folding.fold_batchnorm_(dense)
    fast = copy.deepcopy(dense)
    owners = {name: owner for name, owner in weights.items() if _supported(model, owner)}
    inputs = _record_inputs(dense, set(owners.values()), arguments, training)
    layers, used = [], set()
    for name, owner in weights.items():
        if name not in owners:
            kind = type(model.get_submodule(owner)).__name__
            layers.append(LayerReport.kept(name, kind, masks[name], f"no sparse kernel for {kind}"))
            continue
        layer = dense.get_submodule(owner)
        if id(layer) in used:
            continue
        used.add(id(layer))
        masked = _masked(fast.get_submodule(owner), masks[name].to(layer.weight.device))  # type: ignore[arg-type]
        layers.append(_choose(name, layer, masked, inputs.get(owner), training, min_time))
        fast = _replace(fast, owner, masked)
    report = Report(layers=layers, training=training, folded=folded)
    _choose_whole(dense, fast, arguments, report, min_time)
    return fast, report


def finalize(model: nn.Module) -> nn.Module:
    """Return a copy with plain dense layers again, the pruned weights stored as zeros.

    The ``state_dict`` has the keys of the original model, without masks, and loads into it with
    ``strict=True``. ``model`` is not changed.
    """
    plain = copy.deepcopy(model)
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, MaskedLayer):
            plain = _replace(plain, name, _plain(layer))
    return plain


def _plain(layer: MaskedLayer) -> nn.Module:
    with torch.no_grad():
        layer.weight.data.masked_fill_(~layer.weight_mask, 0)
    dense = nn.Linear if isinstance(layer, MaskedLinear) else nn.Conv2d
    plain = dense.__new__(dense)
    nn.Module.__init__(plain)
    hidden = {"weight_grad", "sparse", "_pattern", "_kernel_padding"}
    internal = set(plain.__dict__)
    for key, value in layer.__dict__.items():
        if key not in internal and key not in hidden:
            setattr(plain, key, value)
    plain.register_parameter("weight", layer.weight)  # type: ignore[arg-type]
    plain.register_parameter("bias", layer.bias)  # type: ignore[arg-type]
    plain.train(layer.training)
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


def _supported(model: nn.Module, owner: str) -> bool:
    layer = model.get_submodule(owner)
    # Exact types: a subclass may do something else in its forward pass.
    return type(layer) in (nn.Linear, nn.Conv2d, MaskedLinear, MaskedConv2d)


def _prune_(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, mask in masks.items():
            weight = model.get_parameter(name)
            weight.masked_fill_(~mask.to(weight.device), 0)


def _masked(layer: nn.Module, mask: Tensor) -> MaskedLayer:
    if isinstance(layer, MaskedLayer):
        layer = _plain(layer)
    if isinstance(layer, nn.Linear):
        return MaskedLinear(layer, mask)
    assert isinstance(layer, nn.Conv2d)
    return MaskedConv2d(layer, mask)


def _replace(model: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """Put ``layer`` in place of the submodule, wherever it is shared; returns the (new) root."""
    if name == "":
        return layer
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):  # named_children skips repeats
            if child is old:
                setattr(parent, child_name, layer)
    return model


def _record_inputs(
    model: nn.Module, owners: set[str], arguments: tuple[Any, ...], training: bool
) -> dict[str, Tensor]:
    """The first input that each owner sees; buffers are not touched."""
    probe = copy.deepcopy(model)
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def record(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen.setdefault(name, inputs[0].detach().clone())

        return record

    for owner in owners:
        probe.get_submodule(owner).register_forward_pre_hook(hook(owner))
    probe.train(training or model.training)
    with torch.random.fork_rng(), torch.no_grad():
        probe(*arguments)
    return seen


def _step(layer: nn.Module, x: Tensor, training: bool) -> Callable[[], object]:
    """One inference pass, or one forward and backward pass, of a layer."""
    if not training:

        def infer() -> None:
            with torch.inference_mode():
                layer(x)

        return infer
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    with torch.no_grad():
        grad = torch.ones_like(layer(x))
    wanted = [x, *[p for p in layer.parameters() if p.requires_grad]]

    def train() -> None:
        torch.autograd.grad(layer(x), wanted, grad)

    return train


def _choose(
    name: str,
    dense: nn.Module,
    masked: MaskedLayer,
    x: Tensor | None,
    training: bool,
    min_time: float,
) -> LayerReport:
    """Time the two kernels of one layer and set ``masked.sparse``."""
    row = LayerReport.kept(
        name, type(dense).__name__, masked.weight_mask, "", tuple(x.shape) if x is not None else ()
    )
    if x is None or x.device.type != "cpu":
        masked.sparse = False
        row.reason = (
            "not reached by example_input" if x is None else f"no kernel for {x.device.type} yet"
        )
        return row
    candidates = {
        "sparse": _step(copy.deepcopy(masked).train(training), x, training),
        "contiguous": _step(copy.deepcopy(dense).train(training), x.contiguous(), training),
    }
    if x.dim() == 4:
        last = torch.channels_last
        candidates["channels_last"] = _step(
            copy.deepcopy(dense).train(training).to(memory_format=last),  # type: ignore[call-overload]
            x.contiguous(memory_format=last),
            training,
        )
    if training:  # what a layer that stays dense pays for its mask
        kept = copy.deepcopy(masked).train()
        kept.sparse = False
        candidates["masked"] = _step(kept, x.contiguous(), training)
    medians = {
        name: 1e3 * t.median for name, t in timing.measure(candidates, min_time=min_time).items()
    }
    row.sparse_ms = medians.pop("sparse")
    enforcing = max(0.0, medians.pop("masked", 0.0) - medians["contiguous"])
    best = min(medians, key=lambda name: medians[name])
    row.dense_ms = medians[best]
    masked.sparse = row.sparse_ms * _MARGIN < row.dense_ms + enforcing
    row.chosen = "sparse" if masked.sparse else "dense"
    if not masked.sparse:
        row.reason = f"dense ({best}) is faster"
    return row


def _choose_whole(
    dense: nn.Module, fast: nn.Module, arguments: tuple[Any, ...], report: Report, min_time: float
) -> None:
    """Time the models end to end and settle how ``fast`` runs.

    Four candidates: dense kernels everywhere, or sparse where a layer won; each with contiguous
    weights and, where there are convolutions, with channels_last weights in the dense layers. The
    fastest one is what ``fast`` becomes.
    """
    candidates = {"dense": dense, "fast": fast}
    if any(isinstance(m, nn.Conv2d) for m in dense.modules()):
        candidates |= {f"{name}, channels_last": m for name, m in candidates.items()}
    steps = {}
    for name, model in candidates.items():
        trial = copy.deepcopy(model)
        if name.endswith("channels_last"):
            _channels_last_(trial)
        steps[name] = _whole_step(trial.train(report.training), arguments, report.training)
    # Dropout draws random numbers; the caller's generator is left where it was.
    with torch.random.fork_rng():
        times = timing.measure(steps, min_time=4 * min_time)
    report.timings = {name: t.to_dict() for name, t in times.items()}
    medians = {name: t.median * 1e3 for name, t in times.items()}
    best = {
        kind: min((n for n in medians if n.startswith(kind)), key=lambda n: medians[n])
        for kind in ("dense", "fast")
    }
    report.dense_ms, report.fast_ms = medians[best["dense"]], medians[best["fast"]]
    winner = best["fast"]
    swapped = any(r.chosen == "sparse" for r in report.layers)
    if not swapped or report.fast_ms > report.dense_ms:
        winner = best["dense"]
        report.reverted = swapped
        for layer in fast.modules():
            if isinstance(layer, MaskedLayer):
                layer.sparse = False
        for row in report.layers:
            if row.chosen == "sparse":
                row.chosen = "dense"
                row.reason = "the whole model was not faster with sparse layers"
    if winner.endswith("channels_last"):
        _channels_last_(fast)
        report.channels_last = True


def _channels_last_(model: nn.Module) -> None:
    """Store the weights of dense convolutions channels_last: their outputs follow."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and not (isinstance(layer, MaskedLayer) and layer.sparse):
            # The values stay; only the order in memory changes.
            layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _whole_step(
    model: nn.Module, arguments: tuple[Any, ...], training: bool
) -> Callable[[], object]:
    """One inference pass, or one forward and backward pass, of a model."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def infer() -> None:
        with torch.inference_mode():
            model(*arguments)

    def train() -> None:
        with torch.enable_grad():
            loss = sum(t.float().sum() for t in _tensors(model(*arguments)))
            torch.autograd.grad(loss, parameters, allow_unused=True)  # type: ignore[arg-type]

    return train if training else infer


def _tensors(output: Any) -> list[Tensor]:
    """Every floating tensor in a model's output."""
    leaves = torch.utils._pytree.tree_leaves(output)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]
