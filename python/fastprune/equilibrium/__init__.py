"""Pruning equilibrium models: how their layers are masked and timed, and what is counted."""
