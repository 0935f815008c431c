"""Pruning while training: DPF and its simple rivals, against loops in plain torch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

import fastprune as fp
from fastprune.dynamic.kernels import DENSITIES, LayerTimes
from fastprune.dynamic.updates import pruning_error

X = torch.randn(6, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 0, 1, 2])


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 4, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    ).double()


PRUNED = ["0.weight", "3.weight", "6.weight"]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2, nesterov=True
    )


def train(model: nn.Module, pruner: Any, steps: int, optimizer: Any = None) -> None:
    optimizer = sgd(model) if optimizer is None else optimizer
    for _ in range(steps):
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()


def largest(weights: dict[str, Tensor], k: int, within: Any = None) -> dict[str, Tensor]:
    """The k largest magnitudes by a stable sort."""
    flat = torch.cat([w.detach().abs().flatten() for w in weights.values()])
    if within is not None:
        flat[~torch.cat([m.flatten() for m in within.values()])] = -1
    keep = torch.zeros(len(flat), dtype=torch.bool)
    keep[torch.sort(flat, descending=True, stable=True).indices[:k]] = True
    parts = keep.split([w.numel() for w in weights.values()])
    return {n: p.view_as(w) for (n, w), p in zip(weights.items(), parts, strict=True)}


def by_hand(
    sparsity: Callable[[int], float],
    steps: int,
    every: int,
    *,
    dense_grad: bool,
    nested: bool,
    due: Callable[[int], bool] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Algorithm 1 of Lin et al., and the same with masked gradients: (weights, masks)."""
    model = small()
    parameters = dict(model.named_parameters())
    optimizer = sgd(model)
    total = sum(parameters[n].numel() for n in PRUNED)
    masks: Any = None
    for t in range(steps + 1):
        if due(t) if due else t % every == 0:
            k = int((1 - sparsity(t)) * total + 0.5)
            masks = largest({n: parameters[n] for n in PRUNED}, k, masks if nested else None)
        if t == steps:
            break
        pruned = {
            n: p.detach() * masks[n] if n in PRUNED else p.detach() for n, p in parameters.items()
        }
        leaves = {n: p.clone().requires_grad_() for n, p in pruned.items()}
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        loss = F.cross_entropy(functional_call(model, leaves | buffers, X), Y)
        for (n, p), g in zip(
            parameters.items(), torch.autograd.grad(loss, [*leaves.values()]), strict=True
        ):
            p.grad = g if dense_grad or n not in PRUNED else g * masks[n]
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach() for n, p in parameters.items()}, masks


def cubic(s: float, ramp: int) -> Callable[[int], float]:
    return lambda t: s - s * (1 - min(t, ramp) / ramp) ** 3


@pytest.mark.parametrize("schedule", ["constant", "cubic"])
def test_dpf_is_algorithm_1(schedule: Any) -> None:
    steps, every = 24, 4
    model = small()
    pruner = fp.DPF(model, 0.8, steps, every, schedule, ramp_steps=12)
    assert list(pruner.masks) == PRUNED
    train(model, pruner, steps)
    want = (lambda t: 0.8) if schedule == "constant" else cubic(0.8, 12)
    weights, masks = by_hand(want, steps, every, dense_grad=True, nested=False)
    assert pruner.masks == fp.Masks(masks)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), weights[name], rtol=1e-9, atol=1e-12)
    dense = pruner.dense_weights()
    assert all(torch.equal(dense[n], model.get_parameter(n)) for n in PRUNED)
    assert all((w[~masks[n]] != 0).all() for n, w in dense.items())
    final = pruner.finish()
    assert final == fp.Masks(masks)
    for name in PRUNED:
        assert torch.equal(model.get_parameter(name), dense[name] * final[name])
    assert pruner.finish() == final
    with pytest.raises(RuntimeError, match=r"DPF: step\(\) after finish\(\)"):
        pruner.step()


def test_refreshes_are_at_multiples_of_every_from_the_start() -> None:
    model = small()
    pruner = fp.DPF(model, 0.5, 40, schedule="constant")
    train(model, pruner, 40)
    assert [u.step for u in pruner.history] == [0, 16, 32]
    assert pruner.every == 16


def test_incremental_is_nested_and_trains_kept_weights_only() -> None:
    steps, every = 24, 4
    model = small()
    pruner = fp.Incremental(model, 0.8, steps, every, ramp_steps=16)
    train(model, pruner, steps)
    weights, masks = by_hand(cubic(0.8, 16), steps, every, dense_grad=False, nested=True)
    assert pruner.finish() == fp.Masks(masks)
    for name, p in model.named_parameters():
        expected = weights[name] * masks[name] if name in PRUNED else weights[name]
        torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-12)
    assert all(u.revived == 0 for u in pruner.history)


