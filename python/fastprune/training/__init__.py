"""Training with pruning: resumable to the same bits, by one process or the ranks of ``torchrun``.

:mod:`fastprune.training.checkpoint` stores any nested state; the rest is what ``python -m
fastprune train`` runs.
"""
