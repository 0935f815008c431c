"""Layers that become masked where they stand, and plain again."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastprune as fp
from fastprune.swapping import mask_layers_, unmask_layers_


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=(1, 0), padding_mode="circular"),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 3),
    )


def some_masks(model: nn.Module) -> fp.Masks:
    generator = torch.Generator().manual_seed(1)
    return fp.Masks(
        {n: torch.rand(m.shape, generator=generator) < 0.4 for n, m in fp.Masks.ones(model).items()}
    )


X = torch.randn(3, 2, 6, 6)


@pytest.mark.parametrize("weight_grad", ["sampled", "dense"])
def test_there_and_back(weight_grad: str) -> None:
    model = small()
    before, layers = copy.deepcopy(model), list(model)
    parameters = dict(model.named_parameters())
    masks = some_masks(model)
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    mask_layers_(model, masks, weight_grad)
    assert list(model) == layers
    assert isinstance(model[0], fp.nn.MaskedConv2d)
    assert isinstance(model[3], fp.nn.MaskedLinear)
    assert all(p is parameters[n] for n, p in model.named_parameters())
    expected = copy.deepcopy(before)
    masks.apply_(expected)
    torch.testing.assert_close(model(X), expected(X))
    assert calls == [1]
    kept = parameters["0.weight"][~masks["0.weight"]].abs().sum()
    assert (kept > 0) == (weight_grad == "dense")
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(nn.Sequential(*model[3:])))]
    assert isinstance(copies[1][0], fp.nn.MaskedLinear)
    unmask_layers_(model)
    assert [type(m) for m in model] == [type(m) for m in before]
    assert all(p is parameters[n] for n, p in model.named_parameters())
    own = {k for k in model[0].__dict__ if not k.startswith("__")}
    assert own == set(before[0].__dict__)
    assert [*model.state_dict()] == [*before.state_dict()]
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name])
    assert isinstance(copies[0][0], fp.nn.MaskedConv2d)  # a copy is of its own


def test_an_optimizer_goes_on() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    F.mse_loss(model(X), torch.zeros(3, 3)).backward()
    optimizer.step()
    masks = some_masks(model)
    mask_layers_(model, masks)
    before = model[0].weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(model(X), torch.zeros(3, 3)).backward()
        optimizer.step()
    assert not torch.equal(model[0].weight, before)
    unmask_layers_(model)
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert (weight[~mask] == 0).all()
        assert (weight[mask] != 0).all()


def test_masks_change_in_place() -> None:
    model = small()
    mask_layers_(model, fp.Masks.ones(model), "dense")
    layer = model[3]
    masks = some_masks(model)
    mask_layers_(model, masks)
    assert model[3] is layer
    assert layer.weight_grad == "sampled"
    assert torch.equal(layer.weight_mask, masks["3.weight"])


def test_a_shared_weight_is_masked_in_every_layer() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight = model[0].weight
    mask = torch.rand(5, 5) < 0.5
    users = mask_layers_(model, {"1.weight": mask})
    assert users["1.weight"] == [model[0], model[1]]
    assert all(isinstance(m, fp.nn.MaskedLinear) for m in model)


def test_the_model_may_be_a_layer() -> None:
    model = nn.Linear(4, 3)
    mask_layers_(model, {"weight": torch.eye(3, 4).bool()})
    assert isinstance(model, fp.nn.MaskedLinear)


def test_refusals_change_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(2, 2, 3))
    masks = fp.Masks.ones(model)
    with pytest.raises(ValueError, match=r"^1.weight: no sparse layer .* Conv1d 1: leave .* out"):
        mask_layers_(model, masks)
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match=r"masks\['9.weight'\]: the model has no parameter"):
        mask_layers_(model, {"0.weight": masks["0.weight"], "9.weight": torch.ones(2).bool()})
    with pytest.raises(ValueError, match="weight_grad: expected"):
        mask_layers_(model, {"0.weight": masks["0.weight"]}, "none")  # type: ignore[arg-type]
    assert type(model[0]) is nn.Linear
    assert "weight_mask" not in model[0]._buffers
