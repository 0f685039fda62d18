"""MANY runs: a grid's cells, how they run here (plan, program), and what is kept of them (layout, store, files)."""
