"""SET, DSR, sparse momentum and RigL, against loops in plain torch."""

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

import fastprune as fp
from fastprune.dynamic.kernels import LayerTimes
from fastprune.dynamic.regrowth import share_out
from regrowth_by_hand import ByHand, shared
from test_dynamic import PRUNED, X, Y, sgd, small, train

STEPS, EVERY = 24, 3


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-6)


def untimed(pruner: Any) -> Any:
    """The pruner with a made-up table of times: the tests need none."""
    names = pruner.kernels._layers
    pruner.kernels.times = dict.fromkeys(names, LayerTimes(1.0, (0.1, 0.5, 1.5), ()))
    return pruner


MAKERS: dict[str, Callable[..., Any]] = {
    "set": lambda m, o, s=0.8, **k: fp.SET(m, s, EVERY, optimizer=o, **k),
    "dsr": lambda m, o, s=0.8, **k: fp.DSR(m, s, EVERY, threshold=0.05, optimizer=o, **k),
    "sparse-momentum": lambda m, o, s=0.8, **k: fp.SparseMomentum(m, s, o, EVERY, STEPS, **k),
    "rigl": lambda m, o, s=0.8, **k: fp.RigL(m, s, o, STEPS, EVERY, **k),
}


def check(pruner: Any, model: nn.Module, hand: ByHand) -> None:
    assert list(pruner.masks) == hand.names
    for name, mask in zip(hand.names, hand.masks, strict=True):
        assert torch.equal(pruner.current[name], mask), name
    for name, p in model.named_parameters():
        kept = pruner.current.get(name, torch.ones_like(p, dtype=torch.bool))
        torch.testing.assert_close(
            p.detach() * kept, hand.parameters[name].detach() * kept, rtol=1e-9, atol=1e-12
        )


def compare(
    make: Callable[..., Any],
    hand: ByHand,
    refresh: Callable[[int], object],
    optimizer: Any = sgd,
    until: float = STEPS + 1,
) -> Any:
    """Train both, comparing after every step; the flips of the pruner must not be none."""
    model = small()
    own = optimizer(model)
    pruner = untimed(make(model, own))
    check(pruner, model, hand)
    for t in range(1, STEPS + 1):
        train(model, pruner, 1, own)
        hand.train()
        if t % EVERY == 0 and t < until:
            refresh(t)
        check(pruner, model, hand)
    flips = [u.flips for u in pruner.history[1:]]
    assert sum(flips) > 20
    assert all(u.kept == pruner.history[0].kept for u in pruner.history)
    assert all(u.error == 0 for u in pruner.history)
    final = pruner.finish()
    for name, mask in final.items():
        assert (model.get_parameter(name)[~mask] == 0).all()
    with pytest.raises(RuntimeError, match=r"step\(\) after finish\(\)"):
        pruner.step()
    return pruner


@pytest.mark.parametrize("quota", ["erk", "uniform"])
def test_set(quota: str) -> None:
    hand = ByHand(0.7, getattr(fp.quotas, quota), seed=5)
    pruner = compare(
        lambda m, o: fp.SET(m, 0.7, EVERY, quota=quota, optimizer=o, seed=5),
        hand,
        lambda t: hand.set_refresh(0.3),
    )
    assert [u.step for u in pruner.history] == list(range(0, STEPS + 1, EVERY))
    densities = [u.densities for u in pruner.history]
    assert all(d == densities[0] for d in densities)


def test_set_until_and_without_optimizer() -> None:
    model = small()
    optimizer = sgd(model)
    pruner = untimed(fp.SET(model, 0.7, 2, until=6))
    train(model, pruner, 10, optimizer)
    assert [u.step for u in pruner.history] == [0, 2, 4]


def test_set_leaves_dense_layers_alone() -> None:
    model = small()
    quota = [0.0, 0.9, 0.5]
    sizes = torch.tensor([90, 180, 128]).double()
    sparsity = float((sizes * torch.tensor(quota)).sum() / sizes.sum())
    pruner = untimed(fp.SET(model, sparsity, 1, quota=quota))
    before = model[0].weight.detach().clone()
    pruner.step()
    assert torch.equal(model[0].weight, before)
    assert pruner.masks["0.weight"].all()


