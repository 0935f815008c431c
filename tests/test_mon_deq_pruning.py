"""Pruning models with monotone equilibrium layers: names, masks, scores, conversion."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import fastprune as fp
import mon_oracle as oracle
from fastprune.metrics import macs
from fastprune.pruners import prunable
from fastprune.swapping import mask_layers_
from small_models import Snapshot

IMPLICIT = ["mon.A", "mon.B", "mon.U.weight"]
EVERYTHING = [*IMPLICIT, "head.weight"]
MODELS = {"linear": oracle.linear_model, "conv": oracle.conv_model}
# What "fb" takes its steps on: a safe one, found by power iteration.
CASES = [
    (kind, activation, solver)
    for kind in MODELS
    for activation in ("relu", "sigmoid")
    for solver in ("pr", "fb")
]
quiet = pytest.mark.filterwarnings("ignore:.*pruned every weight")


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_u_a_and_b_are_prunable(kind):
    model = MODELS[kind]()
    assert list(prunable(model)) == EVERYTHING
    assert list(prunable(model, include="mon")) == IMPLICIT
    assert list(prunable(model, include=fp.nn.MonDEQLayer)) == IMPLICIT
    assert list(prunable(model, exclude="head")) == IMPLICIT
    assert list(prunable(model, include="mon", exclude="mon.A")) == ["mon.B", "mon.U.weight"]
    assert list(prunable(model, include="mon.[AB]")) == ["mon.A", "mon.B"]
    assert list(prunable(model, exclude="mon")) == ["head.weight"]
    assert prunable(model)["mon.A"] is model.mon.A
    assert list(prunable(model.mon)) == ["A", "B", "U.weight"]


def test_reduced_parametrizations_have_what_is_left():
    mon = fp.nn.MonDEQLinear(3, 4, use_A=False)
    assert list(prunable(mon)) == ["B", "U.weight"]
    assert list(prunable(fp.nn.MonDEQConv2d(1, 2, use_A=False, use_B=False))) == ["U.weight"]


def test_a_module_of_ones_own_names_its_parameters():
    class Low(nn.Module):
        prunable_parameters = ("left",)

        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2, 3))

    assert list(prunable(nn.Sequential(Low()))) == ["0.left"]
    assert list(prunable(Low(), include=["left", "right"])) == ["left", "right"]


def test_a_parametrized_matrix_is_refused_by_name():
    model = oracle.linear_model()
    parametrize.register_parametrization(model.mon, "B", nn.Identity())
    with pytest.raises(ValueError, match=r"mon\.B: the parameter is parametrized"):
        prunable(model)
    assert "mon.B" not in prunable(model, exclude="mon.B")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("scope", ["neuron", "filter"])
def test_rows_of_a_and_b_are_no_units(kind, scope):
    model = MODELS[kind]()
    with pytest.raises(ValueError, match=rf"scope: '{scope}' is not supported for mon\.A: .*both"):
        fp.prune(model, "magnitude", 0.5, scope=scope)
    masks = fp.prune(model, "magnitude", 0.5, scope=scope, exclude=["mon.A", "mon.B"])
    assert list(masks) == ["mon.U.weight", "head.weight"]


@pytest.mark.parametrize("quota", ["uniform", "uniform-plus", "erk", "smart-ratio", "igq"])
@pytest.mark.parametrize("kind", MODELS)
@quiet
def test_quotas_share_out_over_u_a_and_b(kind, quota):
    masks = fp.prune(MODELS[kind](), "magnitude", 0.5, quota=quota, include="mon")
    assert masks.nnz() == int(0.5 * masks.numel() + 0.5)


# -- masks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_masks_of_a_and_b_are_masks_like_others(kind, tmp_path):
    model = MODELS[kind]()
    masks = fp.prune(model, "magnitude", 0.6)
    assert [row.name for row in masks.summary().rows] == EVERYTHING
    masks.save(tmp_path / "m.safetensors")
    assert fp.Masks.load(tmp_path / "m.safetensors") == masks
    masks.apply_(model)
    assert fp.Masks.from_zeros(model) == masks


@pytest.mark.parametrize("kind", MODELS)
def test_multiply_adds_are_those_of_one_application(kind):
    model = MODELS[kind]()
    masks = fp.prune(model, "magnitude", 0.6, include="mon")
    x, _ = oracle.inputs(model)
    got = macs(model, x, masks)
    places = len(x) * (1 if kind == "linear" else 25)
    mon = model.mon
    expected = {
        "mon.A": (2 * places * mon.A.numel(), 2 * places * int(masks["mon.A"].sum())),
        "mon.B": (2 * places * mon.B.numel(), 2 * places * int(masks["mon.B"].sum())),
        "mon.U.weight": (
            places * mon.U.weight.numel(),
            places * int(masks["mon.U.weight"].sum()),
        ),
        "head.weight": (len(x) * model.head.weight.numel(),) * 2,
    }
    assert {r.name: (r.dense, r.direct) for r in got.rows} == expected
    # A layer's own masks count where none are given.
    mon.set_masks(A=masks["mon.A"], B=masks["mon.B"])
    own = {r.name: r.direct for r in macs(model, x).rows}
    assert own["mon.A"] == expected["mon.A"][1]
    assert own["mon.B"] == expected["mon.B"][1]


def test_multiply_adds_without_a():
    mon = fp.nn.MonDEQLinear(3, 4, use_A=False)
    assert [r.name for r in macs(mon, torch.ones(2, 3)).rows] == ["B", "U.weight"]


def test_methods_that_prune_in_training_refuse_a_and_b_by_name():
    model = oracle.linear_model()
    x, y = oracle.inputs(model)
    named = r"mon\.A: no (sparse|masked) layer takes the place of MonDEQLinear mon"
    with pytest.raises(ValueError, match=named):
        fp.DPF(model, sparsity=0.5, total_steps=64)
    with pytest.raises(ValueError, match=named):
        mask_layers_(model, fp.prune(model, "magnitude", 0.5))
    pruner = fp.DPF(model, sparsity=0.5, total_steps=4, every=1, exclude=["mon.A", "mon.B"])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(4):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
    assert pruner.finish().sparsity() > 0.3
    assert isinstance(model.mon.U, fp.nn.MaskedLinear)


# -- scores ----------------------------------------------------------------------------------------


def compare(model, method, include, sparsity=0.5, masks=None):
    """Scores within 1e-6 of the largest of the matrix and of themselves; masks exactly."""
    x, y = oracle.inputs(model)
    names = list(prunable(model, include))
    task = {"data": [(x, y)], "loss": F.cross_entropy, "include": include}
    got = fp.score(model, method, masks=masks, **task)
    expected = getattr(oracle, method)(model, names, x, y, masks)
    assert list(got) == names
    for n in names:
        error = (got[n].double() - expected[n]).abs()
        bound = 1e-6 * expected[n].abs() + 1e-11 * expected[n].abs().max()
        assert bool((error <= bound).all()), f"{method} {n}: {float((error / bound).max()):.3g}"
    if masks is None:
        chosen = fp.prune(model, method, sparsity, steps=1, **task)
        k = int((1 - sparsity) * sum(s.numel() for s in expected.values()) + 0.5)
        wanted = oracle.best(expected, k)
        assert all(torch.equal(chosen[n], wanted[n]) for n in names), method


@pytest.mark.parametrize(("kind", "activation", "solver"), CASES)
@pytest.mark.parametrize("method", ["snip", "grasp", "synflow", "force"])
@pytest.mark.parametrize("include", ["mon", None])
@quiet
def test_scores_are_those_of_the_equilibrium(kind, activation, solver, method, include):
    tol = 1e-14 if solver == "pr" else 1e-13
    model = MODELS[kind](activation, solver=solver, tol=tol, max_iter=20000)
    compare(model, method, include)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", ["snip", "grasp", "synflow", "force"])
@quiet
def test_scores_at_a_mask(kind, method):
    model = MODELS[kind]("sigmoid")
    masks = fp.prune(model, "magnitude", 0.4, include="mon")
    compare(model, method, "mon", masks=masks)


@pytest.mark.parametrize("kind", MODELS)
def test_several_steps_follow_the_schedule(kind):
    model = MODELS[kind]()
    x, y = oracle.inputs(model)
    got = fp.prune(model, "force", 0.8, steps=4, data=[(x, y)], loss=F.cross_entropy, include="mon")
    total = sum(model.get_parameter(n).numel() for n in IMPLICIT)
    masks = None
    for k in fp.schedules.kept_counts("exponential", total, int(0.2 * total + 0.5), 4):
        masks = oracle.best(oracle.force(model, IMPLICIT, x, y, masks), k)
    assert all(torch.equal(got[n], masks[n]) for n in IMPLICIT)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", fp.pruners.methods())
@quiet
def test_every_method_keeps_as_many_as_asked_and_leaves_the_model_alone(kind, method):
    model = MODELS[kind](tol=1e-5).float()
    x, y = oracle.inputs(model)
    before = Snapshot(model)
    steps = None if method in ("grasp", "snip") else 3
    masks = fp.prune(
        model, method, 0.7, steps=steps, data=[(x.float(), y)], loss=F.cross_entropy,
        include="mon",
    )  # fmt: skip
    before.check()
    assert list(masks) == IMPLICIT
    assert masks.nnz() == int(0.3 * masks.numel() + 0.5)


def test_magnitude_and_random_compare_u_a_and_b_as_they_are():
    model = oracle.linear_model()
    weights = {n: p.detach().abs() for n, p in prunable(model, "mon").items()}
    masks = fp.prune(model, "magnitude", 0.5, include="mon")
    wanted = oracle.best(weights, masks.nnz())
    assert all(torch.equal(masks[n], wanted[n]) for n in IMPLICIT)
    noise = fp.prune(
        model, "random", 0.5, include="mon", generator=torch.Generator().manual_seed(3)
    )
    assert noise.nnz() == masks.nnz()
    assert noise != masks


# -- settings --------------------------------------------------------------------------------------


def test_settings_change_all_layers_and_come_back():
    model = nn.Sequential(oracle.linear_model(), oracle.conv_model("tanh"))
    layers = [m for m in model.modules() if isinstance(m, fp.nn.MonDEQLayer)]
    changes = {"activation": "sigmoid", "tol": 1e-3, "max_iter": 7, "solver": "fb", "alpha": 0.25}
    before = [vars(m).copy() for m in layers]

    def fail_inside() -> None:
        with fp.nn.equilibrium_settings(model, **changes):
            for m in layers:
                assert {n: getattr(m, n) for n in changes} == changes
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert [vars(m) for m in layers] == before
    with fp.nn.equilibrium_settings(model, on_failure="error"):
        assert all(m.alpha is None and m.on_failure == "error" for m in layers)
    layers[0].alpha = 0.5
    with fp.nn.equilibrium_settings(model, alpha=None, per_sample=True):
        assert all(m.alpha is None and m.per_sample for m in layers)
    assert layers[0].alpha == 0.5
    assert not layers[0].per_sample


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "gelu"}, "activation: expected one of"),
        ({"tol": -1.0}, "tol: expected"),
        ({"max_iter": 0}, "max_iter: expected"),
        ({"solver": "newton"}, "solver: expected"),
        ({"alpha": 0.0}, "alpha: expected"),
        ({"on_failure": "shrug"}, "on_failure: expected"),
    ],
)
def test_settings_that_no_layer_takes(changes, message):
    model = oracle.linear_model()
    before = vars(model.mon).copy()
    with pytest.raises(ValueError, match=message), fp.nn.equilibrium_settings(model, **changes):
        pass
    assert vars(model.mon) == before


def test_settings_need_an_equilibrium():
    with (
        pytest.raises(ValueError, match="model: it has no monotone"),
        fp.nn.equilibrium_settings(nn.Linear(2, 2), tol=1.0),
    ):
        pass
    with pytest.raises(TypeError, match="model: expected"), fp.nn.equilibrium_settings("x"):
        pass


def test_scoring_with_sigmoids_is_the_workaround_of_the_paper():
    model, smooth = oracle.linear_model("relu"), oracle.linear_model("sigmoid")
    x, y = oracle.inputs(model)
    task = {"data": [(x, y)], "loss": F.cross_entropy, "include": "mon"}
    with fp.nn.equilibrium_settings(model, activation="sigmoid"):
        masks = fp.prune(model, "grasp", 0.5, **task)
    assert masks == fp.prune(smooth, "grasp", 0.5, **task)
    assert model.mon.activation == "relu"


# -- conversion ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("training", [False, True])
def test_accelerate_masks_a_and_b_and_reports_them(kind, training):
    model = MODELS[kind]().train(training)
    masks = fp.prune(model, "magnitude", 0.8, include="mon")
    x, y = oracle.inputs(model)
    before = Snapshot(model)
    fast, report = fp.accelerate(model, masks, x, training=training, min_time=0.001)
    before.check()
    assert [row.name for row in report.layers] == IMPLICIT
    a, b = report.layers[:2]
    assert (a.kind, a.input_shape) == (type(model.mon).__name__, tuple(x.shape))
    assert (a.sparse_ms, a.dense_ms, a.chosen) == (b.sparse_ms, b.dense_ms, b.chosen)
    assert a.sparse_ms is not None
    assert "mon.A" in str(report)
    mon = fast.get_submodule("mon")
    assert mon.sparse == (a.chosen == "sparse")
    assert torch.equal(mon.A_mask, masks["mon.A"])
    assert torch.equal(mon.B_mask, masks["mon.B"])
    pruned = copy.deepcopy(model)
    masks.apply_(pruned)
    torch.testing.assert_close(fast(x), pruned(x), rtol=1e-9, atol=1e-9)
    if training:
        optimizer = torch.optim.SGD(fast.parameters(), 0.1, momentum=0.9)
        for _ in range(3):
            F.cross_entropy(fast(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        trained = fast.state_dict()
        for n in masks:
            assert not bool(trained[n][~masks[n]].any()), n
    plain = fp.finalize(fast)
    assert set(plain.state_dict()) == set(model.state_dict())
    model.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(model(x), fast(x), rtol=1e-9, atol=1e-9)
    assert plain.mon.A_mask is None


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_dense_w_gives_what_the_masks_give(kind, sparse):
    model = MODELS[kind]()
    masks = fp.prune(model, "magnitude", 0.8, include="mon")
    x, _ = oracle.inputs(model)
    model.mon.set_masks(A=masks["mon.A"], B=masks["mon.B"])
    expected = model(x)
    model.mon.sparse = sparse
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", MODELS)
def test_states_with_masks_go_both_ways(kind):
    model = MODELS[kind]()
    masks = fp.prune(model, "magnitude", 0.8, include="mon")
    x, _ = oracle.inputs(model)
    fast, _ = fp.accelerate(model, masks, x, min_time=0.001)
    state = fast.state_dict()
    assert {"mon.A_mask", "mon.B_mask"} <= set(state)
    again, _ = fp.accelerate(MODELS[kind](seed=5), fp.Masks.ones(model, "mon"), x, min_time=0.001)
    again.load_state_dict(state, strict=True)
    torch.testing.assert_close(again(x), fast(x), rtol=1e-9, atol=1e-9)
    fast.load_state_dict(model.state_dict(), strict=True)  # a dense state leaves the masks
    assert torch.equal(fast.get_submodule("mon").A_mask, masks["mon.A"])


def test_masks_that_a_layer_has_stay_unless_replaced():
    model = oracle.linear_model()
    first, second = (fp.prune(model, m, 0.5, include="mon") for m in ("magnitude", "random"))
    model.mon.set_masks(A=first["mon.A"], B=first["mon.B"])
    x, _ = oracle.inputs(model)
    fast, report = fp.accelerate(model, {"mon.A": second["mon.A"]}, x, min_time=0.001)
    mon = fast.get_submodule("mon")
    assert torch.equal(mon.A_mask, second["mon.A"])
    assert torch.equal(mon.B_mask, first["mon.B"])
    assert [row.name for row in report.layers] == ["mon.A"]


def test_a_layer_that_the_example_does_not_reach():
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mon, self.used = fp.nn.MonDEQLinear(3, 4), nn.Linear(3, 2)

        def forward(self, x):
            return self.used(x)

    model = Aside()
    masks = fp.prune(model, "magnitude", 0.5, include="mon")
    _, report = fp.accelerate(model, masks, torch.ones(2, 3), min_time=0.001)
    assert {row.reason for row in report.layers} == {"not reached by example_input"}


def test_chunks_would_stop_elsewhere():
    from fastprune.nn.chunks import acts_on_samples

    model = oracle.linear_model(tol=1e-14).eval()
    x = torch.randn(64, 5, dtype=torch.float64)
    assert not acts_on_samples(model, (x,), 16)
    model.mon.per_sample = True
    assert acts_on_samples(model, (x,), 16)
