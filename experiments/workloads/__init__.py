"""Whole training sweeps, by bnjax and by others: what `experiments.benchmark --workloads` measures."""
