"""Predictions that need no training."""

from bnjax.theory import mean_field, order_chaos, random_matrices

__all__ = ["mean_field", "order_chaos", "random_matrices"]
