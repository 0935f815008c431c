"""``prune`` and ``score``: arguments, data, schedules, and methods of one's own."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastprune.pruners import FORCE, GraSP, Network, Pruner, Scores, prunable, prune, score
from small_models import TASK, Snapshot, batch, network

quiet = pytest.mark.filterwarnings("ignore:.*pruned every weight")


# -- data ----------------------------------------------------------------------------------------


def test_every_form_of_data_gives_the_same_scores():
    model = network().eval()
    x, y = batch(8)
    halves = [(x[:4], y[:4]), (x[4:], y[4:])]
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    forms = {
        "list": halves,
        "tuple": tuple(halves),
        "lists": [list(h) for h in halves],
        "loader": loader,
        "iterator": iter(halves),
        "generator": (h for h in halves),
    }
    expected = score(model, "snip", data=halves, loss=F.cross_entropy)
    for name, form in forms.items():
        got = score(model, "snip", data=form, loss=F.cross_entropy)
        assert all(torch.equal(got[n], expected[n]) for n in expected), name
    one = score(model, "snip", data=[(x, y)], loss=F.cross_entropy)
    for form in ((x, y), [x, y], iter([(x, y)])):
        got = score(model, "snip", data=form, loss=F.cross_entropy)
        assert all(torch.equal(got[n], one[n]) for n in one)


@quiet
def test_batches_per_step():
    model = network().eval()
    batches = [batch(seed=s) for s in range(3)]
    common = {"sparsity": 0.7, "loss": F.cross_entropy, "steps": 4}
    seen: list[int] = []

    class Counting:
        def __iter__(self):
            for i, b in enumerate(batches):
                seen.append(i)
                yield b

    two = prune(model, "grasp-it", data=Counting(), batches_per_step=2, **common)
    assert seen == [0, 1, 2, 0, 1, 2, 0, 1]
    seen.clear()
    prune(model, "grasp-it", data=Counting(), **common)
    assert seen == [0, 1, 2] * 4
    endless = itertools.cycle(batches)
    assert prune(model, "grasp-it", data=endless, batches_per_step=2, **common) == two
    with pytest.raises(ValueError, match="ran out of batches"):
        prune(model, "grasp-it", data=iter(batches), batches_per_step=2, **common)


def test_models_with_several_inputs():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 3), nn.Linear(4, 3)

        def forward(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
            return {"logits": self.a(first) + self.b(second)}

    model = Two()
    first, second, y = torch.randn(5, 2), torch.randn(5, 4), torch.randint(0, 3, (5,))

    def loss(output: dict[str, Tensor], y: Tensor) -> Tensor:
        return F.cross_entropy(output["logits"], y)

    expected = score(model, "snip", data=[((first, second), y)], loss=loss)
    for x in ([first, second], {"second": second, "first": first}):
        got = score(model, "snip", data=[(x, y)], loss=loss)
        assert all(torch.equal(got[n], expected[n]) for n in expected)
    flow = score(model, "synflow", example_input={"first": first, "second": second})
    assert torch.equal(flow["b.weight"], model.b.weight.detach().double().abs())
    with pytest.raises(ValueError, match=r"temperature.*dict"):
        score(model, "grasp", data=[((first, second), y)], loss=loss)
    score(model, "grasp", data=[((first, second), y)], loss=loss, temperature=1)


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        (3, TypeError, "data: .*int"),
        (torch.ones(3, 2), TypeError, "data: .*Tensor"),
        ("text", TypeError, "data: .*str"),
        ({"x": 1}, TypeError, "data: .*dict"),
        (TensorDataset(*batch()), TypeError, "DataLoader"),
        ([], ValueError, "data: no batches"),
        (iter(()), ValueError, "data: no batches"),
        ([batch()[0]], ValueError, "batch 0 must be a pair.*Tensor"),
        ([batch(), (*batch(), 3)], ValueError, "batch 1 must be a pair.*3 entries"),
        ([(batch()[0][:0], batch()[1][:0])], ValueError, "empty"),
        ([(torch.tensor(3.0), 2)], ValueError, "batch dimension"),
        ([(3, 2)], ValueError, "batch dimension"),
    ],
)
def test_data_errors(data, error, text):
    with pytest.raises(error, match=text):
        prune(network(), "snip", 0.5, data=data, loss=F.cross_entropy)


# -- arguments -----------------------------------------------------------------------------------


def test_names_are_forgiving_and_one_call_serves_every_method():
    model = network().eval()
    for method in ("SNIP", "iter_snip", "IterSNIP", "iter-snip", "GraSP-It", "Syn_Flow"):
        assert prune(model, method, 0.5, steps=1, **TASK).nnz() > 0
    with pytest.raises(ValueError, match=r"'wanda'.*random, magnitude, lamp, snip, grasp, synflow"):
        prune(model, "wanda", 0.5)
    for method in (3, None, int, nn.Linear):
        with pytest.raises(TypeError, match="method"):
            prune(model, method, 0.5)


@pytest.mark.parametrize(
    "sparsity", [-0.1, 1.1, float("nan"), float("inf"), True, False, "0.5", torch.tensor(0.5)]
)
def test_sparsity_out_of_range(sparsity):
    with pytest.raises(ValueError, match="sparsity"):
        prune(network(), "magnitude", sparsity)


@pytest.mark.parametrize(
    ("method", "arguments", "error", "text"),
    [
        ("magnitude", {"sparsity": None}, ValueError, "sparsity: it is required"),
        ("magnitude", {"steps": 0}, ValueError, "steps"),
        ("magnitude", {"steps": 2.0}, ValueError, "steps"),
        ("magnitude", {"schedule": "square"}, ValueError, "schedule"),
        ("magnitude", {"schedule": [100, 50]}, ValueError, "schedule: the last"),
        ("magnitude", {"schedule": [50, 100], "sparsity": None}, ValueError, r"schedule\[1\]"),
        ("magnitude", {"schedule": [10], "steps": 2}, ValueError, "steps=2"),
        ("magnitude", {"schedule": [10], "scope": "layer"}, ValueError, "one sequence of 3"),
        ("magnitude", {"scope": "row"}, ValueError, "scope.*global, layer"),
        ("grasp", {"scope": "filter", **TASK}, ValueError, "scope.*signed"),
        ("magnitude", {"dtype": torch.bfloat16}, ValueError, "dtype"),
        ("magnitude", {"dtype": torch.int64}, ValueError, "dtype"),
        ("magnitude", {"progress": 3}, TypeError, "progress"),
        ("snip", {"loss": F.cross_entropy}, ValueError, "data: the method snip needs it"),
        ("snip", {"data": [batch()]}, ValueError, "loss: the method snip needs it"),
        ("snip", {"data": [batch()], "loss": "ce"}, TypeError, "loss"),
        ("synflow", {}, ValueError, "example_input: synflow needs it"),
        ("synflow", {"example_input": (1, 28, 28)}, ValueError, "example_input"),
        ("snip", {"batches_per_step": 0, **TASK}, ValueError, "batches_per_step"),
        ("snip", {"batches_per_step": True, **TASK}, ValueError, "batches_per_step"),
        ("synflow", {"batches_per_step": 1, **TASK}, ValueError, "batches_per_step.*not use"),
        ("snip", {"temperature": 200.0, **TASK}, ValueError, "temperature.*snip does not use"),
        ("snip", {"revive": True, **TASK}, ValueError, "revive.*snip does not use"),
        ("iter-snip", {"revive": False, **TASK}, ValueError, "revive.*iter-snip does not"),
        ("snip", {"example_input": batch()[0], **TASK}, ValueError, "example_input.*not use"),
        ("magnitude", {"generator": torch.Generator()}, ValueError, "generator.*not use"),
        ("random", {"generator": 3}, TypeError, "generator"),
        ("force", {"revive": 1, **TASK}, TypeError, "revive"),
        ("grasp", {"temperature": 0, **TASK}, ValueError, "temperature"),
        ("grasp", {"temperature": float("nan"), **TASK}, ValueError, "temperature"),
        (GraSP(3.0), {"temperature": 3.0, **TASK}, ValueError, "temperature.*instance"),
    ],
)
def test_argument_errors(method, arguments, error, text):
    model = network()
    before = Snapshot(model)
    with pytest.raises(error, match=text):
        prune(model, method, **{"sparsity": 0.5, **arguments})
    before.check()


@pytest.mark.parametrize(
    ("loss", "error", "text"),
    [
        (lambda o, y: o.sum() * float("nan"), ValueError, "loss: it is nan on batch 0"),
        (lambda o, y: o.sum() / 0, ValueError, "loss: it is -?inf on batch 0"),
        (lambda o, y: o, ValueError, r"loss: expected a scalar tensor, got \(6, 3\)"),
        (lambda o, y: 3.0, ValueError, "loss: expected a scalar tensor, got float"),
        (lambda o, y: torch.tensor(1.0), ValueError, "does not depend"),
    ],
)
def test_bad_losses(loss, error, text):
    with pytest.raises(error, match=text):
        prune(network(), "snip", 0.5, data=[batch()], loss=loss)


@pytest.mark.parametrize("method", ["magnitude", "synflow", "snip"])
def test_a_nan_weight_is_an_error_that_names_it(method):
    model = network().eval()
    with torch.no_grad():
        model[5].weight[2, 3] = float("nan")
    arguments = {"magnitude": {}, "synflow": {"example_input": batch()[0]}, "snip": TASK}[method]
    with pytest.raises(ValueError, match=r"5\.weight"):
        prune(model, method, 0.5, **arguments)


@pytest.mark.parametrize("method", ["snip", "force", "iter-snip", "grasp-it"])
def test_a_nan_gradient_is_an_error_that_names_the_layer(method):
    def loss(output: Tensor, y: Tensor) -> Tensor:
        return (output * 0).square().sum().sqrt()  # 0, with a gradient of 0 / 0

    with pytest.raises(ValueError, match=r"0\.weight"):
        prune(network(), method, 0.5, data=[batch()], loss=loss)


def test_nan_under_a_mask_does_not_matter():
    model = network().eval()
    masks = prune(model, "magnitude", 0.5)
    clean = score(model, "iter-snip", masks=masks, **TASK)
    place = tuple((~masks["5.weight"]).nonzero()[0])
    with torch.no_grad():
        model[5].weight[place] = float("nan")
    got = score(model, "iter-snip", masks=masks, **TASK)
    assert all(torch.equal(got[n], clean[n]) for n in got)


def test_layers_that_are_emptied_are_named():
    model = network()
    with torch.no_grad():
        model[0].weight.mul_(1e-6)
    with pytest.warns(UserWarning, match=r"^magnitude pruned every weight of: 0\.weight$") as seen:
        prune(model, "magnitude", 0.5, steps=4)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    with pytest.warns(UserWarning, match=r"0\.weight, 5\.weight, 7\.weight"):
        prune(model, "magnitude", 1.0)


def test_explicit_schedules():
    model = network().eval()
    assert prune(model, "force", schedule=[90, 60, 70], **TASK).nnz() == 70
    assert prune(model, "snip", 0.5, schedule=[100, 66], **TASK).nnz() == 66
    layers = prune(model, "snip", schedule=[(30, 60, 15), (9, 40, 3)], scope="layer", **TASK)
    assert [int(m.sum()) for m in layers.values()] == [9, 40, 3]
    rows = prune(model, "snip", schedule=[(9, 8, 5), (1, 4, 2)], scope="neuron", **TASK)
    assert all((rows[f"{n}.weight"].flatten(1).sum(1) == k).all() for n, k in ((0, 1), (5, 4)))


def test_progress():
    seen: list[tuple[int, int]] = []
    prune(network(), "magnitude", 0.5, steps=3, progress=lambda *a: seen.append(a))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    seen.clear()
    prune(network(), "synflow", 0.5, example_input=batch()[0], progress=lambda *a: seen.append(a))
    assert seen[-1] == (100, 100)


def test_masks_given_to_score_are_checked():
    model = network()
    for masks, error, text in (
        ({"nowhere": torch.ones(2).bool()}, ValueError, "nowhere"),
        ({"5.weight": torch.ones(2).bool()}, ValueError, r"5\.weight.*shape"),
        ({"5.weight": torch.ones(5, 16)}, ValueError, r"5\.weight.*bool"),
        (3, TypeError, "masks"),
    ):
        with pytest.raises(error, match=text):
            score(model, "magnitude", masks=masks)


# -- methods of one's own ------------------------------------------------------------------------


class Smallest(Pruner):
    name = "smallest"

    def score(self, network: Network) -> dict[str, Tensor]:
        return {name: -w.abs() for name, w in network.weights().items()}


def test_a_subclass_only_scores():
    model = network()
    for method in (Smallest, Smallest()):
        masks = prune(model, method, 0.25, steps=3, schedule="linear")
        sizes = torch.cat([p.detach().abs().flatten() for p in prunable(model).values()])
        kept = torch.cat([m.flatten() for m in masks.values()])
        assert sizes[kept].max() <= sizes[~kept].min()
    with pytest.raises(ValueError, match="revive: the method smallest does not use it"):
        prune(model, Smallest, 0.5, revive=True)
    instance = prune(network().eval(), FORCE(revive=False), 0.5, steps=4, **TASK)
    assert instance == prune(network().eval(), "force", 0.5, steps=4, revive=False, **TASK)


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ({}, "one tensor for each"),
        (Scores({"other": torch.ones(2)}), "one tensor for each"),
        (
            {
                "0.weight": torch.ones(4),
                "5.weight": torch.ones(5, 16),
                "7.weight": torch.ones(3, 5),
            },
            r"'0\.weight' has shape \(4,\)",
        ),
    ],
)
def test_a_subclass_with_wrong_scores(result, text):
    class Wrong(Pruner):
        def score(self, network: Network):
            return result

    with pytest.raises(ValueError, match=text):
        prune(network(), Wrong, 0.5)


def test_a_pruner_without_score_cannot_be_made():
    class Nothing(Pruner):
        pass

    with pytest.raises(TypeError, match="score"):
        prune(network(), Nothing, 0.5)


def test_float32_and_float64_layers_compete_in_float64():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).double())
    masks = prune(model, "magnitude", 0.5)
    flat = torch.cat([p.detach().double().abs().flatten() for p in prunable(model).values()])
    kept = torch.cat([m.flatten() for m in masks.values()])
    assert kept.sum() == 9
    assert flat[kept].min() >= flat[~kept].max()


def test_a_compiled_model_keeps_its_own_names():
    model = network().eval()
    compiled = torch.compile(model, backend="eager")
    masks = prune(compiled, "snip", 0.5, **TASK)
    assert list(masks) == [n for n, _ in compiled.named_parameters() if n in masks]
    plain = prune(model, "snip", 0.5, **TASK)
    assert all(torch.equal(masks[f"_orig_mod.{n}"], plain[n]) for n in plain)
