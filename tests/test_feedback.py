"""Training dense weights through a compressor, against a loop in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import fastprune as fp
from test_dynamic import PRUNED, X, Y, sgd, small, train


def sign(w: Tensor) -> Tensor:
    """BinaryConnect with a scale."""
    return w.sign() * w.abs().mean()


def largest_half(w: Tensor) -> Tensor:
    k = w.numel() // 2
    mask = torch.zeros(w.numel(), dtype=torch.bool)
    mask[w.flatten().abs().sort(descending=True, stable=True).indices[:k]] = True
    return w * mask.view_as(w)


def by_hand(c: Callable[[Tensor], Tensor], steps: int) -> tuple[nn.Module, list[float]]:
    """The dense weights after some steps, and the errors before every fourth and the last."""
    model = small()
    optimizer = sgd(model)
    parameters = dict(model.named_parameters())
    errors = []
    for t in range(steps + 1):
        if t % 4 == 0:
            dense = [parameters[n].detach() for n in PRUNED]
            lost = sum(float((w - c(w)).square().sum()) for w in dense)
            errors.append(lost / sum(float(w.square().sum()) for w in dense))
        if t == steps:
            break
        used = {n: c(p.detach()) if n in PRUNED else p.detach() for n, p in parameters.items()}
        leaves = {n: p.clone().requires_grad_() for n, p in used.items()}
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        loss = F.cross_entropy(functional_call(model, leaves | buffers, X), Y)
        for p, g in zip(
            parameters.values(), torch.autograd.grad(loss, [*leaves.values()]), strict=True
        ):
            p.grad = g
        optimizer.step()
    return model, errors


@pytest.mark.parametrize("compressor", [sign, largest_half, lambda w: w])
@pytest.mark.parametrize("early", [True, False])
def test_against_a_loop(compressor: Any, early: bool) -> None:
    model = small()
    before = dict(model.named_parameters())
    optimizer = sgd(model) if early else None
    training = fp.FeedbackCompression(model, compressor, 4)
    train(model, training, 12, sgd(model) if optimizer is None else optimizer)
    expected, errors = by_hand(compressor, 12)
    for name, p in before.items():
        torch.testing.assert_close(p, expected.get_parameter(name), rtol=1e-9, atol=1e-12)
    assert [r.step for r in training.history] == [0, 4, 8, 12]
    assert [r.error for r in training.history] == pytest.approx(errors, rel=1e-9)
    used = {n: compressor(p.detach()) for n, p in before.items() if n in PRUNED}
    torch.testing.assert_close(model[0].weight, used["0.weight"])
    output = model(X)
    training.finish()
    training.finish()
    assert [type(m) for m in model] == [type(m) for m in small()]
    for name, p in model.named_parameters():
        assert p is before[name]
        if name in PRUNED:
            assert torch.equal(p, used[name])
    torch.testing.assert_close(model(X), output)
    with pytest.raises(RuntimeError, match=r"step\(\) after finish\(\)"):
        training.step()
    assert list(model.state_dict()) == list(small().state_dict())


def test_top_k_is_dpf() -> None:
    model, other = small(), small()
    training = fp.FeedbackCompression(model, largest_half, 1)
    pruner = fp.DPF(other, 0.5, 8, 1, "constant", scope="layer")
    train(model, training, 8)
    train(other, pruner, 8)
    pruner.finish()
    training.finish()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, other.get_parameter(name), rtol=1e-9, atol=1e-12)
    assert [r.error for r in training.history] == pytest.approx(
        [u.error for u in pruner.history[: len(training.history)]], rel=1e-9
    )


def test_shared_weights_stay_shared() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2)).double()
    model[2].weight = model[0].weight
    own = model[0].weight
    training = fp.FeedbackCompression(model, sign)
    x = torch.randn(3, 4, dtype=torch.float64)
    model(x).sum().backward()
    assert own.grad is not None
    assert torch.equal(model[2].weight, sign(own.detach()))
    expected = sign(own.detach())
    training.finish()
    assert model[0].weight is model[2].weight is own
    assert torch.equal(own, expected)


def test_what_is_compressed() -> None:
    model = small()
    fp.FeedbackCompression(model, sign, exclude="0")
    names = [n for n, _ in model.named_parameters() if "parametrizations" in n]
    assert names == ["3.parametrizations.weight.original", "6.parametrizations.weight.original"]


@pytest.mark.parametrize(
    ("compressor", "error", "message"),
    [
        (3, TypeError, "compressor: expected a function, got int"),
        (lambda w: 3, TypeError, r"compressor: expected a tensor of 0\.weight, got int"),
        (
            lambda w: w[:1],
            ValueError,
            r"compressor: expected torch.float64 of shape \(5, 2, 3, 3\)",
        ),
        (lambda w: w.float(), ValueError, r"compressor: .*got torch.float32"),
        (lambda w: w * float("nan"), ValueError, r"\(0\.weight\): an element is NaN"),
    ],
)
def test_errors(compressor: Any, error: type[Exception], message: str) -> None:
    model = small()
    with pytest.raises(error, match=message):
        fp.FeedbackCompression(model, compressor)
    assert type(model[0]) is nn.Conv2d
    assert list(model.state_dict()) == list(small().state_dict())
