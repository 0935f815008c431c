"""Lottery tickets, one shot and SAP: counts, ties, rewinding, training under masks, checkpoints."""

from __future__ import annotations

import copy
import io
import json
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastprune as fp
from fastprune.nn import MaskedConv2d, MaskedLayer, MaskedLinear
from small_models import batch, network

SCOPES = ["global", "layer", "neuron"]
METHODS: list[Callable[..., Any]] = [fp.LotteryTicket, fp.OneShotIterative, fp.SAP]


def train(model: nn.Module, steps: int = 3, seed: int = 0, optimizer: Any = None) -> Any:
    """A loop as a user writes it, with all that moves weights: momentum and weight decay."""
    if optimizer is None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    torch.manual_seed(seed)
    model.train()
    for step in range(steps):
        x, y = batch(seed=seed + step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return optimizer


def state(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if "weight_mask" not in n}


def smallest_first(weights: dict[str, Tensor], masks: dict[str, Tensor]) -> list[tuple[str, int]]:
    """Kept places in the order in which they go: among equals the last first."""
    flat = [
        (abs(float(weights[n].flatten()[i])), -at, n, int(i))
        for at, (n, i) in enumerate((n, i) for n in masks for i in masks[n].flatten().nonzero())
    ]
    return [(n, i) for _, _, n, i in sorted(flat)]


def removed(
    weights: dict[str, Tensor], masks: dict[str, Tensor], fraction: float, scope: str
) -> dict[str, Tensor]:
    """What a lottery ticket has left after a round, by the slow way."""
    result = {n: m.clone() for n, m in masks.items()}
    if scope == "global":
        groups = [smallest_first(weights, masks)]
    elif scope == "layer":
        groups = [smallest_first(weights, {n: m}) for n, m in masks.items()]
    else:
        groups = []
        for n, m in masks.items():
            cols = m.numel() // m.shape[0]
            places = smallest_first(weights, {n: m})
            groups += [[p for p in places if p[1] // cols == r] for r in range(m.shape[0])]
    for places in groups:
        for n, i in places[: math.floor(fraction * len(places))]:
            result[n].view(-1)[i] = False
    return result


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pruned every weight")
        yield


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("fraction", [0.2, 0.37])
def test_lottery_ticket(scope: Any, fraction: float) -> None:
    model = network()
    start = state(model)
    parameters = list(model.parameters())
    ticket = fp.LotteryTicket(model, fraction, scope=scope)
    masks: dict[str, Tensor] = dict(ticket.masks)
    assert all(m.all() for m in masks.values())
    assert type(model[0]) is nn.Conv2d  # nothing to mask yet
    for round_ in range(1, 5):
        train(model, seed=round_)
        weights = {n: w.detach().clone() for n, w in model.named_parameters()}
        expected = removed(weights, masks, fraction, scope)
        got = ticket.prune()
        assert got == fp.Masks(expected)
        assert ticket.round == round_
        masks = expected
        now = state(model)
        for name, value in start.items():  # weights, BatchNorm's state, the step count
            want = value.masked_fill(~masks[name], 0) if name in masks else value
            assert torch.equal(now[name], want), name
            assert now[name].dtype == value.dtype
        assert all(p.grad is None for p in model.parameters())
        assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert isinstance(model[0], MaskedConv2d)
    assert isinstance(model[5], MaskedLinear)
    train(model)
    trained = state(model)
    assert ticket.finish() is model
    assert [type(m) for m in model] == [type(m) for m in network()]
    assert all(torch.equal(v, trained[n]) for n, v in model.state_dict().items())
    assert fp.Masks.from_zeros(model) == ticket.masks
    network().load_state_dict(model.state_dict(), strict=True)


def test_exact_counts() -> None:
    model = nn.Sequential(nn.Linear(10, 11, bias=False))
    ticket = fp.LotteryTicket(model, 0.2)
    left, kept = 110, []
    for _ in range(6):
        left -= math.floor(0.2 * left)
        kept.append(left)
        ticket.prune()
    assert [r.kept for r in ticket.history] == kept
    assert kept == [88, 71, 57, 46, 37, 30]
    assert [r.removed for r in ticket.history] == [22, 17, 14, 11, 9, 7]
    assert [r.round for r in ticket.history] == [1, 2, 3, 4, 5, 6]
    everything = fp.LotteryTicket(nn.Sequential(nn.Linear(3, 3)), 1.0)
    with pytest.warns(UserWarning, match=r"LotteryTicket pruned every weight of: 0\.weight"):
        assert everything.prune().nnz() == 0


def test_ties_keep_the_earlier() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3))
    for p in model.parameters():
        nn.init.constant_(p, -0.5)
    masks = fp.LotteryTicket(model, 0.5).prune()
    assert masks["0.weight"].flatten().tolist() == [True] * 7 + [False]
    assert masks["1.weight"].flatten().tolist() == [False] * 6
    masks = fp.LotteryTicket(copy.deepcopy(fp.finalize(model)), 0.5, scope="neuron").prune()
    assert masks["0.weight"].sum(1).tolist() == [2, 2]
    assert masks["0.weight"][0].tolist() == [True, True, False, False]


def test_rewinding_to_a_later_step() -> None:
    model = network()
    ticket = fp.LotteryTicket(model, 0.3)
    train(model, 1)
    ticket.remember()
    point = state(model)
    for round_ in range(3):
        train(model, 2, seed=round_)
        masks = ticket.prune()
        now = state(model)
        for name, value in point.items():
            want = value.masked_fill(~masks[name], 0) if name in masks else value
            assert torch.equal(now[name], want), name
    train(model, 1)
    ticket.remember()  # again: now with pruned weights
    point = state(model)
    train(model, 1)
    masks = ticket.prune()
    assert torch.equal(model[1].running_mean, point["1.running_mean"])
    assert torch.equal(model[5].weight, point["5.weight"].masked_fill(~masks["5.weight"], 0))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scope", SCOPES)
def test_pruned_weights_stay_zero_in_training(method: Any, scope: Any) -> None:
    model = network()
    ticket = method(model, scope=scope)
    optimizer = train(model)
    for round_ in range(3):
        masks = ticket.prune(optimizer=optimizer)
        assert not optimizer.state
        moved = {n: w.detach().clone() for n, w in model.named_parameters()}
        train(model, 4, seed=round_, optimizer=optimizer)
        for name, mask in masks.items():
            weight = model.get_parameter(name)
            assert (weight[~mask] == 0).all()
            if mask.any():
                assert not torch.equal(weight, moved[name])


def test_training_a_ticket_is_training_the_masked_network() -> None:
    """The same weights as masking by hand after every step, which is how the papers train."""
    model = network()
    ticket = fp.LotteryTicket(model, 0.5)
    train(model)
    masks = ticket.prune()
    by_hand = network()
    masks.apply_(by_hand)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    other = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(4):
        for m, o in ((by_hand, optimizer), (model, other)):
            train(m, 1, seed=step, optimizer=o)
        masks.apply_(by_hand)
    for (name, a), b in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize("scope", SCOPES)
def test_one_shot_ranks_by_the_first_training(scope: Any) -> None:
    model = network()
    shot = fp.OneShotIterative(model, 0.25, scope=scope)
    train(model)
    trained = state(model)
    masks: dict[str, Tensor] = dict(shot.masks)
    for round_ in range(3):
        masks = removed(trained, masks, 0.25, scope)
        assert shot.prune() == fp.Masks(masks)
        now = state(model)
        for name, value in trained.items():
            want = value.masked_fill(~masks[name], 0) if name in masks else value
            assert torch.equal(now[name], want), name
        train(model, seed=round_)  # without effect on what follows
    with pytest.raises(RuntimeError, match="remember: the method does not rewind"):
        shot.remember()


@pytest.mark.parametrize("scope", SCOPES)
def test_sap_is_its_step_and_a_rewind(scope: Any) -> None:
    model = network()
    start = state(model)
    sap = fp.SAP(model, p=1.0, q=2.0, gamma=1.5, beta=0.6, scope=scope)
    masks = None
    for round_ in range(3):
        train(model, seed=round_)
        expected = fp.sap_step(model, masks, p=1.0, q=2.0, gamma=1.5, beta=0.6, scope=scope)
        masks = sap.prune()
        assert masks == expected
        assert torch.equal(model[1].running_var, start["1.running_var"])
        assert torch.equal(model[7].weight, start["7.weight"].masked_fill(~masks["7.weight"], 0))
    assert sap.history[-1].sparsity > 0.2


@pytest.mark.parametrize("method", METHODS)
def test_history(method: Any) -> None:
    model = network()
    run = method(model)
    masks = run.masks
    for number in (1, 2):
        train(model, seed=number)
        if number == 1 or method is not fp.OneShotIterative:
            weights = {n: model.get_parameter(n).detach().clone() for n in masks}
        after = run.prune()
        record = run.history[-1]
        assert (record.round, record.weights, record.kept) == (number, 131, after.nnz())
        assert record.sparsity == after.sparsity()
        assert record.removed == masks.nnz() - after.nnz()
        assert record.density == {r.name: r.density for r in after.summary().rows}
        for part, under in ((record.retrained, masks), (record.pruned, after)):
            pq, gini = fp.pq_index(weights, under), fp.gini_index(weights, under)
            assert (part.pq, part.gini) == (pq.total.item(), gini.total.item())
            assert list(part.pq_layers.values()) == pq.layers.tolist()
            assert list(part.gini_layers.values()) == gini.layers.tolist()
        masks = after


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_from_its_checkpoint(method: Any) -> None:
    def go_on(model: nn.Module, run: Any) -> None:
        for round_ in (5, 6):
            train(model, seed=round_)
            run.prune()

    model = network()
    run = method(model, scope="layer")
    train(model)
    if method is not fp.OneShotIterative:
        run.remember()
    for round_ in range(2):
        train(model, seed=round_)
        run.prune()
    train(model, 1)
    file = io.BytesIO()
    torch.save({"run": run.state_dict(), "model": model.state_dict()}, file)
    go_on(model, run)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    json.dumps([saved["run"][k] for k in ("method", "settings", "history", "kernels")])
    other = network()
    again = method(other, scope="layer")
    again.load_state_dict(saved["run"])
    other.load_state_dict(saved["model"], strict=True)
    assert again.round == 2
    go_on(other, again)
    assert again.masks == run.masks
    assert again.history == run.history
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_before_the_first_round() -> None:
    model = network()
    start = state(model)
    saved = fp.LotteryTicket(model).state_dict()
    train(model)
    ticket = fp.LotteryTicket(model)
    ticket.load_state_dict(saved)
    assert type(model[0]) is nn.Conv2d
    masks = ticket.prune()
    assert torch.equal(model[5].weight, start["5.weight"].masked_fill(~masks["5.weight"], 0))


def test_what_is_masked_already_stays_pruned() -> None:
    model = network()
    first = fp.prune(model, "magnitude", sparsity=0.5)
    fp.swapping.mask_layers_(model, first)
    ticket = fp.LotteryTicket(model, 0.2)
    assert ticket.masks == first
    after = ticket.prune()
    assert (after - first).nnz() == 0
    assert after.nnz() == first.nnz() - math.floor(0.2 * first.nnz())


def test_include_and_exclude() -> None:
    model = network()
    ticket = fp.LotteryTicket(model, 0.5, exclude="7")
    assert list(ticket.masks) == ["0.weight", "5.weight"]
    ticket.prune()
    assert type(model[7]) is nn.Linear
    assert (model[7].weight != 0).all()


def test_shared_weights_are_one() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    ticket = fp.LotteryTicket(model, 0.5)
    assert ticket.prune().numel() == 16
    assert all(isinstance(model[i], MaskedLayer) for i in (0, 2))
    assert torch.equal(model[0].weight_mask, model[2].weight_mask)
    assert type(ticket.finish()[2]) is nn.Linear


def test_nan_changes_nothing() -> None:
    for method in METHODS:
        model = network()
        run = method(model)
        train(model)
        run.prune()
        train(model)
        before = copy.deepcopy(run.state_dict())
        with torch.no_grad():
            model[5].weight[run.masks["5.weight"]] = math.nan
            if method is fp.OneShotIterative:
                run._states["trained"]["5.weight"].fill_(math.nan)
        weights = {n: w.detach().clone() for n, w in model.named_parameters()}
        with pytest.raises(ValueError, match=r"5\.weight"):
            run.prune()
        assert run.round == 1
        assert run.masks == fp.Masks(before["masks"])
        for n, w in model.named_parameters():
            assert torch.equal(w.nan_to_num(7.0), weights[n].nan_to_num(7.0))
    shot = fp.OneShotIterative(network())
    nn.init.constant_(shot.model[5].weight, math.nan)
    with pytest.raises(ValueError, match=r"5\.weight"):
        shot.prune()
    assert "trained" not in shot.state_dict()["states"]


@pytest.mark.parametrize(
    ("kind", "message", "call"),
    [
        (ValueError, r"LotteryTicket: fraction: .*\[0, 1\]", lambda m: fp.LotteryTicket(m, 1.5)),
        (
            ValueError,
            "OneShotIterative: scope: expected one of global, layer, neuron",
            lambda m: fp.OneShotIterative(m, scope="filter"),
        ),
        (ValueError, "SAP: p: expected less than q", lambda m: fp.SAP(m, p=2.0)),
        (ValueError, "SAP: beta: expected", lambda m: fp.SAP(m, beta=2.0)),
        (ValueError, "exclude: 'x' matches nothing", lambda m: fp.SAP(m, exclude="x")),
        (TypeError, "model: expected a torch.nn.Module", lambda m: fp.SAP(3)),
        (
            TypeError,
            "LotteryTicket: optimizer: expected",
            lambda m: fp.LotteryTicket(m).prune(optimizer=3),
        ),
        (
            ValueError,
            r"0\.weight: no masked layer takes .* Conv1d 0: .*exclude",
            lambda m: fp.LotteryTicket(nn.Sequential(nn.Conv1d(2, 3, 1))),
        ),
    ],
)
def test_bad_arguments(kind: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(kind, match=message):
        call(network())


def test_bad_states() -> None:
    saved = fp.LotteryTicket(network()).state_dict()

    def load(run: Any, **change: Any) -> None:
        run.load_state_dict({**saved, **change})

    new = fp.LotteryTicket(network())
    with pytest.raises(ValueError, match="SAP: state: it belongs to a run of LotteryTicket"):
        load(fp.SAP(network()))
    with pytest.raises(ValueError, match=r"state: fraction was 0\.2 .* and is 0\.3 here"):
        load(fp.LotteryTicket(network(), 0.3))
    with pytest.raises(ValueError, match=r"masks cover other weights; odd: \['7\.weight'\]"):
        load(fp.LotteryTicket(network(), exclude="7"))
    with pytest.raises(ValueError, match="does not match the parameter's"):
        load(new, masks={n: torch.ones(2).bool() for n in saved["masks"]})
    with pytest.raises(ValueError, match="unknown state 'trained'"):
        load(new, states={"trained": saved["states"]["init"]})
    with pytest.raises(ValueError, match="the initial state is missing"):
        load(new, states={})
    with pytest.raises(ValueError, match=r"init: expected the model's .* odd: "):
        load(new, states={"init": {}})
    with pytest.raises(KeyError, match="history"):
        new.load_state_dict({k: v for k, v in saved.items() if k != "history"})
    load(new)


def test_finish_gives_plain_layers_whatever_kernels_ran() -> None:
    model = network()
    ticket = fp.LotteryTicket(model)
    train(model)
    ticket.prune()
    fp.nn.batch_last.understand_batch_last_(model)
    ticket.finish()
    assert [type(m) for m in model.modules()] == [type(m) for m in network().modules()]


def test_nothing_after_finish() -> None:
    ticket = fp.LotteryTicket(network())
    ticket.finish()
    for call in (ticket.prune, ticket.remember, lambda: ticket.load_state_dict({})):
        with pytest.raises(RuntimeError, match=r"finish\(\) has ended the run"):
            call()


def test_kernels_may_be_timed_before_the_first_round() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    before = {n: v.clone() for n, v in model.state_dict().items()}
    ticket = fp.LotteryTicket(model)
    ticket.measure_kernels(torch.randn(4, 6))
    assert type(model[0]) is nn.Linear
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    times = ticket.state_dict()["kernels"]
    assert set(times) == {"0", "2"}
    again = fp.LotteryTicket(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    again.load_state_dict(ticket.state_dict())
    again.prune()
    assert again.state_dict()["kernels"] == times
    never = {"dense": 0.0, "sparse": (1.0, 1.0, 1.0), "chained": ()}
    ticket.use_kernel_times({"0": never, "2": never})
    ticket.prune()
    assert not model[0].sparse
    assert not model[2].sparse
