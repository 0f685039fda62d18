"""Predictions that need no training."""

from bnjax.theory import mean_field

__all__ = ["mean_field"]
