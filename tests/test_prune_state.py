"""``prune`` and ``score`` leave the model and torch as they were."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastprune.pruners import methods, prune, score
from small_models import TASK, Snapshot, batch, network

quiet = pytest.mark.filterwarnings("ignore:.*pruned every weight")


def unusual() -> nn.Sequential:
    """A model in a state that is easy to disturb."""
    model = network()
    model.train()
    model[1].eval()
    model[7].weight.requires_grad_(False)
    model[5].weight.grad = torch.randn(5, 16)
    model[0].register_forward_hook(lambda m, i, o: o * 1.5)
    model[5].register_forward_pre_hook(lambda m, i: None)
    with torch.no_grad():
        model[1].running_mean.uniform_(-1, 1)
        model[5].bias[0] = -0.0
    return model


@quiet
@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("call", [prune, score])
def test_model_and_random_state_are_left_alone(method, call):
    model = unusual()
    model[1].train()
    torch.rand(3)
    before = Snapshot(model)
    arguments = {"sparsity": 0.8, "steps": 3} if call is prune else {}
    loader = DataLoader(TensorDataset(*batch(10)), batch_size=4, shuffle=True)
    first = call(model, method, data=loader, loss=F.cross_entropy, **arguments)
    before.check()
    again = call(model, method, data=loader, loss=F.cross_entropy, **arguments)
    assert all(torch.equal(first[n], again[n]) for n in first)
    if call is prune and method not in ("random", "magnitude"):
        assert len(first) == 3


class Boom(BaseException):
    pass


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), Boom()])
@pytest.mark.parametrize(
    ("method", "place"),
    [
        *itertools.product(["snip", "grasp", "force"], ["loss", "forward", "progress", "data"]),
        *itertools.product(["synflow"], ["forward", "progress"]),
        ("magnitude", "progress"),
    ],
)
def test_model_is_left_alone_when_something_raises(method, place, error):
    model = unusual()
    calls = itertools.count()

    def fail(*_: object) -> None:
        if next(calls) >= 1:
            raise error

    def loss(output: Tensor, y: Tensor) -> Tensor:
        if place == "loss":
            fail()
        return F.cross_entropy(output, y)

    def data():
        for seed in range(6):
            if place == "data":
                fail()
            yield batch(seed=seed)

    if place == "forward":
        model[7].register_forward_pre_hook(fail)
    before = Snapshot(model)
    arguments = (
        {"example_input": batch()[0]}
        if method == "synflow"
        else {}
        if method == "magnitude"
        else {"data": data(), "loss": loss}
    )
    with pytest.raises(type(error)):
        prune(
            model, method, 0.5, steps=4, progress=fail if place == "progress" else None, **arguments
        )
    before.check()


def test_scores_respect_the_mode_of_the_model():
    model = network()
    model[3] = nn.Identity()
    with torch.no_grad():
        model[1].running_var.fill_(4.0)
    train = score(model.train(), "snip", **TASK)["0.weight"]
    evaluation = score(model.eval(), "snip", **TASK)["0.weight"]
    assert not torch.allclose(train, evaluation)
    assert torch.equal(
        score(model.train(), "synflow", example_input=batch()[0])["0.weight"],
        score(model.eval(), "synflow", example_input=batch()[0])["0.weight"],
    )


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", methods())
def test_callers_without_gradients(method, context):
    model = network().eval()
    expected = score(model, method, **TASK)
    with context():
        inside = [batch()]
        got = score(model, method, data=inside, loss=F.cross_entropy)
        masks = prune(model, method, 0.5, steps=2, data=inside, loss=F.cross_entropy)
    assert all(torch.equal(got[n], expected[n]) for n in expected)
    assert not any(m.is_inference() for m in masks.values())


def test_frozen_weights_are_scored_and_the_model_may_modify_its_weights():
    class Clamping(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight.clamp_(-0.01, 0.01)
            return super().forward(x)

    model = nn.Sequential(nn.Flatten(), Clamping(16, 3)).requires_grad_(False)
    before = Snapshot(model)
    assert score(model, "snip", **TASK)["1.weight"].any()
    before.check()
