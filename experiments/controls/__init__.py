"""What `experiments.why_robust` asks: the seven controls, one module each."""