def test_one_shot_prunes_once() -> None:
    model = small()
    pruner = fp.OneShot(model, 0.7, prune_at=6)
    train(model, pruner, 12)
    weights, masks = by_hand(
        lambda t: 0.0 if t < 6 else 0.7,
        12,
        1,
        dense_grad=False,
        nested=True,
        due=(0, 6).__contains__,
    )
    assert [u.step for u in pruner.history] == [0, 6]
    assert pruner.finish() == fp.Masks(masks)
    torch.testing.assert_close(
        model[0].weight.detach(), weights["0.weight"] * masks["0.weight"], rtol=1e-9, atol=1e-12
    )


@given(
    st.floats(0, 1),
    st.sampled_from(["cubic", "constant", "linear", "exponential"]),
    st.integers(1, 9),
)
@settings(max_examples=25, deadline=None)
def test_the_final_count_is_exact(sparsity: float, schedule: Any, every: int) -> None:
    model = small()
    pruner = fp.DPF(model, sparsity, 10, every, schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        train(model, pruner, 10)
        masks = pruner.finish()
    assert masks.nnz() == int((1 - sparsity) * masks.numel() + 0.5)


def test_scopes() -> None:
    for scope in ("layer", "neuron", "filter"):
        model = small()
        pruner = fp.DPF(model, 0.5, 4, 2, "constant", scope=scope)
        train(model, pruner, 4)
        dense = [pruner.dense_weights()[n] for n in PRUNED]
        expected = fp.global_topk_mask(dense, 0.5, scope=scope, score="magnitude")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a layer may be emptied
            got = pruner.finish()
        assert all(torch.equal(got[n], e) for n, e in zip(PRUNED, expected, strict=True))


def test_a_function_as_schedule() -> None:
    model = small()
    pruner = fp.DPF(model, 0.9, 8, 2, lambda t: 0.1 * t, ramp_steps=6)
    train(model, pruner, 8)
    total = pruner.masks.numel()
    kept = [int((1 - s) * total + 0.5) for s in (0, 0.2, 0.4, 0.9, 0.9)]
    assert [u.kept for u in pruner.history] == kept


def test_what_is_prunable() -> None:
    assert list(fp.DPF(small(), 0.5, 4).masks) == PRUNED
    assert list(fp.DPF(small(), 0.5, 4, exclude=nn.Linear).masks) == PRUNED[:2]
    assert list(fp.DPF(small(), 0.5, 4, include="8").masks) == ["8.weight"]
    with pytest.raises(ValueError, match="last linear layer, which stays dense"):
        fp.DPF(nn.Sequential(nn.Linear(3, 3)), 0.5, 4)
    with pytest.raises(ValueError, match=r"0\.weight: no sparse layer takes the place of Conv1d 0"):
        fp.DPF(nn.Sequential(nn.Conv1d(2, 2, 3), nn.Linear(2, 2)), 0.5, 4)


def test_updates_say_what_changed() -> None:
    model = small()
    pruner = fp.DPF(model, 0.6, 8, 2)
    previous = pruner.masks
    assert pruner.history[0].macs is None
    optimizer = sgd(model)
    for t in range(1, 9):
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
        dense = pruner.dense_weights()
        update = pruner.step()
        assert (update is not None) == (t % 2 == 0)
        if update is None:
            continue
        now = pruner.masks
        changes = fp.mask_changes(previous, now).total
        assert (update.pruned, update.revived, update.flips) == (
            changes.pruned,
            changes.revived,
            changes.flips,
        )
        assert update.iou == changes.iou
        assert update.sparsity == now.sparsity()
        lost = sum((w[~now[n]] ** 2).sum() for n, w in dense.items())
        whole = sum((w**2).sum() for w in dense.values())
        assert update.error == pytest.approx(float(lost / whole), rel=1e-12)
        assert update.densities == {n: float(m.double().mean()) for n, m in now.items()}
        assert update.macs == fp.macs(small(), X[:1], now).total.direct
        assert update is pruner.history[-1]
        previous = now


def test_pruning_error_of_nothing() -> None:
    mask = {"w": torch.tensor([True, False])}
    assert pruning_error({"w": torch.zeros(2)}, mask) == 0.0
    assert pruning_error({"w": torch.tensor([3.0, 4.0])}, mask) == 16 / 25
    with pytest.raises(ValueError, match=r"\(w\): an element is NaN"):
        pruning_error({"w": torch.tensor([3.0, float("nan")])}, mask)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: fp.DPF(m, 0.8, 20, 3),
        lambda m: fp.Incremental(m, 0.8, 20, 3),
        lambda m: fp.OneShot(m, 0.8, 9),
    ],
)
def test_a_saved_run_goes_on_to_the_same_bits(make: Callable[[nn.Module], Any]) -> None:
    model = small()
    optimizer, pruner = sgd(model), make(model)
    train(model, pruner, 7, optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), pruner.state_dict()))
    train(model, pruner, 13, optimizer)
    masks = pruner.finish()
    again = small()
    again_optimizer, again_pruner = sgd(again), make(again)
    again.load_state_dict(saved[0])
    again_optimizer.load_state_dict(saved[1])
    again_pruner.load_state_dict(saved[2])
    train(again, again_pruner, 13, again_optimizer)
    assert again_pruner.finish() == masks
    assert again_pruner.history == pruner.history
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    finished = make(small())
    finished.load_state_dict(pruner.state_dict())
    assert finished.finish() == masks


