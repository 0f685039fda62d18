"""What `experiments.scale_laws` measures: the laws in one step, over training, and at a fixed epsilon."""
