"""Predictions that need no training."""

from bnjax.theory import mean_field, random_matrices

__all__ = ["mean_field", "random_matrices"]
