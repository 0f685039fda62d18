"""The version, for results to record."""

__version__ = "0.1.0"
