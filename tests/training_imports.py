"""What the server of :mod:`training_runs` imports once."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import matplotlib.backends.backend_agg
import matplotlib.figure
import sklearn.datasets
import torch._dynamo

import fastprune.cli.train
import fastprune.training.rounds

__all__ = ["fastprune", "matplotlib", "sklearn", "torch"]
