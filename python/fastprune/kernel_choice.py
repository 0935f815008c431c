"""Which kernel runs where: decided by timing, layer by layer and then end to end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastprune import timing
from fastprune.fusing import fuse, fuse_relu_
from fastprune.nn import MaskedConv2d, MaskedLayer, MonDEQLayer
from fastprune.nn.chunks import Chunks, acts_on_samples
from fastprune.ops import layout
from fastprune.ops.backend import has_kernels
from fastprune.ops.plan import BATCH_LAST
from fastprune.report import LayerReport, Report, machine

# A layer is swapped when it is at least this much faster: noise must not decide.
MARGIN = 1.03
# Samples at a time of a whole model, worth a try: less to keep in cache between the layers.
_CHUNKS = (16, 32)


def record_inputs(
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


def layer_step(layer: nn.Module, x: Tensor, training: bool) -> Callable[[], object]:
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


def waiting_for(arguments: Iterable[Any]) -> Callable[[], object] | None:
    """What waits for the work that calls with these arguments start; None where calls wait."""
    devices = {t.device for t in arguments if isinstance(t, Tensor) and t.device.type == "cuda"}
    if not devices:
        return None

    def wait() -> None:
        for device in devices:
            torch.cuda.synchronize(device)

    return wait


# Times of layers that were measured before, by everything that they depend on.
_known: dict[tuple[Any, ...], dict[str, float]] = {}


def _statistics(mask: Tensor) -> tuple[float, float]:
    """Of a mask: density and the longest row over the mean one, to two digits."""
    rows = mask.flatten(1).sum(1).float()
    mean = float(rows.mean()) if rows.numel() else 0.0
    density = mean / max(mask[0].numel() if len(mask) else 1, 1)
    uneven = float(rows.max()) / mean if mean else 0.0
    return float(f"{density:.2g}"), float(f"{uneven:.2g}")


def _key(dense: nn.Module, masked: MaskedLayer, x: Tensor, training: bool) -> tuple[Any, ...]:
    return (
        repr(dense),  # type, sizes, stride, padding, dilation, groups, bias
        *_statistics(masked.weight_mask),
        masked.weight_grad,
        tuple(x.shape),
        x.dtype,
        training,
        *machine(x.device),
    )


def forget_timings() -> None:
    """Forget the layer timings that :func:`fastprune.accelerate` keeps for this process."""
    _known.clear()


def choose_kernel(
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
    if x is None or not has_kernels(x.device):
        masked.sparse = False
        row.reason = (
            "not reached by example_input" if x is None else f"no kernel for {x.device.type}"
        )
        return row
    key = _key(dense, masked, x, training)
    if key not in _known:
        _known[key] = _time_layer(dense, masked, x, training, min_time)
    medians = dict(_known[key])
    chained = medians.pop("chained", medians["sparse"])
    row.sparse_ms = medians.pop("sparse")
    enforcing = max(0.0, medians.pop("masked", 0.0) - medians["contiguous"])
    best = min(medians, key=lambda name: medians[name])
    row.dense_ms = medians[best]
    masked.sparse = row.sparse_ms * MARGIN < row.dense_ms + enforcing
    masked.sparse_in_chain = min(chained, row.sparse_ms) * MARGIN < row.dense_ms + enforcing
    row.chosen = "sparse" if masked.sparse else "dense"
    if not masked.sparse:
        row.reason = f"dense ({best}) is faster"
    return row


def _time_layer(
    dense: nn.Module, masked: MaskedLayer, x: Tensor, training: bool, min_time: float
) -> dict[str, float]:
    """Median milliseconds of each way to run a layer."""
    candidates = {
        "sparse": layer_step(copy.deepcopy(masked).train(training), x, training),
        "contiguous": layer_step(copy.deepcopy(dense).train(training), x.contiguous(), training),
    }
    if x.dim() == 4:
        last = torch.channels_last
        candidates["channels_last"] = layer_step(
            copy.deepcopy(dense).train(training).to(memory_format=last),  # type: ignore[call-overload]
            x.contiguous(memory_format=last),
            training,
        )
        if x.shape[0] > 1 and x.device.type == "cpu":  # a chain that keeps the batch innermost
            chained = copy.deepcopy(masked).train(training)
            chained._layout = BATCH_LAST
            candidates["chained"] = layer_step(chained, layout.batch_last(x), training)
    if training:  # what a layer that stays dense pays for its mask
        kept = copy.deepcopy(masked).train()
        kept.sparse = False
        candidates["masked"] = layer_step(kept, x.contiguous(), training)
    times = timing.measure(candidates, min_time=min_time, synchronize=waiting_for([x]))
    return {name: 1e3 * t.median for name, t in times.items()}


def _variants(fast: nn.Module, arguments: tuple[Any, ...], training: bool) -> dict[str, nn.Module]:
    """Other forms of the fast model: fused for inference, with the batch innermost."""
    images = [t for t in arguments if isinstance(t, Tensor) and t.dim() == 4]
    on_cpu = bool(images) and images[0].device.type == "cpu"
    batch = images[0].shape[0] if on_cpu else 0  # GPUs need neither chains nor chunks
    chain = batch > 1 and any(
        isinstance(m, MaskedConv2d) and m.sparse_in_chain for m in fast.modules()
    )
    if training:
        if not chain:
            return {}
        # A dense layer in a chain pays for conversions that no timing of a layer shows.
        return {
            "fast, batch last": keep_batch_last(fast),
            "fast, batch last, all sparse": keep_batch_last(fast, all_sparse=True),
        }
    if fast.training:
        return {}
    forms = {"fast, fused": fuse(fast, arguments, batch_last=False)}
    if chain:
        forms["fast, fused, batch last"] = fuse(fast, arguments, batch_last=True)
    found: dict[str, nn.Module] = {name: form for name, form in forms.items() if form is not None}
    # Whole vectors of the kernels that keep the batch innermost.
    for name, form in list(found.items())[-1:]:
        for size in _CHUNKS:
            if batch > size and acts_on_samples(form, arguments, size):
                found[f"{name}, {size} samples at a time"] = Chunks(form, size)
    return found


def keep_batch_last(fast: nn.Module, all_sparse: bool = False) -> nn.Module:
    """A copy whose sparse convolutions, pooling and BatchNorm keep the batch innermost.

    BatchNorm takes the ReLU after it. ``all_sparse``: every masked convolution is one of them.
    """
    kept = copy.deepcopy(fast)
    for layer in kept.modules():
        if isinstance(layer, MaskedConv2d):
            layer._layout = BATCH_LAST
            layer.sparse = all_sparse or layer.sparse_in_chain
    fuse_relu_(kept)
    return kept


def choose_whole(
    dense: nn.Module, fast: nn.Module, arguments: tuple[Any, ...], report: Report, min_time: float
) -> nn.Module:
    """Time the models end to end and return the one that the user gets.

    Candidates: dense kernels everywhere, or sparse where a layer won; each with contiguous weights
    and, where there are convolutions, with channels_last weights in the dense layers; and the fast
    model fused, and with the batch innermost. If dense wins, ``fast`` goes back to dense kernels.
    """
    candidates = {"dense": dense, "fast": fast}
    if any(isinstance(m, nn.Conv2d) for m in dense.modules()):
        candidates |= {f"{name}, channels_last": m for name, m in candidates.items()}
    candidates |= _variants(fast, arguments, report.training)
    steps = {}
    for name, model in candidates.items():
        trial = copy.deepcopy(model)
        if name.endswith("channels_last"):
            _channels_last_(trial)
        steps[name] = _whole_step(trial.train(report.training), arguments, report.training)
    # Dropout draws random numbers; the caller's generator is left where it was.
    with torch.random.fork_rng():
        times = timing.measure(steps, min_time=4 * min_time, synchronize=waiting_for(arguments))
    report.timings = {name: t.to_dict() for name, t in times.items()}
    medians = {name: t.median * 1e3 for name, t in times.items()}
    best = {
        kind: min((n for n in medians if n.startswith(kind)), key=lambda n: medians[n])
        for kind in ("dense", "fast")
    }
    report.dense_ms, report.fast_ms = medians[best["dense"]], medians[best["fast"]]
    winner = best["fast"]
    swapped = any(r.chosen == "sparse" for r in report.layers) or "batch last" in winner
    if not swapped or report.fast_ms > report.dense_ms:
        winner = best["dense"]
        report.reverted = swapped
        for layer in fast.modules():
            if isinstance(layer, (MaskedLayer, MonDEQLayer)):
                layer.sparse = False
        for row in report.layers:
            if row.chosen == "sparse":
                row.chosen = "dense"
                row.reason = "the whole model was not faster with sparse layers"
    report.form = winner.partition(", ")[2] if not winner.endswith("channels_last") else ""
    if report.form:
        for row in report.layers:
            _note_chain(candidates[winner], row)
        return candidates[winner]
    if winner.endswith("channels_last"):
        _channels_last_(fast)
        report.channels_last = True
    return fast


def _note_chain(model: nn.Module, row: LayerReport) -> None:
    """What a layer runs in a model that keeps the batch innermost."""
    try:
        layer = model.get_submodule(row.name.rpartition(".")[0])
    except AttributeError:  # never called, hence not in the graph
        return
    if isinstance(layer, MaskedLayer) and row.chosen != ("sparse" if layer.sparse else "dense"):
        row.chosen = "sparse" if layer.sparse else "dense"
        row.reason = "with the batch innermost"


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
