"""Every method against an independent, straightforward computation."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprune.pruners import methods, prune, score

pytestmark = pytest.mark.filterwarnings("ignore:.*pruned every weight")
DATA_METHODS = ["snip", "grasp", "force", "iter-snip", "grasp-it"]


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4)
    )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.block = nn.Sequential(
            nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1)
        )
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.head(F.relu(x + self.block(x)).mean((2, 3)))


def grouped() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1, groups=8, stride=2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(8 * 2 * 2, 4),
    )


NETWORKS = {
    "sequential": (mlp, (3, 2, 2)),
    "residual": (Residual, (3, 6, 6)),
    "grouped": (grouped, (3, 6, 6)),
}


def batch(shape: tuple[int, ...], size: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(size, *shape, generator=g), torch.randint(0, 4, (size,), generator=g)


def prunable_of(model: nn.Module) -> dict[str, nn.Parameter]:
    kinds = (nn.Linear, nn.Conv2d)
    return {f"{n}.weight": m.weight for n, m in model.named_modules() if isinstance(m, kinds)}


def best(scores: dict[str, Tensor], k: int, within: dict[str, Tensor] | None = None):
    """The k best of the candidates, by an ordinary sort on (-score, index)."""
    flat = torch.cat([s.flatten() for s in scores.values()]).tolist()
    names = list(scores)
    ok = (
        [True] * len(flat)
        if within is None
        else torch.cat([within[n].flatten() for n in names]).tolist()
    )
    order = sorted((i for i in range(len(flat)) if ok[i]), key=lambda i: (-flat[i], i))
    keep = torch.zeros(len(flat), dtype=torch.bool)
    keep[order[:k]] = True
    parts = keep.split([s.numel() for s in scores.values()])
    return {n: m.view(scores[n].shape) for n, m in zip(names, parts, strict=True)}


def gradient_at(model, masks, batches, loss=F.cross_entropy) -> dict[str, Tensor]:
    """Mean gradient at w . m on a copy of the model: plain backward, sample-weighted."""
    model = copy.deepcopy(model)
    weights = prunable_of(model)
    with torch.no_grad():
        for n, w in weights.items():
            w.mul_(masks[n])
    total = sum(len(x) for x, _ in batches)
    grads = {n: torch.zeros_like(w) for n, w in weights.items()}
    for x, y in batches:
        model.zero_grad()
        loss(model(x), y).backward()
        for n, w in weights.items():
            grads[n] += w.grad * (len(x) / total)
    return grads


def ones_for(model) -> dict[str, Tensor]:
    return {n: torch.ones_like(w, dtype=torch.bool) for n, w in prunable_of(model).items()}


def same(masks, expected) -> bool:
    return list(masks) == list(expected) and all(
        torch.equal(masks[n], expected[n]) for n in expected
    )


# -- exactly k -----------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", methods())
def test_exactly_k_weights_remain(method, network):
    make, shape = NETWORKS[network]
    model = make()
    x, y = batch(shape)
    n = sum(w.numel() for w in prunable_of(model).values())
    for sparsity in (0.0, 0.5, 0.95, 0.987, 1.0):
        masks = prune(model, method, sparsity=sparsity, data=[(x, y)], loss=F.cross_entropy)
        assert masks.nnz() == math.floor((1 - sparsity) * n + 0.5)
        assert masks.numel() == n
        assert list(masks) == list(prunable_of(model))


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("schedule", ["linear", "exponential", "cubic", None])
def test_exactly_k_with_every_schedule_and_scope(method, schedule):
    model = mlp()
    x, y = batch((3, 2, 2))
    arguments = {"data": [(x, y)], "loss": F.cross_entropy, "steps": 3, "schedule": schedule}
    sizes = [w.shape for w in prunable_of(model).values()]
    masks = prune(model, method, 0.7, scope="layer", **arguments)
    assert [m.sum() for m in masks.values()] == [
        math.floor((1 - 0.7) * s.numel() + 0.5) for s in sizes
    ]
    masks = prune(model, method, 0.7, scope="neuron", **arguments)
    for m, s in zip(masks.values(), sizes, strict=True):
        assert (m.sum(1) == math.floor((1 - 0.7) * s[1] + 0.5)).all()
    if method == "grasp":
        with pytest.raises(ValueError, match="filter"):
            prune(model, method, 0.7, scope="filter", **arguments)
        return
    masks = prune(model, method, 0.7, scope="filter", **arguments)
    rows = torch.cat([m.sum(1) == m.shape[1] for m in masks.values()])
    assert rows.sum() == math.floor((1 - 0.7) * (9 + 7 + 4) + 0.5)
    assert masks.nnz() == sum(int(m.any(1).sum()) * m.shape[1] for m in masks.values())


# -- each method ---------------------------------------------------------------------------------


def test_random():
    model = mlp()
    g = torch.Generator().manual_seed(7)
    noise = {n: torch.rand(w.shape, generator=g) for n, w in prunable_of(model).items()}
    for generator, again in ((torch.Generator().manual_seed(7), False), (None, True)):
        if generator is None:
            torch.manual_seed(7)
        masks = prune(model, "random", 0.8, generator=generator)
        assert same(masks, best(noise, masks.nnz()))
        # a given generator advances, the default one is put back
        assert (prune(model, "random", 0.8, generator=generator) == masks) is again
    torch.manual_seed(7)
    assert all(torch.equal(s, noise[n]) for n, s in score(model, "random").items())


def test_magnitude():
    model = Residual()
    size = {n: w.detach().abs() for n, w in prunable_of(model).items()}
    masks = prune(model, "magnitude", 0.9)
    assert same(masks, best(size, masks.nnz()))
    assert prune(model, "magnitude", 0.9, steps=5, schedule="linear") == masks
    assert all(torch.equal(s, size[n]) for n, s in score(model, "magnitude").items())


def test_ties_go_to_the_earlier_index():
    model = mlp()
    for p in model.parameters():
        nn.init.constant_(p, -0.5)
    flat = torch.cat([m.flatten() for m in prune(model, "magnitude", 0.8).values()])
    assert flat.tolist() == [True] * int(flat.sum()) + [False] * int((~flat).sum())


@pytest.mark.parametrize("network", NETWORKS)
def test_snip_one_batch_is_bitwise_plain_backward(network):
    make, shape = NETWORKS[network]
    model = make().eval()
    x, y = batch(shape)
    grads = gradient_at(model, ones_for(model), [(x, y)])
    expected = {n: (w.detach() * grads[n]).abs() for n, w in prunable_of(model).items()}
    scores = score(model, "snip", data=(x, y), loss=F.cross_entropy)
    assert all(torch.equal(scores[n], expected[n]) for n in expected)
    masks = prune(model, "snip", 0.9, data=(x, y), loss=F.cross_entropy)
    assert same(masks, best(expected, masks.nnz()))


def test_snip_averages_batches_by_sample():
    model = mlp()
    sizes = (5, 2, 6)
    batches = [batch((3, 2, 2), size, seed) for seed, size in enumerate(sizes)]
    whole = (torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))
    options = {"loss": F.cross_entropy, "dtype": torch.float64}
    a = score(model, "snip", data=batches, **options)
    b = score(model, "snip", data=whole, **options)
    for n in a:
        torch.testing.assert_close(a[n], b[n], rtol=1e-12, atol=1e-15)
    # not the mean of absolute values
    parts = [score(model, "snip", data=[d], **options) for d in batches]
    absolute = sum(p["1.weight"] * s for p, s in zip(parts, sizes, strict=True)) / sum(sizes)
    assert (absolute > a["1.weight"] + 1e-6).any()


@pytest.mark.parametrize("temperature", [None, 1.0, 3.0])
def test_grasp_against_the_full_hessian(temperature):
    model = mlp().double()  # tanh: the Hessian is not degenerate
    batches = [batch((3, 2, 2), size, seed) for seed, size in enumerate((5, 3))]
    batches = [(x.double(), y) for x, y in batches]
    weights = prunable_of(model)
    shapes = [w.shape for w in weights.values()]
    others = {n: p for n, p in model.named_parameters() if n not in weights}
    t = 200.0 if temperature is None else temperature

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([s.numel() for s in shapes])
        state = {n: p.view(s) for n, p, s in zip(weights, parts, shapes, strict=True)}
        losses = [
            F.cross_entropy(torch.func.functional_call(model, {**others, **state}, (x,)) / t, y)
            * len(x)
            for x, y in batches
        ]
        return sum(losses) / 8

    flat = torch.cat([w.detach().flatten() for w in weights.values()])
    g = torch.autograd.functional.jacobian(loss, flat)
    h = torch.autograd.functional.hessian(loss, flat)
    expected = flat * (h @ g)
    scores = score(model, "grasp", data=batches, loss=F.cross_entropy, temperature=temperature)
    got = torch.cat([s.flatten() for s in scores.values()])
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-14)
    assert (got < 0).any()
    assert (got > 0).any()
    masks = prune(model, "grasp", 0.6, data=batches, loss=F.cross_entropy, temperature=temperature)
    assert same(masks, best(scores, masks.nnz()))


def test_grasp_sees_the_same_dropout_in_both_passes():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, 4))
    x, y = batch((3, 2, 2))
    torch.manual_seed(3)
    first = score(model, "grasp", data=[(x, y)], loss=F.cross_entropy, dtype=torch.float64)
    torch.manual_seed(3)
    dropped = F.dropout(x.double().flatten(1), 0.5)
    plain = nn.Sequential(nn.Linear(12, 4)).double()
    plain.load_state_dict({f"0.{k[2:]}": v for k, v in model.state_dict().items()})
    second = score(plain, "grasp", data=[(dropped, y)], loss=F.cross_entropy)
    torch.testing.assert_close(first["2.weight"], second["0.weight"], rtol=1e-9, atol=1e-20)


def test_synflow_counts_paths():
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    a, b, c = (model[i].weight.detach().double().abs() for i in (0, 2, 4))
    p, q = (model[i].bias.detach().double().abs() for i in (0, 2))
    expected = {n: torch.zeros_like(w) for n, w in zip(("0", "2", "4"), (a, b, c), strict=True)}
    # every path from an input (of value 1) or from a bias to an output
    for i, j, k, o in itertools.product(range(3), range(4), range(3), range(2)):
        value = a[j, i] * b[k, j] * c[o, k]
        expected["0"][j, i] += value
        expected["2"][k, j] += value
        expected["4"][o, k] += value
    for j, k, o in itertools.product(range(4), range(3), range(2)):
        expected["2"][k, j] += p[j] * b[k, j] * c[o, k]
        expected["4"][o, k] += p[j] * b[k, j] * c[o, k]
    for k, o in itertools.product(range(3), range(2)):
        expected["4"][o, k] += q[k] * c[o, k]
    scores = score(model, "synflow", example_input=torch.randn(5, 3))
    for n, e in expected.items():
        assert scores[f"{n}.weight"].dtype == torch.float64
        torch.testing.assert_close(scores[f"{n}.weight"], e, rtol=1e-12, atol=0)


@pytest.mark.parametrize("network", NETWORKS)
def test_synflow_loop(network):
    make, shape = NETWORKS[network]
    model = make()
    for _ in range(3):
        model(batch(shape)[0])  # running statistics of both signs
    n = sum(w.numel() for w in prunable_of(model).values())
    d, steps = 1 - 0.93, 13
    net = copy.deepcopy(model).double().eval()
    for t in net.state_dict().values():
        if t.is_floating_point():
            t.abs_()
    dense = {m: w.detach().clone() for m, w in prunable_of(net).items()}
    masks = ones_for(net)
    for t in range(1, steps + 1):
        net.zero_grad()
        with torch.no_grad():
            for m, w in prunable_of(net).items():
                w.copy_(dense[m] * masks[m])
        net(torch.ones(1, *shape, dtype=torch.float64)).sum().backward()
        scores = {m: (w * w.grad).detach().abs() for m, w in prunable_of(net).items()}
        k = math.floor(d * n + 0.5) if t == steps else int(n * d ** (t / steps))
        masks = best(scores, k, masks)
    got = prune(model, "synflow", 0.93, example_input=batch(shape)[0], steps=steps)
    assert same(got, masks)
    assert prune(model, "synflow", 0.93, data=[batch(shape)], steps=steps) == got


def test_synflow_leaves_integer_and_unsaved_buffers_alone():
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 1, bias=False)
            self.register_buffer("saved", torch.tensor([-2.0, -2.0]))
            self.register_buffer("unsaved", torch.tensor([-0.5, -0.5]), persistent=False)
            self.register_buffer("count", torch.tensor(-1))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x * self.saved * self.count + self.unsaved)

    model = Shifted()
    scores = score(model, "synflow", example_input=torch.zeros(3, 2))
    w = model.fc.weight.detach().double().abs()
    torch.testing.assert_close(scores["fc.weight"], 2.5 * w)  # 1 * 2 * -1 - 0.5


@pytest.mark.parametrize(
    ("method", "revive"),
    [("force", True), ("force", False), ("iter-snip", None), ("grasp-it", None)],
)
@pytest.mark.parametrize("network", NETWORKS)
def test_iterative_loop(method, revive, network):
    make, shape = NETWORKS[network]
    model = make().double().eval()
    batches = [(x.double(), y) for x, y in (batch(shape, 6, seed) for seed in range(3))]
    n = sum(w.numel() for w in prunable_of(model).values())
    d, steps = 1 - 0.9, 7
    masks = ones_for(model)
    for t in range(1, steps + 1):
        fresh = [batches[(2 * t - 2) % 3], batches[(2 * t - 1) % 3]]
        g = gradient_at(model, masks, fresh)
        w = {m: p.detach() for m, p in prunable_of(model).items()}
        if method == "grasp-it":
            scores = {m: g[m] ** 2 for m in g}
        elif method == "force":
            scores = {m: (w[m] * g[m]).abs() for m in g}
        else:
            scores = {m: (w[m] * masks[m] * g[m]).abs() for m in g}
        k = math.floor(d * n + 0.5) if t == steps else int(n * d ** (t / steps))
        masks = best(scores, k, None if revive else masks)
    got = prune(
        model,
        method,
        0.9,
        data=batches,
        loss=F.cross_entropy,
        steps=steps,
        batches_per_step=2,
        revive=revive,
    )
    assert same(got, masks)


@pytest.mark.parametrize("revive", [True, False])
def test_force_revives_unless_told_not_to(revive):
    model = mlp()
    n = sum(w.numel() for w in prunable_of(model).values())
    counts = [int(n * 0.05 ** (t / 12)) for t in range(1, 13)]
    runs = [  # prefixes of one run: its masks after 1, 2, ... steps
        prune(
            model,
            "force",
            data=[batch((3, 2, 2))],
            loss=F.cross_entropy,
            schedule=counts[:end],
            revive=revive,
        )
        for end in range(1, 13)
    ]
    came_back = sum((later - earlier).nnz() for earlier, later in itertools.pairwise(runs))
    assert (came_back > 0) is revive


def test_one_step_of_force_and_iter_snip_is_snip():
    model = Residual()
    arguments = {"data": [batch((3, 6, 6))], "loss": F.cross_entropy, "sparsity": 0.9}
    snip = prune(model, "snip", **arguments)
    assert prune(model, "force", steps=1, **arguments) == snip
    assert prune(model, "force", steps=1, revive=False, **arguments) == snip
    assert prune(model, "iter-snip", steps=1, **arguments) == snip
    assert prune(model, "snip", steps=5, **arguments) == prune(
        model, "iter-snip", steps=5, **arguments
    )


@pytest.mark.parametrize("revive", [True, False])
def test_force_keeps_k_when_fewer_scores_are_positive(revive):
    model = mlp()
    with torch.no_grad():
        model[5].weight.zero_()  # no gradient reaches the layers before
    x, y = batch((3, 2, 2))
    masks = prune(model, "force", 0.2, data=[(x, y)], loss=F.cross_entropy, steps=4, revive=revive)
    flat = torch.cat([m.flatten() for m in masks.values()])
    k = math.floor((1 - 0.2) * flat.numel() + 0.5)
    assert flat.tolist() == [True] * k + [False] * (flat.numel() - k)


def test_score_at_a_mask():
    model = mlp()
    x, y = batch((3, 2, 2))
    masks = prune(model, "magnitude", 0.5)
    g = gradient_at(model, masks, [(x, y)])
    w = {m: p.detach() for m, p in prunable_of(model).items()}
    expected = {
        "force": {n: (w[n] * g[n]).abs() for n in w},
        "iter-snip": {n: (w[n] * masks[n] * g[n]).abs() for n in w},
        "snip": {n: (w[n] * masks[n] * g[n]).abs() for n in w},
        "grasp-it": {n: g[n] ** 2 for n in w},
    }
    for method, want in expected.items():
        got = score(model, method, data=[(x, y)], loss=F.cross_entropy, masks=dict(masks))
        for n in want:
            torch.testing.assert_close(got[n], want[n], rtol=0, atol=0)
    only = {"3.weight": masks["3.weight"]}  # a partial mapping: the others are dense
    g = gradient_at(model, {**ones_for(model), **only}, [(x, y)])
    got = score(model, "force", data=[(x, y)], loss=F.cross_entropy, masks=only)
    assert torch.equal(got["1.weight"], (w["1.weight"] * g["1.weight"]).abs())


# -- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", DATA_METHODS)
def test_float64_scoring_equals_a_float64_model(method):
    model = Residual()
    x, y = batch((3, 6, 6))
    asked = score(model, method, data=[(x, y)], loss=F.cross_entropy, dtype=torch.float64)
    wide = copy.deepcopy(model).double()
    given = score(wide, method, data=[(x.double(), y)], loss=F.cross_entropy)
    for n in asked:
        assert asked[n].dtype == torch.float64
        assert torch.equal(asked[n], given[n])


def test_float64_reaches_targets_and_class_weights():
    model = mlp()
    x, _ = batch((3, 2, 2))
    scores = score(
        model, "snip", data=[(x, torch.randn(6, 4))], loss=F.mse_loss, dtype=torch.float64
    )
    assert all(s.dtype == torch.float64 for s in scores.values())
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    score(model, "snip", data=[batch((3, 2, 2))], loss=loss, dtype=torch.float64)
    assert loss.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", methods())
def test_half_precision_models(method, dtype):
    model = mlp().to(dtype)
    x, y = batch((3, 2, 2))
    masks = prune(model, method, 0.9, data=[(x.to(dtype), y)], loss=F.cross_entropy)
    assert masks.nnz() == math.floor((1 - 0.9) * masks.numel() + 0.5)
    scores = score(model, method, data=[(x.to(dtype), y)], loss=F.cross_entropy)
    wide = torch.float64 if method in ("synflow", "lamp") else torch.float32
    assert all(s.dtype == wide for s in scores.values())


def test_bfloat16_gradients_are_summed_in_more_than_bfloat16():
    model = mlp().bfloat16()
    batches = [batch((3, 2, 2), 4, seed) for seed in range(5)]
    batches = [(x.bfloat16(), y) for x, y in batches]
    each = [gradient_at(model, ones_for(model), [b]) for b in batches]
    mean = sum(g["1.weight"].double() for g in each) / 5
    w = model[1].weight.detach().float()
    got = score(model, "snip", data=batches, loss=F.cross_entropy)["1.weight"]
    assert torch.equal(got, (w * mean.float()).abs())
