"""Fixtures that every test file may use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

import fastprune

settings.register_profile("fastprune", deadline=None, print_blob=True)
settings.load_profile("fastprune")

_C = fastprune._C


def runnable_isas() -> list[str]:
    """The ISAs inside the binary that this machine can run."""
    before, usable = _C.isa(), []
    for name in fastprune.build_info()["cpu_isas"]:
        try:
            _C.set_isa(name)
        except ValueError:
            continue
        usable.append(name)
    _C.set_isa(before)
    return usable


@pytest.fixture(params=runnable_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per ISA."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _nothing_timed_before() -> Iterator[None]:
    """accelerate keeps layer timings; a test that replaces the clock must not leave its own."""
    fastprune.kernel_choice.forget_timings()
    yield
    fastprune.kernel_choice.forget_timings()
