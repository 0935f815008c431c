"""Pruning while training as models are trained: autocast, averages, hooks, rollbacks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastprune as fp
from test_dynamic import PRUNED, X, sgd, small


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 4)
    )


def test_training_under_autocast() -> None:
    model, x = mlp(), torch.randn(16, 64)
    pruner = fp.DPF(model, 0.9, 8, every=2)
    optimizer = sgd(model)
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    assert set(pruner.kernels.times) == {"0", "2"}
    ticket_model = mlp()
    ticket = fp.LotteryTicket(ticket_model)
    with torch.autocast("cpu", torch.bfloat16):
        ticket_model(x)
    assert ticket.prune().nnz() < ticket.masks.numel()


def test_inputs_that_are_expanded_views() -> None:
    class Query(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.randn(1, 3, 8))
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.query.expand(len(x), -1, -1)) + x)

    model = Query()
    pruner = fp.DPF(model, 0.5, 4, every=1)
    model(torch.randn(5, 3, 8))
    pruner.step()
    assert set(pruner.kernels.times) == {"a"}


def test_a_layer_that_cannot_be_timed_is_named() -> None:
    model = mlp()
    pruner = fp.DPF(model, 0.9, 8, every=1)
    model(torch.randn(4, 64))
    seen = pruner._watch.seen["0"]
    pruner._watch.seen["0"] = type(seen)((4, 63), (63, 1), *(seen.dtype, seen.device, None))
    with pytest.warns(UserWarning, match="0: not timed: "):
        pruner.step()
    assert set(pruner.kernels.times) == {"2"}


def test_averaged_models_have_the_averaged_mask() -> None:
    model, x = mlp(), torch.randn(4, 64)
    pruner = fp.DPF(model, 0.9, 8, every=1, schedule="constant", scope="layer")
    always = {"dense": 1.0, "sparse": (0.0,) * 3, "chained": ()}
    pruner.use_kernel_times({"0": always, "2": always})
    average = torch.optim.swa_utils.AveragedModel(model, avg_fn=lambda _, new, __: new.clone())
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(4):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
        average.update_parameters(model)
    assert sum(u.flips for u in pruner.history[1:]) > 0
    assert model[0].sparse
    with torch.no_grad():
        assert torch.equal(average.module(x), model(x))


def test_a_model_that_is_rolled_back_counts() -> None:
    model, x = mlp(), torch.randn(4, 64)
    pruner = fp.DPF(model, 0.9, 8, every=1, schedule="constant")
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    saved: Any = None
    for t in range(8):
        if t == 3:
            saved, expected = copy.deepcopy(model.state_dict()), pruner.masks
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    assert pruner.masks != expected
    model.load_state_dict(saved)
    assert pruner.finish() == expected


def test_torchs_fused_layers_do_not_read_past_the_mask() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(16, 2))
    pruner = fp.DPF(model, 0.9, 4, 1, "constant", include=["0.linear1", "0.linear2"])
    x = torch.randn(3, 5, 16)
    model(x)
    pruner.step()
    model.eval()
    with torch.no_grad():
        fused = model(x)
    torch.testing.assert_close(fused, model(x).detach())


def test_hooks_see_the_users_calls_only() -> None:
    model, calls = mlp(), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    pruner = fp.DPF(model, 0.9, 8, every=1)
    for _ in range(3):
        model(torch.randn(4, 64))
        pruner.step()
    assert len(calls) == 3


def test_an_example_that_does_not_fit_changes_nothing() -> None:
    model = mlp()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fp.DPF(model, 0.9, 32, example_input=torch.randn(8, 63))
    assert type(model[0]) is nn.Linear
    assert not model[0]._forward_hooks


def test_filters_chosen_last_are_final() -> None:
    model = small()
    pruner = fp.DPF(model, 0.5, 4, 2, "constant", scope="filter")
    with torch.no_grad():
        model[0].weight.normal_()
    pruner.step()
    before = pruner.masks
    assert pruner.finish() == before


def test_accelerate_takes_a_pruned_model_as_it_takes_a_plain_one() -> None:
    model = small().float()
    masks = fp.DPF(model, 0.5, 4, schedule="constant").finish()
    fast, report = fp.accelerate(model.eval(), masks, X.float(), min_time=0.001)
    assert {r.name for r in report.layers} == set(PRUNED)
    torch.testing.assert_close(fast(X.float()), model(X.float()))
    plain, _ = fp.accelerate(fp.finalize(model), masks, X.float(), min_time=0.001)
    torch.testing.assert_close(plain(X.float()), model(X.float()))
