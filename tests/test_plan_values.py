"""Values that a plan keeps between calls are never stale."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastprune as fp
from fastprune.ops.pattern import apply_mask
from layouts import same_bits
from oracle import DTYPES
from plan_cases import check, fresh, make, number, product, random


def kept_index(layer: Any, i: int = 7) -> tuple[int, ...]:
    return tuple(layer.weight_mask.nonzero()[i].tolist())


def step(layer: Any, make_optimizer: Callable[..., Any]) -> None:
    optimizer = make_optimizer(layer.parameters())
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()


def no_grad(change: Callable[[Any], object]) -> Callable[[Any], None]:
    def run(layer: Any) -> None:
        with torch.no_grad():
            change(layer)

    return run


def inference(change: Callable[[Any], object]) -> Callable[[Any], None]:
    def run(layer: Any) -> None:
        with torch.inference_mode():
            change(layer)

    return run


def other_state(layer: Any) -> dict[str, Tensor]:
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    state["weight"] = state["weight"].flip(0) + 1
    return state


def shared_with_a_vector(layer: Any) -> None:
    vector = torch.nn.utils.parameters_to_vector(layer.parameters()) * 2
    torch.nn.utils.vector_to_parameters(vector.detach(), layer.parameters())


def raise_entry(w: Tensor, index: tuple[int, ...]) -> None:
    w[index] += 100.0


def changed_copy(layer: Any) -> Tensor:
    w = layer.weight.detach().clone()
    raise_entry(w, kept_index(layer))
    return w


def anew(layer: Any) -> Tensor:
    """Other values for the weight at every call."""
    return random(*layer.weight.shape, seed=next(seeds))


seeds = itertools.count(5)


def with_swap(change: Callable[[Any], object]) -> Callable[[Any], None]:
    """The conversion that exchanges tensors, which torch.__future__ announces."""

    def run(layer: Any) -> None:
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            change(layer)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)

    return run


CHANGES: dict[str, Callable[[Any], object]] = {
    "sgd": lambda m: step(m, lambda p: torch.optim.SGD(p, lr=0.1)),
    "adamw, for each": lambda m: step(m, lambda p: torch.optim.AdamW(p, foreach=True)),
    "adamw, fused": lambda m: step(m, lambda p: torch.optim.AdamW(p, fused=True)),
    "in place": no_grad(lambda m: m.weight.mul_(1.5)),
    "one entry in place": no_grad(lambda m: raise_entry(m.weight, kept_index(m))),
    "one entry, inference mode": inference(lambda m: raise_entry(m.weight, kept_index(m))),
    "through a view": no_grad(lambda m: m.weight.view(-1)[:].neg_()),
    "for each": no_grad(lambda m: torch._foreach_mul_([m.weight], 3.0)),
    "init": lambda m: nn.init.normal_(m.weight),
    "detach, in place": lambda m: raise_entry(m.weight.detach(), kept_index(m)),
    "data.copy_": lambda m: m.weight.data.copy_(anew(m)),
    "data[...] scaled": lambda m: m.weight.data[...].mul_(0.5),
    "data, signs": lambda m: m.weight.data.neg_(),
    "data, a unit in the last place": lambda m: m.weight.data.view(torch.int32).add_(1),
    "data replaced": lambda m: setattr(m.weight, "data", anew(m)),
    "data replaced twice": lambda m: [
        setattr(m.weight, "data", m.weight.data * 2) for _ in range(2)
    ],
    "data replaced, one entry": lambda m: setattr(m.weight, "data", changed_copy(m)),
    "set_": no_grad(lambda m: m.weight.set_(anew(m))),
    "numpy": lambda m: m.weight.detach().numpy().__imul__(2),
    "load_state_dict": lambda m: m.load_state_dict(other_state(m)),
    "load_state_dict, assign": lambda m: m.load_state_dict(other_state(m), assign=True),
    "load_state_dict, swap": with_swap(lambda m: m.load_state_dict(other_state(m))),
    "double and back, swap": with_swap(lambda m: m.double().float()),
    "new Parameter": lambda m: setattr(m, "weight", nn.Parameter(m.weight.detach() * 2)),
    "vector_to_parameters": shared_with_a_vector,
    "double and back": lambda m: m.double().float(),
    "half and back": lambda m: m.half().float(),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "share_memory": lambda m: m.share_memory(),
    "frozen": lambda m: m.weight.requires_grad_(False).mul_(2).requires_grad_(),
    "train and eval": lambda m: (m.train(), m.eval()),
    "set_mask": lambda m: (m.set_mask(m.weight_mask.flip(1)), m.weight.data.add_(1)),
    "mask loaded": lambda m: m.load_state_dict(
        {**other_state(m), "weight_mask": m.weight_mask.flip(0)}
    ),
}


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_changed_weights_are_seen(kind: str, change: str) -> None:
    if change == "channels_last" and kind == "linear":
        pytest.skip("a matrix has no channels")
    layer, x = make(kind)
    check(layer, x, "before")
    check(layer, x, "kept")
    for _ in range(2):
        CHANGES[change](layer)
        check(layer, x, "after")
        with torch.no_grad():
            y = layer(x)
        CHANGES[change](layer)
        with torch.no_grad():  # between two inference calls
            assert same_bits(layer(x), fresh(layer, x)[0])
            unchanged = ("train and eval", "channels_last", "share_memory", "double", "half")
            assert change.startswith(unchanged) or not torch.equal(y, layer(x))


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_kept_apart(kind: str, dtype: torch.dtype) -> None:
    layer, x = make(kind, dtype=dtype)
    check(layer, x)
    layer.weight.data.neg_()
    check(layer, x, "data")
    with torch.no_grad():
        layer.weight.mul_(1.25)
    check(layer, x, "in place")
    for other in DTYPES:
        check(layer.to(other), x.to(other), str(other))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_memory_of_a_dead_weight_is_not_taken_for_it(kind: str) -> None:
    # New Parameters at one place with one version: only which object it is tells them apart.
    layer, x = make(kind)
    memory = torch.empty_like(layer.weight)
    known = set()
    for seed in range(40):
        memory.copy_(random(*memory.shape))
        memory[kept_index(layer, seed % 20)] += seed  # few others than the last time
        layer.weight = nn.Parameter(memory.data)
        known.add((layer.weight.data_ptr(), layer.weight._version))
        with torch.no_grad():
            assert same_bits(layer(x), product(x, memory, layer.weight_mask, layer.bias)), seed
    assert len(known) == 1
    for seed in range(40):  # and where the allocator decides
        del layer.weight
        layer.weight = nn.Parameter(random(*memory.shape, seed=seed))
        check(layer, x, str(seed))


@pytest.mark.parametrize("shape", [(70, 37), (10, 6, 3, 3)])
def test_two_weights_take_turns_on_one_pattern(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4
    pattern = fp.pack(mask)
    x = random(19, 37) if len(shape) == 2 else random(17, 6, 5, 5)
    weights = [random(*shape, seed=s).requires_grad_() for s in (2, 3)]
    expected = [product(x, w, mask) for w in weights]
    turns = zip(expected, weights, strict=True)
    grads = [torch.autograd.grad(y, w, y.detach())[0] for y, w in turns]
    for _ in range(3):
        results = [product(x.requires_grad_(), w, pattern) for w in weights]
        for y, wanted in zip(results, expected, strict=True):
            assert same_bits(y, wanted)
        for i in (0, 1):  # the first one's backward pass comes after the second one's forward pass
            y, w = results[i], weights[i]
            dx, dw = torch.autograd.grad(y, (x, w), y.detach())
            assert same_bits(dw, grads[i])
            alone = product(x, w, mask)
            assert same_bits(dx, torch.autograd.grad(alone, x, y.detach())[0])
    views = [w.detach() for w in weights]  # temporary tensors at the same places
    for _ in range(3):
        for view, wanted in zip(views, expected, strict=True):
            assert same_bits(product(x.detach(), view.detach(), pattern), wanted.detach())


def test_numbers_of_weights_never_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["fastprune.ops.plan"]
    for first in (2**29 - 2, 2**31 - 2, 2**63):
        monkeypatch.setattr(module, "_epochs", itertools.count(first))
        layer, x = make("linear")
        for seed in range(4):
            layer.weight = nn.Parameter(random(*layer.weight.shape, seed=seed))
            check(layer, x)


def test_functional_calls_with_other_parameters() -> None:
    layer, x = make("linear")
    check(layer, x)
    for scale in (2.0, 3.0):
        named = {k: v.detach() * scale for k, v in layer.named_parameters()}
        y = torch.func.functional_call(layer, named, (x,))
        assert same_bits(y, product(x, named["weight"], layer.weight_mask, named["bias"]))
        check(layer, x)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_copies_keep_their_own_values(kind: str) -> None:
    layer, x = make(kind)
    check(layer, x)
    twin = copy.deepcopy(layer)
    assert number(layer.pattern) != number(twin.pattern)
    check(twin, x)
    with torch.no_grad():
        twin.weight.mul_(2)
    for one in (twin, layer, twin, layer):
        check(one, x)
    shallow = copy.copy(layer)  # one pattern, one weight
    shallow.weight = nn.Parameter(layer.weight.detach() * 3)
    for one in (shallow, layer, shallow, layer):
        check(one, x)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_autocast_takes_turns_with_full_precision(kind: str) -> None:
    layer, x = make(kind)
    check(layer, x)
    for scale in (1.0, -2.0):
        with torch.no_grad():
            layer.weight.mul_(scale)
            for _ in range(2):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    y = layer(x)
                half = copy.deepcopy(layer).bfloat16()
                assert y.dtype == torch.bfloat16
                assert same_bits(y, fresh(half, x.bfloat16())[0])
                assert same_bits(layer(x), fresh(layer, x)[0])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = layer(x).float().square().sum()
        loss.backward()
        assert layer.weight.grad.dtype == torch.float32
    check(layer, x)


def test_a_weight_made_by_other_layers() -> None:
    # Not a leaf: a new tensor at every call, often at the same place.
    source, x = random(70, 37).requires_grad_(), random(19, 37)
    mask = random(70, 37, seed=1) > 0
    pattern = fp.pack(mask)
    for scale in (1.0, 2.0, 3.0, 2.0):
        y = fp.masked_linear(x, source * scale, pattern)
        (grad,) = torch.autograd.grad(y.sum(), source)
        wanted = fp.masked_linear(x, source * scale, mask)
        assert same_bits(y, wanted)
        assert same_bits(grad, torch.autograd.grad(wanted.sum(), source)[0])


def test_a_weight_that_is_not_contiguous() -> None:
    x, pattern = random(19, 37), fp.pack(random(70, 37, seed=1) > 0)
    mask = random(70, 37, seed=1) > 0
    stored = random(37, 70)
    for _ in range(3):
        stored.mul_(-1.5)
        w = stored.t()
        assert same_bits(fp.masked_linear(x, w, pattern), fp.masked_linear(x, w, mask))
        for i in range(0, 400, 20):  # few entries, behind the version counter of one tensor
            fp.masked_linear(x, w, pattern)  # its copy's memory is free for the next one
            stored.data[tuple(mask.t().nonzero()[i])] += 1
            y = fp.masked_linear(x, w, pattern)
            assert same_bits(y, fp.masked_linear(x, w, mask))
    square = random(37, 37)
    square_mask = random(37, 37, seed=2) > 0
    pattern = fp.pack(square_mask)
    for _ in range(4):
        square.t_()
        got = fp.masked_linear(x, square, pattern)
        assert same_bits(got, fp.masked_linear(x, square, square_mask))


def test_inference_tensors_have_no_version() -> None:
    pattern = fp.pack(random(70, 37, seed=1) > 0)
    mask, x = random(70, 37, seed=1) > 0, random(19, 37)
    with torch.inference_mode():
        w = random(70, 37)
        for _ in range(3):
            w[tuple(mask.nonzero()[3])] += 1
            assert same_bits(fp.masked_linear(x, w, pattern), fp.masked_linear(x, w, mask))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_one_entry_through_data_in_training(kind: str) -> None:
    # The version counter does not move, and few entries are looked at.
    layer, x = make(kind)
    g = torch.Generator().manual_seed(0)
    entries = layer.weight_mask.nonzero()
    for i in torch.randint(len(entries), (30,), generator=g).tolist():
        check_training(layer, x)
        layer.weight.data[tuple(entries[i])] += 1
        check_training(layer, x)


@pytest.mark.parametrize("make_optimizer", [torch.optim.SGD, torch.optim.Adagrad])
def test_fused_optimizers_that_change_few_entries(make_optimizer: Any) -> None:
    # They do not move the version counter either; one column of the weight changes here.
    layer, x = make("linear")
    optimizer = make_optimizer(layer.parameters(), lr=0.1, fused=True)
    for column in range(12):
        one = torch.zeros_like(x)
        one[:, column] = x[:, column]
        layer(one).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if column % 2:
            check_training(layer, x)
        with torch.no_grad():
            assert same_bits(layer(x), fresh(layer, x)[0])


def test_one_entry_through_data_before_evaluation() -> None:
    layer, x = make("linear")
    entries = layer.weight_mask.nonzero().tolist()
    for i in range(0, len(entries), 50):
        layer.eval()
        with torch.no_grad():
            assert same_bits(layer(x), fresh(layer, x)[0])
            layer.weight.data[tuple(entries[i])] += 1
            layer.eval()
            assert same_bits(layer(x), fresh(layer, x)[0])


def check_training(layer: Any, x: Tensor) -> None:
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    grads = torch.autograd.grad(y, (x, layer.weight, layer.bias), torch.cos(y.detach()))
    for got, wanted in zip((y.detach(), *grads), fresh(layer, x), strict=True):
        assert same_bits(got, wanted)


@pytest.mark.xfail(strict=True, reason="32 probes cannot see one entry written through .data")
def test_one_entry_through_data_between_inference_calls() -> None:
    layer, x = make("linear")
    for i in range(0, layer.pattern.nnz, 10):
        with torch.no_grad():
            layer(x)
            layer.weight.data[tuple(layer.weight_mask.nonzero()[i])] += 1
            assert same_bits(layer(x), fresh(layer, x)[0]), i


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_change_between_forward_and_backward_is_refused(kind: str) -> None:
    layer, x = make(kind)
    dense = nn.Linear(37, 70) if kind == "linear" else nn.Conv2d(6, 10, 3, padding=1)
    for model in (dense, layer):
        y = model(x.clone().requires_grad_())
        with torch.no_grad():
            model.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    for model in (dense, layer):
        moved = x.clone()
        y = model(moved)
        moved.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    check(layer, x)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_two_backward_passes(kind: str) -> None:
    layer, x = make(kind)
    x.requires_grad_()
    y = layer(x)
    y.square().sum().backward(retain_graph=True)
    once = [t.grad.clone() for t in (x, layer.weight, layer.bias)]
    y.square().sum().backward()
    for t, grad in zip((x, layer.weight, layer.bias), once, strict=True):
        assert same_bits(t.grad, 2 * grad)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.square().sum().backward()


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("planned", [True, False])
def test_second_derivatives_are_refused(kind: str, planned: bool) -> None:
    layer, x = make(kind)
    mask = layer.pattern if planned else layer.weight_mask

    def call(x: Tensor) -> Tensor:
        return product(x, layer.weight, mask, layer.bias)

    x.requires_grad_()
    (dx,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.square().sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("planned", [True, False])
def test_forward_mode_is_refused(kind: str, planned: bool) -> None:
    layer, x = make(kind)
    layer.requires_grad_(False)
    mask = layer.pattern if planned else layer.weight_mask

    def call(x: Tensor) -> Tensor:
        return product(x, layer.weight, mask, layer.bias)

    for guard in (torch.enable_grad, torch.no_grad):
        with guard(), torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
                call(dual)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.jvp(call, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_second_derivatives_of_a_layer_with_a_dense_kernel(kind: str) -> None:
    layer, x = make(kind)
    layer.sparse = False
    direction = random(*layer.weight.shape, seed=4)

    def hessian_times_direction(apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        w = layer.weight.detach().requires_grad_()
        kept = apply(w, layer.weight_mask)
        y = F.linear(x, kept) if kind == "linear" else F.conv2d(x, kept, padding=1)
        (dw,) = torch.autograd.grad(y.pow(3).sum(), w, create_graph=True)
        return torch.autograd.grad(dw, w, direction)[0]

    got = hessian_times_direction(apply_mask)
    assert got.count_nonzero() > 100
    wanted = hessian_times_direction(lambda w, mask: torch.where(mask, w, 0.0))
    torch.testing.assert_close(got, wanted)
