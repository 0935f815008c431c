"""Kept-count schedules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprune.schedules import SCHEDULES, kept_counts


def test_exponential_by_hand():
    # r_t = 0.01^(t/4): 0.3162, 0.1, 0.0316, then k.
    assert kept_counts("exponential", 1000, 10, 4, density=0.01) == [316, 100, 31, 10]


def test_linear_by_hand():
    # r_t = 1 - 0.75 t / 4 on 101 weights: 82.06, 63.13, 44.19, then floor(25.25 + 0.5).
    assert kept_counts("linear", 101, 25, 4, density=0.25) == [82, 63, 44, 25]


def test_cubic_by_hand():
    # s_t = 0.5 - 0.5 (1 - t/4)^3: 0.2890625, 0.4375, 0.4921875 on 64 weights: 45.5 rounds up.
    assert kept_counts("cubic", 64, 32, 4, density=0.5) == [46, 36, 33, 32]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_step_is_the_final_count(schedule):
    assert kept_counts(schedule, 77, 5, 1) == [5]


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(SCHEDULES), st.integers(0, 10**7), st.floats(0, 1), st.integers(1, 300))
def test_named_schedules_go_down_to_exactly_k(schedule, n, sparsity, steps):
    d = 1 - sparsity
    k = math.floor(d * n + 0.5)
    counts = kept_counts(schedule, n, k, steps, density=d)
    assert len(counts) == steps
    assert counts[-1] == k
    assert all(n >= a >= b >= k for a, b in zip(counts, counts[1:] or [k]))  # noqa: B905
    # int(N r_t) to the letter on the way, where that is not below k
    for t, count in enumerate(counts[:-1], start=1):
        if schedule == "exponential":
            assert count == max(k, int(n * d ** (t / steps)))
        elif schedule == "linear":
            assert count == max(k, int(n * (t / steps * d + (1 - t / steps))))
        else:
            kept = (1 - (1 - d) * (1 - (1 - t / steps) ** 3)) * n
            assert abs(count - kept) <= 0.5 + 1e-6 * max(1, kept) or count == k


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("k", [0, 50])
def test_nothing_and_everything(schedule, k):
    counts = kept_counts(schedule, 50, k, 5)
    assert counts[-1] == k
    if k == 50:
        assert counts == [50] * 5
    elif schedule == "exponential":
        assert counts == [0] * 5
    assert kept_counts(schedule, 0, 0, 3) == [0, 0, 0]


def test_explicit_sequence():
    assert kept_counts([9, 5, 5, 2], 10, 2) == [9, 5, 5, 2]
    assert kept_counts([9, 2], 10, None) == [9, 2]
    assert kept_counts(np.array([9, 2]), 10, 2, 2) == [9, 2]
    assert kept_counts(torch.tensor([9, 2]), 10, 2) == [9, 2]
    assert kept_counts((2, 9, 2), 10, 2, monotone=False) == [2, 9, 2]
    assert all(type(c) is int for c in kept_counts(np.array([9, 2]), 10, 2))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("square", 10, 5, 2), "schedule.*linear, exponential, cubic.*'square'"),
        ((3, 10, 5, 2), "schedule.*int"),
        (([], 10, None), "empty"),
        (([8, 5], 10, 5, 3), "2 kept counts given for steps=3"),
        (([8, 4], 10, 5), "last kept count is 4.*5 of 10"),
        (([8, 9, 5], 10, 5), r"schedule\[1\].*9 kept after 8"),
        (([11, 5], 10, 5), r"schedule\[0\].*\[0, 10\].*11"),
        (([-1], 10, None), r"schedule\[0\]"),
        (([8.0, 5], 10, 5), r"schedule\[0\].*8.0"),
        (([True, 0], 10, 0), r"schedule\[0\].*True"),
        (("linear", 10, 11, 2), "k:"),
        (("linear", 10, -1, 2), "k:"),
        (("linear", 10, 2.5, 2), "k:"),
        (("linear", 10, None, 2), "k:"),
        (("linear", 10, 5, None), "steps:"),
        (("linear", 10, 5, 0), "steps:"),
        (("linear", 10, 5, True), "steps:"),
        (("linear", -1, 0, 1), "n:"),
    ],
)
def test_errors(arguments, text):
    with pytest.raises(ValueError, match=text):
        kept_counts(*arguments)


@pytest.mark.parametrize("density", [-0.1, 1.1, float("nan")])
def test_density_out_of_range(density):
    with pytest.raises(ValueError, match="density"):
        kept_counts("linear", 10, 5, 2, density=density)
