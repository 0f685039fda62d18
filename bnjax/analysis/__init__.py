"""Analysis of results: the range of scales over which networks train (robustness)."""
