"""MANY runs: grid (axes -> cells), plan (how to run them here), run, store, robustness (what they say)."""
