"""Pruning methods: one small file each; what they share is in ``base`` and ``network``.

Start at ``api.py`` (``prune`` and ``score``). A method of your own subclasses :class:`Pruner`.
"""

from fastprune.pruners.api import prune, score
from fastprune.pruners.base import Pruner, Scores
from fastprune.pruners.force import FORCE, GraSPIt, IterSNIP
from fastprune.pruners.grasp import GraSP
from fastprune.pruners.lamp import LAMP
from fastprune.pruners.magnitude import Magnitude
from fastprune.pruners.network import Network
from fastprune.pruners.random import Random
from fastprune.pruners.registry import PRUNERS, methods
from fastprune.pruners.snip import SNIP
from fastprune.pruners.synflow import SynFlow
from fastprune.pruners.targets import prunable

__all__ = [
    "FORCE",
    "LAMP",
    "PRUNERS",
    "SNIP",
    "GraSP",
    "GraSPIt",
    "IterSNIP",
    "Magnitude",
    "Network",
    "Pruner",
    "Random",
    "Scores",
    "SynFlow",
    "methods",
    "prunable",
    "prune",
    "score",
]