def test_dsr() -> None:
    names = ["3.weight", "6.weight"]
    hand = ByHand(0.8, fp.quotas.uniform, names, seed=2)
    thresholds = [0.05]
    got = []

    def refresh(t: int) -> None:
        thresholds.append(hand.dsr_refresh(thresholds[-1], 8, 0.1))

    def make(model: nn.Module, optimizer: Any) -> Any:
        pruner = fp.DSR(model, 0.8, EVERY, 8, 0.05, optimizer=optimizer, seed=2)
        original = pruner.new_masks

        def spied(step: int) -> Any:
            got.append(pruner.threshold)
            return original(step)

        pruner.new_masks = spied  # type: ignore[method-assign]
        return pruner

    pruner = compare(make, hand, refresh)
    assert [*got, pruner.threshold] == thresholds
    assert len(set(thresholds)) > 1
    assert len({tuple(u.densities.values()) for u in pruner.history}) > 1


def test_dsr_adapts_its_threshold() -> None:
    model = small()
    pruner = untimed(fp.DSR(model, 0.5, 1, target=10, threshold=1e-6, tolerance=0.0))
    before = pruner.masks
    pruner.step()
    assert pruner.threshold == 2e-6
    assert pruner.masks == before
    pruner.threshold = 100.0
    pruner.step()  # all are dropped, and grow again anywhere, in proportion to the room
    assert pruner.threshold == 50.0
    assert pruner.masks.nnz() == before.nnz()
    assert all((model.get_parameter(n) == 0).all() for n in pruner.masks)
    assert fp.DSR(small(), 0.5, 1).target == 154 // 20
    assert fp.DSR(small(), 0.99, 1).target == 1


@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_sparse_momentum(optimizer: Any) -> None:
    hand = ByHand(0.75, fp.quotas.uniform, seed=3, optimizer=optimizer, dense=True)
    pruner = compare(
        lambda m, o: fp.SparseMomentum(m, 0.75, o, EVERY, 20, 0.4, seed=3),
        hand,
        lambda t: hand.momentum_refresh(t, 20, 0.4),
        optimizer,
        until=20,
    )
    assert [u.step for u in pruner.history] == [0, 3, 6, 9, 12, 15, 18]
    assert len({tuple(u.densities.values()) for u in pruner.history}) > 1


def test_absent_weights_have_momentum_but_no_value() -> None:
    model = small()
    optimizer = sgd(model)
    pruner = untimed(fp.SparseMomentum(model, 0.8, optimizer, 4, 100))
    train(model, pruner, 3, optimizer)
    for name, mask in pruner.masks.items():
        p = model.get_parameter(name)
        assert (p[~mask] == 0).all()
        assert (optimizer.state[p]["momentum_buffer"][~mask] != 0).any()
    before = {n: m.clone() for n, m in pruner.current.items()}
    train(model, pruner, 1, optimizer)
    for name, mask in pruner.current.items():
        p = model.get_parameter(name)
        new = mask & ~before[name]
        assert (p[new] == 0).all()
        assert (optimizer.state[p]["momentum_buffer"][new] == 0).all()


@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_rigl(optimizer: Any) -> None:
    hand = ByHand(0.8, fp.quotas.erk, seed=1, optimizer=optimizer)
    pruner = compare(
        lambda m, o: fp.RigL(m, 0.8, o, STEPS, EVERY, 0.6, end=0.8, seed=1),
        hand,
        lambda t: hand.rigl_refresh(t, 0.6, 0.8 * STEPS),
        optimizer,
        until=0.8 * STEPS,
    )
    assert [u.step for u in pruner.history] == [0, 3, 6, 9, 12, 15, 18]


