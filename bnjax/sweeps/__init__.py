"""MANY runs: grid (axes -> cells), plan (how to run them here), run, store, leases, robustness (what they say)."""
