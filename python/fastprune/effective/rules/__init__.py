"""How the operations of PyTorch hand on what their inputs reach: importing this registers all."""

from fastprune.effective.rules import elements, feedback, layers, windows

__all__ = ["elements", "feedback", "layers", "windows"]