def test_rigl_gradients_are_dense_in_the_steps_of_refreshes_only() -> None:
    model = small()
    optimizer = sgd(model)
    pruner = untimed(fp.RigL(model, 0.9, optimizer, 100, 3))
    for t in range(1, 8):
        F.cross_entropy(model(X), Y).backward()
        absent = [model.get_parameter(n).grad[~m] for n, m in pruner.current.items()]  # type: ignore[index]
        assert any((g != 0).any() for g in absent) == (t % 3 == 0)
        optimizer.step()
        for n, m in pruner.current.items():
            p = model.get_parameter(n)
            assert (p.grad[~m] == 0).all()  # type: ignore[index]
            assert (optimizer.state[p]["momentum_buffer"][~m] == 0).any()
        optimizer.zero_grad()
        pruner.step()
        # What is saved, in any step, has zeros where weights are absent.
        saved = model.state_dict()
        assert all((saved[n][~m] == 0).all() for n, m in pruner.current.items())
    pruner.finish()
    assert {layer.weight_grad for layer in (model[0], model[3], model[6])} == {"sampled"}
    assert not optimizer._optimizer_step_pre_hooks


def test_what_rigl_takes_back_at_once_keeps_its_value() -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    pruner = untimed(fp.RigL(model, 0.5, optimizer, 100, 1, 1.0))
    before = {n: model.get_parameter(n).detach().clone() for n in PRUNED}
    masks = {n: m.clone() for n, m in pruner.current.items()}
    train(model, pruner, 1, optimizer)
    back = 0
    for n in PRUNED:
        w, m = model.get_parameter(n).detach(), pruner.current[n]
        assert torch.equal(w[m & masks[n]], before[n][m & masks[n]])
        assert (w[m & ~masks[n]] == 0).all()
        back += int((m & masks[n]).sum())
    # At alpha = 1 nearly all are dropped: what is in both masks came back.
    assert back > 20


def test_rigl_waits_for_gradients() -> None:
    model = small()
    optimizer = sgd(model)
    pruner = untimed(fp.RigL(model, 0.8, optimizer, 1000, 3))
    train(model, pruner, 2, optimizer)
    assert pruner.step() is None  # as if the optimizer's step had been left out
    assert model[0].weight_grad == "dense"
    train(model, pruner, 1, optimizer)
    assert [u.step for u in pruner.history] == [0, 4]
    assert model[0].weight_grad == "sampled"
    train(model, pruner, 2, optimizer)
    assert [u.step for u in pruner.history] == [0, 4, 6]
    for _ in range(102):
        pruner.step()
    with pytest.raises(RuntimeError, match="rigl: a refresh is due since 100 steps"):
        pruner.step()


def test_rigl_times_the_kernels_of_most_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    optimizer = sgd(model)
    pruner = fp.RigL(model, 0.8, optimizer, 100, 2)
    timed: list[str] = []
    monkeypatch.setattr(pruner.kernels, "measure", lambda *args: timed.append(model[3].weight_grad))
    train(model, pruner, 1, optimizer)
    assert model[3].weight_grad == "dense"
    pruner.measure_kernels(X)
    assert model[3].weight_grad == "dense"
    train(model, pruner, 1, optimizer)
    assert set(timed) == {"sampled"}
    assert model[3].weight_grad == "sampled"


def test_rigl_leaves_a_layer_without_gradient_as_it_is() -> None:
    model = small()
    model[3].weight.requires_grad_(False)
    optimizer = sgd(model)
    pruner = untimed(fp.RigL(model, 0.6, optimizer, 100, 2))
    before = {n: m.clone() for n, m in pruner.current.items()}
    train(model, pruner, 4, optimizer)
    assert torch.equal(pruner.current["3.weight"], before["3.weight"])
    assert not torch.equal(pruner.current["6.weight"], before["6.weight"])


