"""Networks as `Model` values."""
