"""Experiments: flags -> library -> table, figure, stored result. Run as `python -m experiments.NAME`."""