@given(
    st.sampled_from(sorted(MAKERS)),
    st.floats(0, 1),
    st.integers(0, 5),
    st.sampled_from(["erk", "uniform", "igq"]),
)
@settings(max_examples=40, deadline=None)
def test_the_count_is_exact_at_all_times(
    method: str, sparsity: float, seed: int, quota: str
) -> None:
    model = small()
    optimizer = sgd(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a layer may be emptied
        pruner = untimed(MAKERS[method](model, optimizer, sparsity, seed=seed, quota=quota))
        train(model, pruner, 7, optimizer)
        pruner.finish()
    total = pruner.masks.numel()
    assert [u.kept for u in pruner.history] == [int((1 - sparsity) * total + 0.5)] * 3


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_sharing_out(data: Any) -> None:
    room = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    n = len(room)
    wants = data.draw(
        st.lists(st.one_of(st.integers(0, 20), st.floats(0, 1e3)), min_size=n, max_size=n)
    )
    total = data.draw(st.integers(0, sum(room)))
    got = share_out(total, wants, room)
    assert sum(got) == total
    assert all(0 <= g <= r for g, r in zip(got, room, strict=True))
    # Ties of the remainders, which rounding decides, may put one weight elsewhere.
    exact = shared(total, wants, room)
    assert sum(abs(a - b) for a, b in zip(got, exact, strict=True)) <= 2


def test_sharing_out_by_example() -> None:
    assert share_out(10, [1, 1, 2], [9, 9, 9]) == [3, 2, 5]
    assert share_out(10, [1, 1, 8], [9, 9, 4]) == [3, 3, 4]
    assert share_out(10, [0, 0, 8], [4, 2, 4]) == [4, 2, 4]
    assert share_out(7, [0, 0, 8], [4, 2, 4]) == [2, 1, 4]
    assert share_out(3, [1e-300, 2e-300], [9, 9]) == [1, 2]
    assert share_out(3, [1e308, 1e308, 1e308], [9, 9, 9]) == [1, 1, 1]
    assert share_out(0, [1.0], [0]) == [0]


@pytest.mark.parametrize("method", sorted(MAKERS))
def test_a_saved_run_goes_on_to_the_same_bits(method: str) -> None:
    make = MAKERS[method]
    for steps in (7, 8):  # RigL: the next step's gradients are dense, or are not
        model = small()
        optimizer = sgd(model)
        pruner = untimed(make(model, optimizer))
        train(model, pruner, steps, optimizer)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), pruner.state_dict()))
        train(model, pruner, 8, optimizer)
        again = small()
        again_optimizer = sgd(again)
        again_pruner = make(again, again_optimizer, seed=77)
        again.load_state_dict(saved[0])
        again_optimizer.load_state_dict(saved[1])
        again_pruner.load_state_dict(saved[2])
        train(again, again_pruner, 8, again_optimizer)
        assert again_pruner.history == pruner.history
        masks = pruner.finish()
        assert again_pruner.finish() == masks
        for (name, a), b in zip(
            model.state_dict().items(), again.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), name
        finished_model = small()
        finished = make(finished_model, sgd(finished_model))
        finished.load_state_dict(pruner.state_dict())
        assert finished.finish() == masks


def test_generators() -> None:
    own = torch.Generator().manual_seed(4)
    masks = [fp.SET(small(), 0.5, 1, generator=own).masks for _ in range(2)]
    assert masks[0] != masks[1]
    assert masks[0] == fp.SET(small(), 0.5, 1, seed=4).masks
    assert masks[0] != fp.SET(small(), 0.5, 1).masks
    state = torch.random.get_rng_state()
    pruner = untimed(fp.SET(small(), 0.5, 1))
    state = torch.random.get_rng_state()
    pruner.step()
    assert torch.equal(torch.random.get_rng_state(), state)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(4, 4, 1)
        self.shortcut = nn.Conv2d(4, 4, 1)
        self.strided = nn.Conv2d(4, 4, 1, stride=2)
        self.conv = nn.Conv2d(4, 4, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(self.reduce(x)) + self.strided(self.shortcut(x))
        return y


def test_what_stays_dense() -> None:
    def model() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(2, 4, 3), Block(), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 3)
        )

    rest = ["1.reduce.weight", "1.conv.weight", "3.weight"]
    assert list(fp.DSR(model(), 0.5, 1).masks) == rest
    everything = ["0.weight", "1.reduce.weight", "1.shortcut.weight", "1.strided.weight", *rest[1:]]
    assert list(fp.SET(model(), 0.5, 1).masks) == everything
    assert list(fp.DSR(model(), 0.5, 1, include=["0", "4"]).masks) == ["0.weight", "4.weight"]
    with pytest.raises(ValueError, match="first convolution"):
        fp.DSR(nn.Sequential(nn.Conv2d(2, 2, 3), nn.Linear(2, 2)), 0.5, 1)


