"""Implementations of batch normalization, measured on the same cases against an exact reference."""
