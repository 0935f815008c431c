"""BatchNorm in either layout, with and without a fused ReLU, against torch in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastprune.nn.batch_last import BatchNorm2d, understand_batch_last_
from fastprune.ops import layout

SHAPES = [(9, 1, 1, 1), (5, 3, 7, 3), (17, 4, 4, 4), (16, 2, 33, 5), (3, 70, 1, 2)]


def taught(norm: nn.BatchNorm2d, relu: bool) -> BatchNorm2d:
    ours = copy.deepcopy(norm)
    understand_batch_last_(ours)
    assert type(ours) is BatchNorm2d
    ours.fused_relu = relu
    return ours


def random_norm(channels: int, dtype: torch.dtype, **options: object) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, **options).to(dtype)  # type: ignore[arg-type]
    with torch.no_grad():
        for t in (norm.weight, norm.bias, norm.running_mean):
            if t is not None:
                t.normal_()
        if norm.running_var is not None:
            norm.running_var.uniform_(0.5, 2)
    return norm


def both_layouts(x: Tensor) -> list[Tensor]:
    return [x, layout.batch_last(x)]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_training_step(isa: str, shape: tuple[int, ...], relu: bool) -> None:
    torch.manual_seed(sum(shape))
    norm = random_norm(shape[1], torch.float32)
    x, grad = 3 * torch.randn(shape) + 10, torch.randn(shape)
    exact = copy.deepcopy(norm).double()
    xd = x.double().requires_grad_()
    y = exact(xd)
    near_zero = y.detach().abs() < 1e-4  # the sign of the float32 result may differ there
    y = torch.relu(y) if relu else y
    y.backward(grad.double().masked_fill(near_zero, 0))
    for given in both_layouts(x):
        ours = taught(norm, relu)
        leaf = given.detach().requires_grad_()
        got = ours(leaf)
        assert layout.is_batch_last(got) == layout.is_batch_last(given)
        got.backward(grad.masked_fill(near_zero, 0))
        torch.testing.assert_close(got.double(), y, rtol=1e-4, atol=1e-4)
        assert leaf.grad is not None
        assert xd.grad is not None
        torch.testing.assert_close(leaf.grad.double(), xd.grad, rtol=2e-3, atol=1e-4)
        for (name, ours_p), exact_p in zip(
            ours.named_parameters(), exact.parameters(), strict=True
        ):
            assert ours_p.grad is not None
            assert exact_p.grad is not None
            torch.testing.assert_close(
                ours_p.grad.double(), exact_p.grad, rtol=1e-3, atol=2e-3, msg=name
            )
        for name, buffer in exact.named_buffers():
            torch.testing.assert_close(ours.get_buffer(name).to(buffer), buffer, msg=name)


def test_gradcheck() -> None:
    norm = taught(random_norm(3, torch.float64), False)
    x = torch.randn(4, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: norm(x), (x,))
    moved = x.detach().permute(1, 2, 3, 0).contiguous().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: norm(x.permute(3, 0, 1, 2)), (moved,))


@pytest.mark.parametrize("options", [{"momentum": None}, {"affine": False}, {"momentum": 0.3}])
def test_options_and_running_statistics(options: dict[str, object]) -> None:
    norm = random_norm(3, torch.float32, **options)
    ours = taught(norm, False)
    for _ in range(3):
        x = torch.randn(6, 3, 4, 5)
        torch.testing.assert_close(ours(layout.batch_last(x)), norm(x), rtol=1e-4, atol=1e-5)
    assert ours.state_dict().keys() == norm.state_dict().keys()
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer, msg=name)


def test_without_running_statistics() -> None:
    norm = nn.BatchNorm2d(3, track_running_stats=False)
    x = torch.randn(6, 3, 4, 5)
    for mode in (True, False):
        torch.testing.assert_close(
            taught(norm, False).train(mode)(layout.batch_last(x)), norm.train(mode)(x)
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    norm = random_norm(3, kind)
    x = torch.randn(17, 3, 4, 5).to(dtype)
    expected = copy.deepcopy(norm).double()(x.double())
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if kind == torch.float32 else {}
    for given in both_layouts(x):
        got = taught(norm, False)(given)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, **tolerance)


@pytest.mark.parametrize("relu", [False, True])
def test_evaluation_follows_every_change(relu: bool) -> None:
    norm = random_norm(3, torch.float32).eval()
    ours = taught(norm, relu)
    x = torch.randn(5, 3, 4, 4)

    def check() -> None:
        expected = torch.relu(norm(x)) if relu else norm(x)
        for given in both_layouts(x):
            torch.testing.assert_close(ours(given), expected, rtol=1e-4, atol=1e-5)

    with torch.no_grad():
        check()
        for change in ("weight", "bias", "running_mean", "running_var"):
            getattr(norm, change).mul_(1.5)
            getattr(ours, change).mul_(1.5)
            check()
        norm.load_state_dict(random_norm(3, torch.float32).state_dict())
        ours.load_state_dict(norm.state_dict())
        check()
    check()  # with gradients
    with torch.inference_mode():
        check()


def test_same_bits_for_any_number_of_threads() -> None:
    norm, x = random_norm(7, torch.float32), torch.randn(33, 7, 9, 5)
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(taught(norm, True)(layout.batch_last(x)))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results)


def test_a_nan_stays_in_its_channel() -> None:
    x = torch.randn(4, 3, 2, 2)
    x[1, 1, 0, 0] = float("nan")
    y = taught(random_norm(3, torch.float32), True)(x)
    assert y[:, 1].isnan().all()
    assert not y[:, [0, 2]].isnan().any()


def test_one_value_per_channel_is_torchs_own_error() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        taught(nn.BatchNorm2d(3), False)(torch.randn(1, 3, 1, 1))


def test_bad_arguments_of_the_op() -> None:
    op = torch.ops.fastprune.batch_norm
    x, ones = torch.randn(2, 3, 4, 5), torch.ones(3)
    with pytest.raises(RuntimeError, match="x: expected 4 dimensions"):
        op(x[0], ones, ones, 1e-5, False)
    with pytest.raises(RuntimeError, match="weight: expected size 3"):
        op(x, torch.ones(4), ones, 1e-5, False)
    with pytest.raises(RuntimeError, match="bias: expected dtype Float"):
        op(x, ones, ones.double(), 1e-5, False)
    _, mean, _, invstd = op(x, ones, ones, 1e-5, False)
    with pytest.raises(RuntimeError, match="y_grad: expected size 5"):
        torch.ops.fastprune.batch_norm_grad(x[..., :4], x, ones, ones, mean, invstd, False)
