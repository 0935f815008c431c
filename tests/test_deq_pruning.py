"""Pruning inside an equilibrium layer, against derivatives of an unrolled iteration."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastprune as fp
from deq_cells import EXACT, Convolutions, unrolled
from fastprune.swapping import mask_layers_
from small_models import Snapshot

CELL = ["1.cell.conv1.weight", "1.cell.conv2.weight"]


def network(**settings: Any) -> nn.Sequential:
    torch.manual_seed(0)
    layer = fp.nn.DEQ(Convolutions(), **{**EXACT, "solver": "broyden", **settings})
    layers = [nn.Conv2d(1, 4, 3, padding=1), layer, nn.BatchNorm2d(4), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(100, 3)).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 1, 5, 5, generator=g).double(), torch.randint(0, 3, (n,), generator=g))
        for n in (4, 6)
    ]


def oracle(
    model: nn.Module, temperature: float | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """g and H g of the mean loss by the weights of the cell, through 150 plain iterations."""
    model = unrolled(model, 150)
    weights = [model.get_parameter(n) for n in CELL]
    loss, samples = torch.zeros((), dtype=torch.float64), 0
    for x, y in batches():
        logits = model(x)
        logits = logits if temperature is None else logits / temperature
        loss = loss + F.cross_entropy(logits, y, reduction="sum")
        samples += len(y)
    g = torch.autograd.grad(loss / samples, weights, create_graph=True)
    hg = torch.autograd.grad(g, weights, [v.detach() for v in g])
    return (
        {n: v.detach() for n, v in zip(CELL, g, strict=True)},
        dict(zip(CELL, hg, strict=True)),
    )


def largest(scores: dict[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Masks of the k largest scores of all."""
    flat = torch.cat([scores[n].flatten() for n in CELL])
    k = int((1 - sparsity) * len(flat) + 0.5)
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[flat.argsort(descending=True, stable=True)[:k]] = True
    parts = kept.split([scores[n].numel() for n in CELL])
    return {n: p.view(scores[n].shape) for n, p in zip(CELL, parts, strict=True)}


TASK: dict[str, Any] = {"data": batches(), "loss": F.cross_entropy, "include": "1.cell"}


@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_random_and_magnitude(sparsity: float) -> None:
    model = network()
    for n in CELL:  # conv2 is drawn smaller, and would lose every weight
        model.get_parameter(n).data.normal_()
    masks = fp.prune(model, "magnitude", sparsity, include="1.cell")
    assert list(masks) == CELL
    weights = {n: model.get_parameter(n).detach().abs() for n in CELL}
    for name, mask in largest(weights, sparsity).items():
        assert torch.equal(masks[name], mask)
    generator = torch.Generator().manual_seed(5)
    masks = fp.prune(model, "random", sparsity, include="1.cell", generator=generator)
    total = sum(m.numel() for m in masks.values())
    assert sum(int(m.sum()) for m in masks.values()) == int((1 - sparsity) * total + 0.5)


@pytest.mark.parametrize("solver", ["anderson", "broyden", "iteration"])
def test_snip_and_grasp(solver: str) -> None:
    model = network(solver=solver)
    g, _ = oracle(model)
    _, hg = oracle(model, 200.0)
    weights = {n: model.get_parameter(n).detach() for n in CELL}
    before = Snapshot(model)
    for method, expected in [
        ("snip", {n: (weights[n] * g[n]).abs() for n in CELL}),
        ("grasp", {n: weights[n] * hg[n] for n in CELL}),
    ]:
        scores = fp.score(model, method, **TASK)
        for name in CELL:
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(scores[name], expected[name], rtol=1e-6, atol=1e-9 * scale)
        masks = fp.prune(model, method, 0.7, **TASK)
        for name, mask in largest(expected, 0.7).items():
            assert torch.equal(masks[name], mask)
    before.check()