@pytest.mark.parametrize("method", sorted(MAKERS))
def test_a_nan_weight_is_named_and_nothing_changes(method: str) -> None:
    model = small()
    optimizer = sgd(model)
    pruner = untimed(MAKERS[method](model, optimizer))
    train(model, pruner, 2, optimizer)
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()
    masks = pruner.masks
    with torch.no_grad():
        model[3].weight[masks["3.weight"]] = float("nan")
    before = model[6].weight.detach().clone() * masks["6.weight"]
    with pytest.raises(ValueError, match=r"3\.weight"):
        pruner.step()
    assert pruner.masks == masks
    assert torch.equal(model[6].weight.detach() * masks["6.weight"], before)


def test_a_nan_momentum_is_named() -> None:
    model = small()
    optimizer = sgd(model)
    pruner = untimed(fp.SparseMomentum(model, 0.5, optimizer, 2, 10))
    train(model, pruner, 1, optimizer)
    optimizer.state[model[3].weight]["momentum_buffer"].fill_(float("nan"))
    with pytest.raises(ValueError, match=r"3\.weight"):
        pruner.step()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m, o: fp.SET(m, 1.5, 1), ValueError, "sparsity: expected a number"),
        (lambda m, o: fp.SET(m, 0.5, 0), ValueError, "every: expected a whole number >= 1"),
        (lambda m, o: fp.SET(m, 0.5, 1, 2.0), ValueError, "zeta: expected"),
        (lambda m, o: fp.SET(m, 0.5, 1, until=-1), ValueError, "until: expected"),
        (lambda m, o: fp.SET(m, 0.5, 1, quota="none"), ValueError, "quota: unknown name"),
        (lambda m, o: fp.SET(m, 0.5, 1, seed=-1), ValueError, "seed: expected"),
        (lambda m, o: fp.SET(m, 0.5, 1, generator=3), TypeError, "generator: expected a torch"),
        (lambda m, o: fp.SET(m, 0.5, 1, optimizer=3), TypeError, "optimizer: expected a torch"),
        (lambda m, o: fp.DSR(m, 0.5, 1, 0), ValueError, "target: expected"),
        (lambda m, o: fp.DSR(m, 0.5, 1, 5, 0.0), ValueError, "threshold: expected a positive"),
        (lambda m, o: fp.DSR(m, 0.5, 1, 5, "x"), ValueError, "threshold: expected a positive"),
        (lambda m, o: fp.DSR(m, 0.5, 1, tolerance=2), ValueError, "tolerance: expected"),
        (lambda m, o: fp.SparseMomentum(m, 0.5, None, 1, 4), TypeError, "optimizer: expected"),
        (lambda m, o: fp.SparseMomentum(m, 0.5, o, 1, 0), ValueError, "total_steps: expected"),
        (lambda m, o: fp.SparseMomentum(m, 0.5, o, 1, 4, 2), ValueError, "prune_rate: expected"),
        (
            lambda m, o: fp.SparseMomentum(m, 0.5, torch.optim.SGD(m.parameters()), 1, 4),
            ValueError,
            r"got SGD without momentum for 0\.weight",
        ),
        (
            lambda m, o: fp.RigL(m, 0.5, torch.optim.SGD(m[3].parameters()), 4),
            ValueError,
            r"optimizer: 0\.weight is not among its parameters",
        ),
        (lambda m, o: fp.RigL(m, 0.5, None, 4), TypeError, "optimizer: expected"),
        (lambda m, o: fp.RigL(m, 0.5, o, 4, alpha=-1), ValueError, "alpha: expected"),
        (lambda m, o: fp.RigL(m, 0.5, o, 4, end=2), ValueError, "end: expected"),
    ],
)
def test_bad_arguments_change_nothing(
    make: Callable[..., Any], error: type[Exception], message: str
) -> None:
    model = small()
    optimizer = sgd(model)
    with pytest.raises(error, match=message):
        make(model, optimizer)
    assert type(model[0]) is nn.Conv2d
    assert not optimizer._optimizer_step_pre_hooks
