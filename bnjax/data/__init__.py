"""Data sets in memory: standardized float32 inputs and integer labels."""

from bnjax.data.loading import NAMES, default_data_dir, load
from bnjax.data.standardization import standardize
from bnjax.types import Dataset

__all__ = ["NAMES", "Dataset", "default_data_dir", "load", "standardize"]
