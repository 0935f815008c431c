"""accelerate and finalize: the same function, never a lost weight, a report that adds up."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastprune as fp


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.inner_norm = nn.BatchNorm2d(16)
        self.line = nn.Conv1d(16, 4, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.inner_norm(self.inner(x)).relu()
        return self.head(self.line(x.flatten(2)).mean(2))


X = torch.randn(3, 3, 10, 9, generator=torch.Generator().manual_seed(1))


def pruned() -> tuple[nn.Module, fp.Masks, nn.Module]:
    torch.manual_seed(0)
    model = Residual()
    for norm in (model.norm, model.inner_norm):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    masks = fp.prune(model, "magnitude", sparsity=0.8)
    expected = copy.deepcopy(model)
    masks.apply_(expected)
    return model, masks, expected


@pytest.mark.parametrize("training", [False, True])
def test_same_function_and_the_model_untouched(training: bool) -> None:
    model, masks, expected = pruned()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    fast, report = fp.accelerate(model, masks, X, training=training, min_time=0.002)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert fast.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    torch.testing.assert_close(fast.eval()(X), expected.eval()(X), rtol=1e-4, atol=1e-4)
    assert [row.name for row in report.layers] == list(masks)
    line = next(row for row in report.layers if row.name == "line.weight")
    assert line.chosen == "dense"
    assert "Conv1d" in line.reason
    text = str(report)
    assert all(name in text for name in masks)
    assert json.loads(json.dumps(report.to_dict()))["dense_ms"] > 0


def test_folded_batchnorm() -> None:
    model, masks, expected = pruned()
    fast, report = fp.accelerate(model, masks, X, fold_batchnorm=True, min_time=0.002)
    assert report.folded == 2
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast.modules())
    torch.testing.assert_close(fast(X), expected.eval()(X), rtol=1e-4, atol=1e-4)
    for name, mask in masks.items():
        assert not fast.get_parameter(name)[~mask].any()
    with pytest.raises(ValueError, match="fold_batchnorm: expected False"):
        fp.accelerate(model, masks, X, training=True, fold_batchnorm=True)


def force(sparse: bool) -> Callable[..., dict[str, fp.timing.Timing]]:
    """Timings in which the sparse candidates always win, or always lose."""

    def measure(fns: dict[str, Callable[[], object]], **_: object) -> dict[str, fp.timing.Timing]:
        for fn in fns.values():
            fn()
        slow = [k for k in fns if k.startswith(("sparse", "fast")) != sparse]
        return {k: fp.timing.Timing(2.0 if k in slow else 1.0, 1.0, 2.0, 1) for k in fns}

    return measure


@pytest.mark.parametrize("sparse", [True, False])
def test_training_keeps_pruned_weights_at_zero(
    sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp.timing, "measure", force(sparse))
    model, masks, _ = pruned()
    masks = fp.Masks.of({k: v for k, v in masks.items() if k != "line.weight"})
    fast, report = fp.accelerate(model, masks, X, training=True)
    assert {row.chosen for row in report.layers} == {"sparse" if sparse else "dense"}
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        fast(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, mask in masks.items():
        assert not fast.get_parameter(name)[~mask].any()
    model.load_state_dict(fp.finalize(fast).state_dict(), strict=True)
    torch.testing.assert_close(model.eval()(X), fast.eval()(X), rtol=1e-4, atol=1e-4)


def test_goes_back_to_dense_when_the_whole_model_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(fns: dict[str, Callable[[], object]], **_: object) -> dict[str, fp.timing.Timing]:
        quick = ("sparse", "dense")
        return {k: fp.timing.Timing(1.0 if k.startswith(quick) else 2.0, 1, 2, 1) for k in fns}

    monkeypatch.setattr(fp.timing, "measure", measure)
    model, masks, expected = pruned()
    fast, report = fp.accelerate(model, masks, X)
    assert report.reverted
    assert report.speedup == 1.0
    assert not any(m.sparse for m in fast.modules() if isinstance(m, fp.nn.MaskedLayer))
    assert "put back on dense kernels" in str(report)
    torch.testing.assert_close(fast.eval()(X), expected.eval()(X))


@pytest.mark.parametrize("kind", ["dense", "fast"])
def test_takes_the_better_memory_format(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(fns: dict[str, Callable[[], object]], **_: object) -> dict[str, fp.timing.Timing]:
        for fn in fns.values():
            fn()
        best = {"sparse", f"{kind}, channels_last"} if "fast" in fns else {"sparse"}
        return {k: fp.timing.Timing(1.0 if k in best else 2.0, 1, 2, 1) for k in fns}

    monkeypatch.setattr(fp.timing, "measure", measure)
    model, masks, expected = pruned()
    masks = fp.Masks.of({k: masks[k] for k in masks if k != "inner.weight"})
    expected = copy.deepcopy(model)
    masks.apply_(expected)
    fast, report = fp.accelerate(model, masks, X)
    assert report.channels_last
    assert report.reverted == (kind == "dense")
    last = torch.channels_last
    assert fast.stem.weight.is_contiguous(memory_format=last) == (kind == "dense")
    assert fast.inner.weight.is_contiguous(memory_format=last)
    torch.testing.assert_close(fast.eval()(X), expected.eval()(X), rtol=1e-4, atol=1e-4)
    fast.train()(X).sum().backward()


def test_shared_layers_stay_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp.timing, "measure", force(True))
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    masks = {"0.weight": torch.rand(6, 6) < 0.5}
    fast, _ = fp.accelerate(model, masks, torch.randn(2, 6))
    assert fast[0] is fast[2]
    assert isinstance(fast[0], fp.nn.MaskedLinear)


def test_a_root_layer_and_an_accelerated_model() -> None:
    layer = nn.Linear(6, 6)
    masks = {"weight": torch.rand(6, 6) < 0.5}
    fast, _ = fp.accelerate(layer, masks, torch.randn(2, 6), min_time=0.001)
    assert isinstance(fast, fp.nn.MaskedLinear)
    again, _ = fp.accelerate(fast, masks, torch.randn(2, 6), min_time=0.001)
    x = torch.randn(3, 6)
    torch.testing.assert_close(again(x), fast(x))
    assert type(fp.finalize(again)) is nn.Linear


def test_tuple_of_arguments_and_unreached_layers() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unused = nn.Linear(4, 3), nn.Linear(5, 3), nn.Linear(2, 2)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"sum": self.a(x) + self.b(y)}

    model = Two()
    masks = fp.prune(model, "magnitude", sparsity=0.5)
    inputs = (torch.randn(2, 4), torch.randn(2, 5))
    fast, report = fp.accelerate(model, masks, inputs, training=True, min_time=0.001)
    assert next(r for r in report.layers if r.name == "unused.weight").reason.startswith("not reac")
    expected = copy.deepcopy(model)
    masks.apply_(expected)
    torch.testing.assert_close(fast(*inputs)["sum"], expected(*inputs)["sum"])


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ([], TypeError, "masks: expected a mapping"),
        ({"head.weight": torch.ones(5, 4)}, TypeError, r"masks\['head.weight'\]: expected a bool"),
        ({"no.weight": torch.ones(5, 4).bool()}, ValueError, "has no parameter of that name"),
        ({"head.weight": torch.ones(4, 5).bool()}, ValueError, r"expected shape \(5, 4\)"),
    ],
)
def test_bad_masks(masks: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fp.accelerate(Residual(), masks, X)  # type: ignore[arg-type]
