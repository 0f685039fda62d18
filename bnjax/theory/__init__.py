"""Predictions that need no training."""

from bnjax.theory import lp_norms, mean_field, norm_growth, order_chaos, random_matrices, residual

__all__ = ["lp_norms", "mean_field", "norm_growth", "order_chaos", "random_matrices", "residual"]
