"""Nested states in files: exact round trips, damage, and the two that are kept."""

from __future__ import annotations

import errno
import math
import os
import random
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastprune import files
from fastprune.training.checkpoint import Checkpoints, dumps, load, loads, save


def same(a: Any, b: Any) -> bool:
    """Equal in types, order and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        bits = [t.detach().contiguous().view(-1).view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if isinstance(a, float):
        if math.isnan(a):
            return math.isnan(b)
        return a == b and math.copysign(1, a) == math.copysign(1, b)
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            same(k, m) and same(a[k], b[m]) for k, m in zip(a, b, strict=True)
        )
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([torch.float32, torch.bool, torch.Size([2, 3]), torch.Size([])])
    | st.sampled_from(
        [
            torch.tensor(1.5),
            torch.zeros(0, 3),
            torch.tensor([math.nan, -0.0, math.inf, 1e-45]),
            torch.arange(6).view(2, 3).t(),
            torch.tensor([True, False]),
            torch.ones(3, dtype=torch.bfloat16),
            torch.tensor([0.1], dtype=torch.float64),
        ]
    )
)
KEYS = st.text(max_size=4) | st.integers() | st.booleans() | st.none() | st.tuples(st.integers())
STATES = st.recursive(
    LEAVES,
    lambda s: (
        st.lists(s, max_size=4)
        | st.lists(s, max_size=4).map(tuple)
        | st.dictionaries(KEYS, s, max_size=4)
        | st.dictionaries(KEYS, s, max_size=3).map(OrderedDict)
    ),
    max_leaves=12,
)


@given(STATES)
@settings(max_examples=200)
def test_any_state_comes_back(state: Any) -> None:
    assert same(loads(dumps(state)), state)


def test_floats_and_big_integers() -> None:
    values = [
        0.1,
        1 / 3,
        5e-324,
        1.7976931348623157e308,
        1e22,
        -0.0,
        2**200,
        -(2**63),
        1,
        1.0,
        True,
    ]
    values += [random.Random(0).uniform(-1, 1) * 10.0**e for e in range(-300, 300, 7)]
    assert same(loads(dumps(values)), values)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_optimizers_and_schedules(kind: str) -> None:
    """The states that torch's own classes give, loaded into new ones, go on to the same bits."""

    def made() -> tuple[Any, ...]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        if kind == "adam":
            optimizer: Any = torch.optim.Adam(model.parameters(), lr=0.01)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
        make = torch.optim.lr_scheduler
        schedules = [
            make.MultiStepLR(optimizer, [2, 4, 4], 0.1),
            make.CosineAnnealingLR(optimizer, 20),
        ]
        return model, optimizer, schedules

    def steps(model: Any, optimizer: Any, schedules: Any, seeds: range) -> None:
        for seed in seeds:
            x = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
            for s in schedules:
                s.step()

    whole, first, second = made(), made(), made()
    steps(*whole, range(8))
    steps(*first, range(3))
    state = loads(
        dumps([first[0].state_dict(), first[1].state_dict(), [s.state_dict() for s in first[2]]])
    )
    assert isinstance(state[2][0]["milestones"], Counter)
    second[0].load_state_dict(state[0])
    second[1].load_state_dict(state[1])
    for s, loaded in zip(second[2], state[2], strict=True):
        s.load_state_dict(loaded)
    steps(*second, range(3, 8))
    assert same(whole[0].state_dict(), second[0].state_dict())
    assert same(whole[1].state_dict(), second[1].state_dict())


def test_a_tensor_that_occurs_twice_is_stored_once_and_shared_by_none() -> None:
    t = torch.randn(1000)
    one, both = dumps({"a": t}), dumps({"a": t, "b": [t, t.detach()], "c": t[:10]})
    assert len(both) < len(one) + 500
    state = loads(both)
    state["a"].zero_()
    assert torch.equal(state["b"][0], t)
    assert torch.equal(state["b"][1], t)
    assert torch.equal(state["c"], t[:10])


def test_names_that_would_collide() -> None:
    state = {
        "a": {"b": torch.ones(1)},
        "a/b": torch.zeros(1),
        1: torch.ones(2),
        "1": torch.zeros(2),
    }
    state |= {"__metadata__": torch.ones(3), "__state__": torch.ones(4), "\ud800": torch.ones(5)}
    assert same(loads(dumps(state)), state)


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [1, {"b": object()}]}, "['a'][1]['b']"),
        ([{1, 2}], "[0]"),
        ({"x": lambda: 0}, "['x']"),
        ({"m": torch.empty(2, device="meta")}, "['m']"),
        ([torch.eye(2).to_sparse()], "[0]"),
    ],
)
def test_what_cannot_be_stored_is_named(value: Any, where: str) -> None:
    with pytest.raises(TypeError) as error:
        dumps(value)
    assert where in str(error.value)


def test_every_truncation_and_flipped_bit_is_noticed() -> None:
    state = {"step": 7, "lr": 0.1, "w": torch.arange(12.0).view(3, 4), "m": torch.tensor([True])}
    content = dumps(state)
    for length in range(0, len(content), 7):
        with pytest.raises(ValueError, match="not a readable state"):
            loads(content[:length])
    with pytest.raises(ValueError, match="not a readable state"):
        loads(content + b"\0")
    rnd = random.Random(0)
    for _ in range(400):
        damaged = bytearray(content)
        damaged[rnd.randrange(len(content))] ^= 1 << rnd.randrange(8)
        try:
            got = loads(bytes(damaged))
        except ValueError:
            continue
        # Spaces after the header's JSON may change; nothing else may.
        assert same(got, state)


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    import safetensors.torch

    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"w": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        load(path)


def test_the_newest_two_are_kept_and_a_damaged_one_is_passed_over(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    assert kept.newest() == (None, None, [])
    for step in (5, 10, 100, 2_000_000_000):
        kept.write(step, {"step": step})
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["checkpoint-000000100.safetensors", "checkpoint-2000000000.safetensors"]
    newest = kept.paths()[0]
    newest.write_bytes(newest.read_bytes()[:-3])
    state, path, failures = kept.newest()
    assert state == {"step": 100}
    assert path == kept.paths()[1]
    assert len(failures) == 1
    assert newest.name in failures[0]
    kept.paths()[1].write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint can be read"):
        kept.newest()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.safetensors"
    save([1], path)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, call, full)
        with pytest.raises(OSError, match="No space"):
            save([2], path)
    assert load(path) == [1]
    assert os.listdir(tmp_path) == ["s.safetensors"]