def test_grasp_of_the_papers_network() -> None:
    """Where the paper's GraSP fails (Appendix C): a ResNet DEQ, as it is, in float32."""
    torch.manual_seed(0)
    model = fp.models.create("resnet-deq", in_shape=(1, 8, 8), channels=16, inner_channels=16)
    x, y = torch.randn(8, 1, 8, 8), torch.randint(0, 10, (8,))
    task: dict[str, Any] = {"data": [(x, y)], "loss": F.cross_entropy, "include": "deq.cell"}
    masks = fp.prune(model, "grasp", 0.9, **task)
    assert masks.sparsity() == pytest.approx(0.9, abs=1e-3)
    steps = fp.prune(model, "iter-snip", 0.9, steps=3, **task)
    assert steps.sparsity() == pytest.approx(0.9, abs=1e-3)
    # How near its scores are is a matter of the solves' tolerance.
    model.deq.solver, model.deq.max_iter = "broyden", 100
    exact = copy.deepcopy(model)
    exact.deq.tol = 1e-12
    fine = fp.score(exact, "grasp", dtype=torch.float64, **task)
    angles = []
    for tol in (1e-2, 1e-3, 1e-5):
        model.deq.tol = tol
        scores = fp.score(model, "grasp", **task)
        a, b = (torch.cat([s[n].double().flatten() for n in masks]) for s in (scores, fine))
        angles.append(1.0 - float(a @ b / (a.norm() * b.norm())))
    assert angles[0] < 0.1
    assert angles[1] < 1e-3
    assert angles[2] < 1e-7


def test_synflow() -> None:
    """|w dR/dw| of the network of absolute values, its equilibrium included."""
    model = network()
    x = batches()[0][0]
    state = {n: t.detach().abs() for n, t in model.state_dict().items()}
    other = unrolled(model, 400).eval()
    other.load_state_dict(state)
    r = other(torch.ones(1, 1, 5, 5, dtype=torch.float64)).sum()
    weights = [other.get_parameter(n) for n in CELL]
    grads = torch.autograd.grad(r, weights)
    scores = fp.score(model, "synflow", example_input=x, include="1.cell")
    for name, w, g in zip(CELL, weights, grads, strict=True):
        torch.testing.assert_close(scores[name], (w * g).abs().detach(), rtol=1e-6, atol=1e-12)
    masks = fp.prune(model, "synflow", 0.9, example_input=x, include="1.cell", steps=10)
    assert masks.sparsity() == pytest.approx(0.9, abs=2e-3)


def test_synflow_without_a_bound_is_an_error() -> None:
    """Absolute values of a contraction need not be one: then there is no equilibrium."""

    class Relu(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(40, 40)
            nn.init.orthogonal_(self.linear.weight, gain=0.9)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.relu(self.linear(z) + x)

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 40), fp.nn.DEQ(Relu(), solver="iteration", max_iter=2000), nn.Linear(40, 2)
    )
    model(torch.randn(2, 5))
    assert model[1].info.converged
    with pytest.raises(FloatingPointError, match="DEQ: equilibrium"):
        fp.score(model, "synflow", example_input=torch.zeros(1, 5))


def test_substituted_weights_leave_nothing_behind() -> None:
    """Scoring runs the model with other weights, in another dtype; the layer keeps none of it."""
    torch.manual_seed(0)
    model = network(tol=1e-5, on_failure="warn").float()
    x, y = batches()[0]
    x = x.float()
    before = model(x)
    fp.score(model, "snip", data=[(x, y)], loss=F.cross_entropy, dtype=torch.float64)
    fp.score(model, "synflow", example_input=x)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    model.eval()
    model.train()
    assert torch.equal(model(x), before)


def test_masks_found_are_used_and_trained() -> None:
    torch.manual_seed(0)
    model = fp.models.create("resnet-deq", in_shape=(1, 8, 8), channels=16, inner_channels=16)
    x, y = torch.randn(16, 1, 8, 8), torch.randint(0, 10, (16,))
    masks = fp.prune(model, "snip", 0.8, data=[(x, y)], loss=F.cross_entropy, include="deq.cell")
    mask_layers_(model, masks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    for name, mask in masks.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        assert isinstance(layer, fp.nn.MaskedConv2d)
        assert not layer.present_weight()[~mask].any()
