"""Pruning to an effective sparsity."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastprune as fp

X = torch.zeros(1, 1, 28, 28)


def lenet() -> nn.Module:
    torch.manual_seed(0)
    return fp.models.create("lenet-300-100")


def effective(model: nn.Module, masks: fp.Masks, x: Tensor = X) -> float:
    return fp.effective_sparsity(model, masks, example_input=x)


def direct(masks: fp.Masks) -> float:
    return 1 - sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())


@pytest.mark.parametrize("method", ["magnitude", "lamp", "random"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
def test_one_shot_methods_land_just_below_the_target(method: str, sparsity: float) -> None:
    model = lenet()
    options = {"generator": torch.Generator().manual_seed(1)} if method == "random" else {}
    masks = fp.prune(model, method, sparsity, effective=True, example_input=X, **options)
    reached = effective(model, masks)
    assert reached < sparsity
    # A unit that falls off takes its weights with it.
    assert sparsity - reached < 4e-3
    assert direct(masks) <= reached
    options = {"generator": torch.Generator().manual_seed(1)} if method == "random" else {}
    plain = fp.prune(model, method, direct(masks), **options)
    assert plain == masks  # the same chain of masks


def test_one_weight_more_passes_the_target() -> None:
    model = lenet()
    masks = fp.prune(model, "magnitude", 0.95, effective=True, example_input=X)
    total = sum(m.numel() for m in masks.values())
    kept = sum(int(m.sum()) for m in masks.values())
    scores = fp.score(model, "magnitude")
    fewer = fp.global_topk_mask(list(scores.values()), k=kept - 1)
    after = fp.effective_sparsity(model, dict(zip(scores, fewer, strict=True)), example_input=X)
    assert effective(model, masks) < 0.95 <= after
    assert total == 266200


@pytest.mark.parametrize("quota", ["igq", "erk", "uniform"])
def test_random_pruning_with_a_quota_keeps_to_it(quota: str) -> None:
    """Algorithm 1: nested subnetworks with the quota's counts in every layer."""
    model = lenet()
    masks = fp.prune(
        model, "random", 0.98, quota=quota, effective=True, example_input=X,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    assert 0.975 < effective(model, masks) < 0.98
    shapes = [m.shape for m in masks.values()]
    function = getattr(fp.quotas, quota)
    for mask, s in zip(masks.values(), function(shapes, direct(masks)), strict=True):
        assert abs(int(mask.sum()) - (1 - s) * mask.numel()) <= 2.5


def test_iterative_methods_stop_at_the_step_that_passes() -> None:
    model = lenet()
    masks = fp.prune(model, "synflow", 0.99, effective=True, example_input=X, steps=20)
    assert 0.985 < effective(model, masks) < 0.99


def test_methods_with_data() -> None:
    model = lenet()
    batch = (torch.randn(16, 1, 28, 28), torch.randint(10, (16,)))
    for method in ("snip", "grasp", "force", "iter-snip"):
        steps = None if method in ("snip", "grasp") else 3
        masks = fp.prune(
            model, method, 0.9, data=[batch], loss=F.cross_entropy, effective=True, steps=steps
        )
        assert 0.88 < effective(model, masks) < 0.9, method


@pytest.mark.parametrize("scope", ["layer", "neuron", "filter"])
def test_other_scopes_come_as_near_as_their_steps_allow(scope: str) -> None:
    model = lenet()
    masks = fp.prune(model, "magnitude", 0.9, scope=scope, effective=True, example_input=X)  # type: ignore[arg-type]
    assert 0.85 < effective(model, masks) < 0.9


def test_a_target_beyond_the_brink_names_the_nearest() -> None:
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(8)])
    x = torch.zeros(1, 6)
    with pytest.raises(ValueError, match=r"cannot be reached.*the nearest is 0\.\d+"):
        fp.prune(model, "magnitude", 0.98, effective=True, example_input=x)


def test_a_target_below_what_padding_alone_makes_is_refused() -> None:
    model = nn.Conv2d(2, 2, 3, padding=1)  # on one pixel, 8 of 9 taps are on no path
    with pytest.raises(ValueError, match=r"weights that are on no path make it 0\.888889"):
        fp.prune(model, "magnitude", 0.5, effective=True, example_input=torch.zeros(1, 2, 1, 1))


def test_the_ends() -> None:
    model = lenet()
    everything = fp.prune(model, "magnitude", 0.0, effective=True, example_input=X)
    assert all(m.all() for m in everything.values())
    with pytest.warns(UserWarning, match="pruned every weight"):
        nothing = fp.prune(model, "magnitude", 1.0, effective=True, example_input=X)
    assert not any(m.any() for m in nothing.values())


def test_arguments() -> None:
    model = lenet()
    with pytest.raises(ValueError, match="example_input: effective=True needs it"):
        fp.prune(model, "magnitude", 0.5, effective=True)
    with pytest.raises(ValueError, match="sparsity: effective=True needs it"):
        fp.prune(model, "magnitude", schedule=[1000], effective=True, example_input=X)
    with pytest.raises(ValueError, match="quota: fixed layer sparsities leave nothing"):
        fp.prune(model, "magnitude", 0.5, quota=[0.5] * 3, effective=True, example_input=X)
    with pytest.raises(ValueError, match="example_input: the method magnitude does not use it"):
        fp.prune(model, "magnitude", 0.5, example_input=X)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), sparsity=st.floats(0.05, 0.8))
def test_bisection_finds_what_a_scan_of_all_masks_finds(seed: int, sparsity: float) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    x = torch.zeros(1, 4)
    scores = fp.score(model, "magnitude")
    best = None
    for k in range(35, -1, -1):
        chosen = fp.global_topk_mask(list(scores.values()), k=k)
        candidate = dict(zip(scores, chosen, strict=True))
        if fp.effective_sparsity(model, candidate, example_input=x) >= sparsity:
            break
        best = candidate
    assert best is not None
    if fp.effective_sparsity(model, candidate, example_input=x) == 1.0:  # the brink
        return
    masks = fp.prune(model, "magnitude", sparsity, effective=True, example_input=x)
    assert masks == fp.Masks(best)
