"""Gradients at initialization against the size of the initial weights, with batch normalization and without."""

from experiments.gradient_flow import signals, slopes, training

CLAIMS = (signals.CLAIM, training.CLAIM, slopes.CLAIM)
