"""Iterative pruning: train, prune, rewind, and again."""

from fastprune.iterative.base import IterativePruning
from fastprune.iterative.methods import SAP, LotteryTicket, OneShotIterative
from fastprune.iterative.rounds import Indices, Round
from fastprune.iterative.sap import sap_step

__all__ = [
    "SAP",
    "Indices",
    "IterativePruning",
    "LotteryTicket",
    "OneShotIterative",
    "Round",
    "sap_step",
]
