"""Learning rates, the order of samples, recipes, data sets in folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastprune.training.data import find_dataset, generator, order
from fastprune.training.rates import Rates, optimizer_of
from fastprune.training.settings import finetune_epochs, recipe


def rates(text: str, lr: float, steps: int) -> list[float]:
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    optimizer = optimizer_of("sgd", [weight], lr, 0.9, 0.0)
    scheduler = Rates.parse(text).scheduler(optimizer, lr, steps)
    found = []
    for _ in range(steps):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return found


def test_schedules() -> None:
    assert rates("step:0.5,0.75x0.1", 0.2, 8) == pytest.approx([0.2] * 4 + [0.02] * 2 + [0.002] * 2)
    assert rates("constant", 0.2, 3) == [0.2] * 3
    cosine = rates("cosine", 1.0, 100)
    assert cosine[0] == 1.0
    assert cosine[50] == pytest.approx(0.5)
    assert cosine == sorted(cosine, reverse=True)
    assert max(rates("onecycle", 0.3, 40)) == pytest.approx(0.3, rel=0.01)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("step:0.5,0.75x0.1", 75), ("step:0.3,0.6,0.8x0.2", 60), ("cosine", 75), ("step:0.9x0.1", 75)],
)
def test_the_ramp_ends_at_the_second_decay(text: str, expected: int) -> None:
    assert Rates.parse(text).ramp_steps(100) == expected


@pytest.mark.parametrize(
    "text", ["", "step", "step:x0.1", "step:0.5x", "step:0,0.5x0.1", "step:0.5,1x0.1", "step:0.5x0"]
)
def test_schedules_that_make_no_sense(text: str) -> None:
    with pytest.raises(ValueError, match="none of"):
        Rates.parse(text)


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    first = torch.cat(order(103, 10, 3, 5))
    torch.rand(1)
    assert torch.equal(first, torch.cat(order(103, 10, 3, 5)))
    assert len(first) == len(set(first.tolist())) == 100
    assert not torch.equal(first, torch.cat(order(103, 10, 3, 6)))
    assert not torch.equal(first, torch.cat(order(103, 10, 4, 5)))
    seeds = {generator("a", i, j).initial_seed() for i in range(30) for j in range(30)}
    assert len(seeds) == 900


def test_recipes_are_those_of_the_papers() -> None:
    assert recipe("resnet20", "cifar-10", "dpf").lr == 0.2
    assert recipe("WRN-28-2", "cifar-10", "dpf").lr_schedule == "step:0.3,0.6,0.8x0.2"
    assert recipe("resnet50-imagenet", "imagenet", "snip").batch == 1024
    assert recipe("mlp", "cifar-10", "sap").lr_schedule == "cosine"
    assert finetune_epochs("one-shot", 300) == 60
    assert finetune_epochs("dpf", 300) == 0


def test_folders_that_are_no_single_data_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder"):
        find_dataset(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no files of"):
        find_dataset(tmp_path)
