"""Soft filter pruning against a loop in plain torch."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastprune as fp
from test_dynamic import PRUNED, X, Y, sgd, small, train


def zero_filters(weight: Tensor, sparsity: float) -> Tensor:
    """Set the weakest filters to zero; the rows that are left."""
    n = weight.shape[0]
    norms = weight.detach().flatten(1).double().norm(dim=1)
    keep = torch.sort(norms, descending=True, stable=True).indices[: n - int(n * sparsity)]
    mask = torch.zeros(n, dtype=torch.bool)
    mask[keep] = True
    with torch.no_grad():
        weight[~mask] = 0
    return mask


def test_against_a_loop() -> None:
    model, plain = small(), small()
    optimizer, own = sgd(plain), sgd(model)
    pruner = fp.SFP(model, 0.5, 3)
    assert pruner.masks.sparsity() == 0
    rows: dict[str, Tensor] = {}
    for t in range(1, 15):
        train(model, pruner, 1, own)
        F.cross_entropy(plain(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if t % 3 == 0:
            rows = {n: zero_filters(plain.get_parameter(n), 0.5) for n in PRUNED}
            assert {n: m.flatten(1).all(dim=1).tolist() for n, m in pruner.current.items()} == {
                n: r.tolist() for n, r in rows.items()
            }
        assert type(model[0]) is nn.Conv2d
        for name, p in model.named_parameters():
            torch.testing.assert_close(p, plain.get_parameter(name), rtol=1e-9, atol=1e-12)
    # Gradients have brought the filters back since the last refresh.
    assert all((model.get_parameter(n)[~r] != 0).any() for n, r in rows.items())
    masks = pruner.finish()
    for name in PRUNED:
        row = zero_filters(plain.get_parameter(name), 0.5)
        shape = masks[name].shape
        assert torch.equal(masks[name], row.view(-1, *[1] * (len(shape) - 1)).expand(shape))
        torch.testing.assert_close(model.get_parameter(name), plain.get_parameter(name))
        assert not (model.get_parameter(name)[~masks[name]] != 0).any()
    assert (model[0].bias != 0).all()
    assert isinstance(model[0], fp.nn.MaskedConv2d)
    assert pruner.finish() == masks
    with pytest.raises(RuntimeError, match="finish"):
        pruner.step()
    for _ in range(3):
        F.cross_entropy(model(X), Y).backward()
        own.step()
        own.zero_grad()
    model.eval()
    assert all((model.get_parameter(n)[~m] == 0).all() for n, m in masks.items())
    torch.testing.assert_close(fp.finalize(model)(X), model(X))


def test_of_equal_filters_the_earlier_stays() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0], [0, -1], [2, 0], [1, 0]]))
    fp.SFP(model, 0.5, 1).step()
    assert model[0].weight.tolist() == [[1, 0], [0, 0], [2, 0], [0, 0]]


@given(st.floats(0, 1), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_filters_are_counted_layer_by_layer(sparsity: float, every: int) -> None:
    model = small()
    pruner = fp.SFP(model, sparsity, every)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        train(model, pruner, 4)
        masks = pruner.finish()
    for mask in masks.values():
        n = mask.shape[0]
        assert int(mask.flatten(1).all(dim=1).sum()) == n - int(n * sparsity)


def test_a_saved_run_goes_on_to_the_same_bits() -> None:
    model = small()
    optimizer, pruner = sgd(model), fp.SFP(model, 0.4, 3)
    train(model, pruner, 7, optimizer)
    saved: Any = copy.deepcopy((model.state_dict(), optimizer.state_dict(), pruner.state_dict()))
    train(model, pruner, 6, optimizer)
    again = small()
    again_optimizer, again_pruner = sgd(again), fp.SFP(again, 0.4, 3)
    again.load_state_dict(saved[0])
    again_optimizer.load_state_dict(saved[1])
    again_pruner.load_state_dict(saved[2])
    train(again, again_pruner, 6, again_optimizer)
    masks = pruner.finish()
    assert again_pruner.finish() == masks
    assert again_pruner.history == pruner.history
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    finished = small()
    restored = fp.SFP(finished, 0.4, 3)
    restored.load_state_dict(pruner.state_dict())
    finished.load_state_dict(model.state_dict())
    assert restored.finish() == masks
    # BatchNorm's statistics are the same; so are the kernels' choices, by the same table.
    model.eval()
    finished.eval()
    assert torch.equal(finished(X), model(X))


def test_errors() -> None:
    with pytest.raises(ValueError, match="sparsity: expected a number"):
        fp.SFP(small(), -0.5, 1)
    with pytest.raises(ValueError, match="every: expected a whole number"):
        fp.SFP(small(), 0.5, 0)
    with pytest.raises(ValueError, match=r"0\.weight: no sparse layer takes the place of Conv1d"):
        fp.SFP(nn.Sequential(nn.Conv1d(2, 2, 3), nn.Linear(2, 2)), 0.5, 1)
    model = small()
    pruner = fp.SFP(model, 0.5, 1)
    with torch.no_grad():
        model[3].weight[0] = float("nan")
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"3\.weight"):
        pruner.step()
    assert torch.equal(model[0].weight, before)
