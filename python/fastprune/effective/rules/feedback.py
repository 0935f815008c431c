"""Rules of the marks that equilibrium layers leave: see :mod:`fastprune.nn.feedback`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from fastprune.effective.program import Value
from fastprune.effective.trace import Trace, register_rule


@register_rule("fastprune::feedback_state")
def _state(trace: Trace, node: fx.Node, like: Any, shape: Sequence[int]) -> Value:
    """Nothing reaches a state of zeros, but what comes back: the least fixed point is right."""
    return trace.program.value(shape, shape[1] if len(shape) > 2 else None)


@register_rule("fastprune::feedback_close")
def _close(trace: Trace, node: fx.Node, state: Value, result: Any) -> Any:
    if isinstance(result, Value):
        trace.program.feedback(state, result)
    return result
