"""Gradients at initialization against the size of the initial weights, with batch normalization and without."""

from experiments.gradient_flow import signals, slopes, training

CLAIMS = (slopes.CLAIM, signals.CLAIM, training.CLAIM)
