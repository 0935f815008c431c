"""Dense equilibria in either layout, samples or features in the lanes, and the choice of one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastprune as fp
from fastprune.reference import mon_splitting as plain
from mon_linear import ACTIVATIONS, assert_same, matrices, operators, safe_settings

FORMS = ["by_feature", "by_sample"]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per layout."""
    fp._C.set_mon_form(request.param)
    yield request.param
    fp._C.set_mon_form("auto")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    n=st.one_of(st.integers(1, 70), st.sampled_from([96, 128, 129, 200, 260])),
    batch=st.integers(1, 70),
    activation=st.sampled_from([*ACTIVATIONS, "identity"]),
    solver=st.sampled_from(["fb", "pr"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    per_sample=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_agrees_with_the_textbook_loop(
    isa: str,
    form: str,
    n: int,
    batch: int,
    activation: str,
    solver: str,
    dtype: torch.dtype,
    per_sample: bool,
    transposed: bool,
    seed: int,
) -> None:
    g = torch.Generator().manual_seed(seed)
    bias = torch.randn(batch, n, generator=g, dtype=dtype)
    own, textbook = operators(n, 0.8, matrices(n, g, None), bias)
    s = safe_settings(own, activation, solver, per_sample)
    wanted = plain.solve(textbook, bias.double(), *s)
    assert_same(own.solve(bias, s), wanted, s, f"{s}")
    slope = plain.slope(wanted.out, activation).to(dtype)
    grad = torch.randn(batch, n, generator=g, dtype=dtype)
    wanted = plain.adjoint(textbook, grad.double(), slope.double(), *s[1:], transposed=transposed)
    assert_same(own.adjoint(grad, slope, s, transposed), wanted, s, f"{s} adjoint")


def test_unused_lanes_do_not_count(form: str, isa: str) -> None:
    """sigmoid and softplus make something of nothing: past the last feature, past the batch."""
    g = torch.Generator().manual_seed(2)
    for n, batch in ((5, 3), (16, 1), (17, 2), (131, 18)):
        bias = torch.randn(batch, n, generator=g, dtype=torch.float64)
        own, textbook = operators(n, 1.0, matrices(n, g, None), bias)
        for activation in ("sigmoid", "softplus"):
            for solver in ("fb", "pr"):
                s = safe_settings(own, activation, solver, per_sample=False)
                got, wanted = own.solve(bias, s), plain.solve(textbook, bias, *s)
                assert abs(float(got.residual - wanted.residual)) < 1e-14


def test_same_bits_for_any_number_of_threads(form: str, threads: None) -> None:
    g = torch.Generator().manual_seed(3)
    bias = torch.randn(131, 40, generator=g)
    own, _ = operators(40, 1.0, matrices(40, g, None), bias)
    for per_sample in (False, True):
        s = safe_settings(own, "relu", "fb", per_sample, tol=1e-5)
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(own.solve(bias, s))
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert torch.equal(a, b)


def test_zeros_hide_nothing_that_is_not_finite(form: str) -> None:
    """Column 2 belongs to a feature that is never active; NaN in it is NaN all the same."""
    n = 6
    B = torch.zeros(n, n)
    B[4, 2] = torch.nan
    bias = -torch.ones(3, n)
    own, _ = operators(n, 1.0, [None, B, None, None], bias)
    s = safe_settings(own, "relu", "fb", per_sample=False)._replace(alpha=0.5)
    assert own.solve(bias, s).out.isnan().any()


def test_zeros_of_weights_and_states_may_be_negative(form: str) -> None:
    bias = torch.tensor([[-0.0, 1.0, -0.0], [-1.0, -0.0, 2.0]])
    own, textbook = operators(3, 1.0, [-torch.zeros(3, 3), None, None, None], bias)
    s = safe_settings(own, "identity", "fb", per_sample=False)
    assert_same(own.solve(bias, s), plain.solve(textbook, bias.double(), *s), s, "")


def test_both_layouts_are_chosen() -> None:
    """One sample goes by itself; a batch of dense states in the lanes, so does NaN."""
    g = torch.Generator().manual_seed(4)
    for batch, wanted in ((1, "by_sample"), (64, "by_feature")):
        bias = torch.randn(batch, 64, generator=g)
        own, _ = operators(64, 1.0, matrices(64, g, None), bias)
        own.solve(bias, safe_settings(own, "tanh", "fb", per_sample=False))
        assert fp._C.last_mon_form() == wanted
    own, _ = operators(2, 1.0, [None, torch.full((2, 2), torch.nan), None, None], bias)
    own.solve(torch.ones(1, 2), safe_settings(own, "relu", "fb", False)._replace(alpha=0.5))
    assert fp._C.last_mon_form() == "by_feature"


def test_unknown_layout() -> None:
    with pytest.raises(ValueError, match="form: expected 'auto', 'by_feature' or 'by_sample'"):
        fp._C.set_mon_form("by_row")
