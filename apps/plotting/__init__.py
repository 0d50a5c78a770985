"""Runs laid over one another, for `apps/plot_runs.py`."""
