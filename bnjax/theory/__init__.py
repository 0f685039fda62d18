"""Predictions that need no training."""