def test_states_of_others_are_refused() -> None:
    state = fp.DPF(small(), 0.5, 4).state_dict()
    with pytest.raises(ValueError, match="expected that of 'incremental', got 'dpf'"):
        fp.Incremental(small(), 0.5, 4).load_state_dict(state)
    with pytest.raises(ValueError, match="other weights"):
        fp.DPF(small(), 0.5, 4, exclude="0").load_state_dict(state)


def test_a_nan_weight_is_named() -> None:
    model = small()
    pruner = fp.DPF(model, 0.5, 4, 1)
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"3\.weight"):
        pruner.step()


def test_fine_tuning_keeps_the_mask() -> None:
    model = small()
    optimizer = sgd(model)
    pruner = fp.DPF(model, 0.7, 6, 2)
    train(model, pruner, 6, optimizer)
    masks = pruner.finish()
    for _ in range(4):
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    for name, mask in masks.items():
        assert (model.get_parameter(name)[~mask] == 0).all()
    plain = fp.finalize(model)
    torch.testing.assert_close(plain(X), model(X))
    assert type(plain[0]) is nn.Conv2d


def test_kernels_follow_the_table() -> None:
    model = small()
    pruner = fp.DPF(model, 0.9, 8, 2, "linear")
    layer = model[3]
    for name in ("0", "3", "6"):
        # Faster than dense below a density of 0.2.
        line = tuple(5 * d for d in DENSITIES)
        pruner.kernels.times[name] = LayerTimes(1.0, line, ())
    for density in (1.0, 0.5, 0.18, 0.01):
        order = torch.arange(layer.weight.numel()).view_as(layer.weight)
        layer.set_mask(order < density * order.numel())
        pruner.kernels.choose()
        assert layer.sparse == (density < 0.2)
    chained = tuple(0.5 * d for d in DENSITIES)
    for name in ("0", "3", "6"):
        chain = chained if name != "6" else ()
        pruner.kernels.times[name] = LayerTimes(1.0, (0.4, 0.5, 0.9), chain)
    pruner.kernels.choose()
    assert isinstance(model[1], nn.BatchNorm2d)
    y = model(X)
    masks = {n: model.get_submodule(n.removesuffix(".weight")).weight_mask for n in PRUNED}
    expected = small()
    fp.Masks(masks).apply_(expected)
    torch.testing.assert_close(y, expected(X))
    with pytest.raises(ValueError, match="every: expected a whole number"):
        fp.DPF(model, 0.5, 4, every=0)


def test_kernels_are_measured_once_the_model_has_run() -> None:
    model = small()
    pruner = fp.DPF(model, 0.9, 8, 2)
    assert not pruner.kernels.times
    assert len(model[0]._forward_hooks) == 1
    copy.deepcopy(model)(X)
    train(model, pruner, 2)
    assert set(pruner.kernels.times) == {"0", "3", "6"}
    assert all(not m._forward_hooks for m in model)
    before = copy.deepcopy(small().state_dict())
    other = small()
    state = torch.random.get_rng_state()
    measured = fp.DPF(other, 0.9, 8, 2, example_input=X)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert set(measured.kernels.times) == {"0", "3", "6"}
    assert measured.history[0].macs == fp.macs(small(), X[:1]).total.dense
    assert all(torch.equal(v, other.state_dict()[n]) for n, v in before.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.5}, r"sparsity: expected a number in \[0, 1\], got 1.5"),
        ({"total_steps": 0}, "total_steps: expected a whole number >= 1, got 0"),
        ({"schedule": "square"}, "schedule: expected one of .* or a function of the step"),
        ({"scope": "all"}, "scope: expected one of global"),
        ({"schedule": lambda t: 2.0}, r"schedule\(0\): expected a number"),
        ({"ramp_steps": -1}, "ramp_steps: expected"),
    ],
)
def test_bad_arguments_change_nothing(arguments: dict[str, Any], message: str) -> None:
    model = small()
    with pytest.raises(ValueError, match=message):
        fp.DPF(model, **({"sparsity": 0.5, "total_steps": 4} | arguments))
    assert type(model[0]) is nn.Conv2d
