"""What results say: the range of scales over which networks train (robustness)."""
